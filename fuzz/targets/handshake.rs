//! A monitor's description of its memory. See the property.
#![no_main]

#[path = "../properties/handshake.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
