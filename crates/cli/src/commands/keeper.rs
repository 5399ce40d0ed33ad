//! `wrenn keeper`: the process that starts one machine and outlives the server. Hidden,
//! since only the host agent runs it.

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use wrenn_net::relay::{self, Upstreams};

/// Options of `wrenn keeper`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs until its machine has ended. Called before any thread or runtime exists.
pub(crate) fn run(_args: &Args) -> ExitCode {
    wrenn_vmm::keeper::main(|companions| {
        let sockets: Result<[OwnedFd; 2], _> = companions.try_into();
        // A machine without a network has no sockets for a resolver either.
        if let Ok([udp, tcp]) = sockets {
            let error = relay::serve(udp, tcp, Upstreams::from_resolv_conf());
            tracing::error!(%error, "the DNS relay of this machine ended");
        }
    })
}
