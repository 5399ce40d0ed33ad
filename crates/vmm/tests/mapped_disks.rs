//! Disks of the device mapper. The kernels that tests run on need not have one, so they are tried
//! by root of a guest whose kernel does.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // For the tests that freeze machines.
mod common;

use std::fs;
use std::process::Command;
use std::sync::Arc;

use common::{Guest, SHAPE, console_line, folder, harness, vmm};
use wrenn_vmm::{BootSpec, MemoryFile, Vmm};

const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs d /dev; $b mount -t proc p /proc; $b mount -t sysfs s /sys
MODULES
$b mkdir -p /disk; $b mount -t ext4 -o rw /dev/vda /disk
exec >/dev/ttyS0 2>&1
/bin/harness mapped-disks /disk
$b sleep 1000
"#;

#[tokio::test]
async fn what_a_machine_writes_lies_over_an_image_that_others_share() {
    let vmm = vmm();
    let parent = tempfile::tempdir().unwrap();
    let stripped = parent.path().join("harness");
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&stripped).arg(harness());
    assert!(strip.status().unwrap().success());
    let modules = ["loop", "dm-mod", "dm-bufio", "dm-snapshot"];
    let initramfs = parent.path().join("initramfs.cpio");
    Guest {
        init: INIT,
        modules: &modules,
        programs: &[(&stripped, "harness")],
    }
    .pack(&initramfs);
    let dir = folder(parent.path(), "guest");
    let mut machine = common::spec(&vmm, &dir, 10_190, "mapped", Vec::new());
    machine.boot.initramfs = initramfs;
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let machine = vmm.boot(BootSpec { machine, memory }).await.unwrap();
    let line = console_line(&machine, "MAPPED").await;
    let tail = machine.console_tail(16 << 10).unwrap();
    println!("{}", String::from_utf8_lossy(&tail));
    machine.kill().await.unwrap();
    assert!(line.contains("MAPPED whole."), "{line}");
    fs::remove_dir_all(dir).unwrap();
}
