//! Maps of memories. See the property.
#![no_main]

#[path = "../properties/index.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
