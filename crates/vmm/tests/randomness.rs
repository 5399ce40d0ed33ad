//! Why a restore hook is needed: two clones of one frozen machine, to which nothing is said, give
//! the same random numbers (the negative control of G23; what the hook does about it is tested end
//! to end). Needs what `machines.rs` needs.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Template, console_line, folder, tick, vmm};
use wrenn_vmm::{Machine, QemuVmm, Vmm};

fn random(line: &str) -> &str {
    line.split("rnd=")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
}

/// What a clone says first, under an identity that its template had: nothing tells it apart.
async fn first_words(vmm: &QemuVmm, template: &Template, parent: &Path, index: u32) -> String {
    let dir = folder(parent, &format!("clone{index}"));
    let spec = template.clone_spec(vmm, &dir, 10_060 + index, "template");
    let machine: Arc<dyn Machine> = vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    let wanted = format!("TICK {} ", template.tick + 1);
    let line = console_line(&machine, &wanted).await;
    machine.kill().await.unwrap();
    line
}

#[tokio::test]
async fn g23_clones_without_a_restore_hook_share_their_randomness() {
    let vmm = vmm();
    // The kernel takes new entropy in by itself, every second or two at this age, and then the
    // clones differ: of several templates one is frozen well before that.
    for attempt in 0..6 {
        let parent = tempfile::tempdir().unwrap();
        let template = Template::make(&vmm, parent.path(), 10_060, None).await;
        let one = first_words(&vmm, &template, parent.path(), 1).await;
        let other = first_words(&vmm, &template, parent.path(), 2).await;
        println!("attempt {attempt}:\n{one}\n{other}");
        assert_eq!(tick(&one), tick(&other));
        assert_eq!(random(&one).len(), 16, "{one}");
        if random(&one) == random(&other) {
            return;
        }
    }
    panic!("no two clones gave the same random numbers, so no hook is needed any more");
}
