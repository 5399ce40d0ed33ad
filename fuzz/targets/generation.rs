//! Files with pages of memory. See the property.
#![no_main]

#[path = "../properties/generation.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
