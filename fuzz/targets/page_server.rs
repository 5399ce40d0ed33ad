//! Orders for a page server. See the property.
#![no_main]

#[path = "../properties/page_server.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
