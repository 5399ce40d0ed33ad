//! What strangers send, in nonsense forms: the fuzz targets of the guest agent as ordinary
//! tests. See fuzz/runner.rs.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/properties/connect.rs"]
mod connect;
#[path = "../../../fuzz/properties/multipart.rs"]
mod multipart;
#[path = "../../../fuzz/properties/path.rs"]
mod path;
#[path = "../../../fuzz/properties/proc_net_tcp.rs"]
mod proc_net_tcp;
#[path = "../../../fuzz/properties/range.rs"]
mod range;
#[path = "../../../fuzz/runner.rs"]
mod runner;
#[path = "../../../fuzz/properties/signature.rs"]
mod signature;

use runner::run;
// By the names that the properties know them by.
use wrenn_envd::files::conditions;
use wrenn_envd::files::multipart as parser;
use wrenn_envd::ports::table;

#[test]
fn fuzz_connect() {
    run("connect", connect::check);
}

#[test]
fn fuzz_multipart() {
    run("multipart", multipart::check);
}

#[test]
fn fuzz_path() {
    run("path", path::check);
}

#[test]
fn fuzz_proc_net_tcp() {
    run("proc_net_tcp", proc_net_tcp::check);
}

#[test]
fn fuzz_range() {
    run("range", range::check);
}

#[test]
fn fuzz_signature() {
    run("signature", signature::check);
}
