//! What machines in Firecracker leave behind. In a process of its own, whose descriptors no
//! other test opens; needs what `firecracker` needs.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "firecracker/bed.rs"]
mod bed;
#[allow(dead_code)]
#[path = "firecracker/guest.rs"]
mod guest;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bed::{Bed, rounds_of};
use wrenn_vmm::Vmm;

/// What this process has open, and how often.
fn open_files() -> BTreeMap<String, usize> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        // The folder that is being read is gone by then.
        if let Ok(link) = fs::read_link(entry.unwrap().path()) {
            let name = link.to_string_lossy().into_owned();
            let kind = name.split([':', ' ']).next().unwrap().to_owned();
            *files.entry(kind).or_default() += 1;
        }
    }
    files
}

fn processes_of(uid: u32) -> usize {
    let entries = fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path().join("status")).ok())
        .filter(|status| status.contains(&format!("Uid:\t{uid}\t")))
        .count()
}

fn mounts() -> usize {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().count()
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[tokio::test]
async fn g7_machines_that_ended_leave_nothing() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_202, 2).await;
    let mut before = None;
    for index in 0..20 {
        let spec = template.clone_spec(&bed, "clone", 10_203);
        let dir = spec.machine.dir.clone();
        let machine = bed.vmm.restore(spec).await.unwrap();
        machine.resume().await.unwrap();
        rounds_of(&machine, template.round + 1).await;
        drop(machine.save_delta().await.unwrap());
        machine.kill().await.unwrap();
        drop(machine);
        let began = Instant::now();
        while processes_of(10_203) > 0 {
            assert!(began.elapsed() < Duration::from_secs(5), "a process stays");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        fs::remove_dir_all(dir).unwrap();
        let counts = (open_files(), mounts(), entries(bed.path()));
        // The first ones have the runtime make what it keeps.
        match (index, &before) {
            (0..3, _) => {}
            (_, None) => before = Some(counts),
            (_, Some(before)) => assert_eq!(*before, counts),
        }
    }
}
