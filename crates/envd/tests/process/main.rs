//! `process.Process` against the real agent, in both codecs.
#![allow(clippy::unwrap_used)]

mod control;
mod end;
mod output;
mod start;
#[path = "../support/mod.rs"]
mod support;

fn gone(pid: u32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}")).exists()
}
