//! Merging layers of a disk. See the property.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../properties/disk_layers.rs"]
mod property;
#[path = "../../crates/vmm/src/qcow2/mod.rs"]
mod qcow2;

/// What that file takes from its crate.
mod runs {
    pub(crate) fn is_zero(bytes: &[u8]) -> bool {
        bytes.iter().all(|byte| *byte == 0)
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
