//! `wrenn keeper`: the process that starts one machine and outlives the server. Hidden,
//! since only the host agent runs it.

use std::process::ExitCode;

use wrenn_net::relay::{self, RelayFiles, Upstreams};

/// Options of `wrenn keeper`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs until its machine has ended. Called before any thread or runtime exists.
pub(crate) fn run(_args: &Args) -> ExitCode {
    wrenn_vmm::keeper::main(|companions| {
        // A machine without a network has no sockets for a resolver either.
        if let Some(files) = RelayFiles::from_descriptors(companions) {
            let error = relay::serve(files, Upstreams::from_resolv_conf());
            tracing::error!(%error, "the DNS relay of this machine ended");
        }
    })
}
