//! What a page server reads, in nonsense forms: its fuzz targets as ordinary tests. See
//! fuzz/runner.rs.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/properties/handshake.rs"]
mod handshake;
#[path = "../../../fuzz/properties/page_server.rs"]
mod page_server;
#[path = "../../../fuzz/runner.rs"]
mod runner;
#[path = "../../../fuzz/properties/working_set.rs"]
mod working_set;

use runner::run;

#[test]
fn g21_fuzz_handshake() {
    run("handshake", handshake::check);
}

#[test]
fn fuzz_page_server() {
    run("page_server", page_server::check);
}

#[test]
fn g16_fuzz_working_set() {
    run("working_set", working_set::check);
}
