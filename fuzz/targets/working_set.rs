//! Recorded working sets. See the property.
#![no_main]

#[path = "../properties/working_set.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
