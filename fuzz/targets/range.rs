//! `Range` and the conditional headers of downloads. See the property.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/envd/src/files/conditions.rs"]
mod conditions;
#[path = "../properties/range.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
