//! Requests to the RPC services. See the property.
#![no_main]

#[path = "../properties/connect.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
