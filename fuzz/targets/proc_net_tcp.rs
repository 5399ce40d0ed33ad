//! Lines of `/proc/net/tcp` and `tcp6`. See the property.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/envd/src/ports/table.rs"]
mod table;
#[path = "../properties/proc_net_tcp.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
