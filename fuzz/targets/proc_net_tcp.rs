//! Lines of `/proc/net/tcp` and `tcp6`.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/envd/src/ports/table.rs"]
mod table;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for line in data.split(|byte| *byte == b'\n') {
        if let Some(listener) = table::line(line) {
            // Mapped addresses are told as what they are.
            assert_eq!(listener.address.ip(), listener.address.ip().to_canonical());
        }
    }
});
