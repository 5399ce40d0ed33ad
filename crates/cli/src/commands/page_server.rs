//! `wrenn page-server`: the process that supplies one machine's memory from a snapshot and ends
//! with that machine. Hidden, since only the host agent runs it.

use std::process::ExitCode;

/// Options of `wrenn page-server`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs until its machine has ended. Blocking, and without a runtime: all that it does is copy.
pub(crate) fn run(_args: &Args) -> ExitCode {
    match wrenn_host::serve_pages() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the memory could not be served");
            ExitCode::FAILURE
        }
    }
}
