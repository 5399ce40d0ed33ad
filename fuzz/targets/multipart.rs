//! Uploads as `multipart/form-data`. See the property.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/envd/src/files/multipart.rs"]
mod parser;
#[path = "../properties/multipart.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
