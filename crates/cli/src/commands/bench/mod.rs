//! `wrenn bench …`: what this installation takes for what it does.

mod ground;
mod guest;
mod host;
mod machine;
mod report;
mod snapshot;
mod start;
mod statistics;

use super::Context;
use crate::error::Failure;
use crate::exit::Exit;

/// What can be measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Measure how fast sandboxes start and what they cost while idle
    Start(start::Args),
    /// Measure what saving, restoring and forking a sandbox takes
    Snapshot(snapshot::Args),
    /// Measure the host agent: its journal, its network slots, its memory, and how fast the next one takes over
    Host(host::Args),
    /// Measure the guest agent by itself, as a plain process on this machine
    Guest(guest::Args),
}

impl Command {
    /// Whether errors go out as JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Start(args) => args.output.json,
            Command::Snapshot(args) => args.output.json,
            Command::Host(args) => args.output.json,
            Command::Guest(args) => args.output.json,
        }
    }

    /// Does it.
    pub(crate) async fn run(&self, context: &Context) -> Result<Exit, Failure> {
        match self {
            Command::Start(args) => start::run(args, context).await,
            Command::Snapshot(args) => snapshot::run(args, context).await,
            Command::Host(args) => host::run(args, context).await,
            Command::Guest(args) => guest::run(args, context).await,
        }
    }
}
