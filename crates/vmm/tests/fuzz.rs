//! Layers of disks in nonsense forms: their fuzz target as an ordinary test. See
//! fuzz/runner.rs.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/properties/disk_layers.rs"]
mod disk_layers;
#[path = "../../../fuzz/runner.rs"]
mod runner;

use runner::run;
// By the name that the property knows it by.
use wrenn_vmm as qcow2;

#[test]
fn fuzz_disk_layers() {
    run("disk_layers", disk_layers::check);
}
