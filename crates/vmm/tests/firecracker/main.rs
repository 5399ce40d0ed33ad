//! Real machines in Firecracker: boot, pause, save, restore, adopt, end. Needs root, any KVM
//! (one that only runs paravirtual guests will do) and a Firecracker named by
//! `FIRECRACKER_BIN`; without it each test says that it was skipped.
//!
//! The guest is a hundred bytes of ours. What these tests cannot show, and only a host with
//! hardware virtualisation can: that a Linux guest finds its disk, network card and metadata
//! after a restore, reseeds, and gives memory to its balloon.

#![allow(clippy::unwrap_used)]

mod bed;
mod guest;

use bed::{Bed, View, rounds_of, settled_round};

#[tokio::test]
async fn smoke() {
    let Some(bed) = Bed::new() else { return };
    let (machine, _memory) = bed.boot("m", 10_200).await;
    for n in 0..6 {
        let t = std::time::Instant::now();
        let r = rounds_of(&machine, n * 5).await;
        println!("{r} {:?}", t.elapsed());
    }
    machine.stop().await.unwrap();

    let round = settled_round(&machine).await;
    View::of(machine.pids()).check(round);
    machine.kill().await.unwrap();
}
