//! `wrenn sandbox …`: sandboxes that stay until they are ended.

pub(crate) mod checkpoint;
pub(crate) mod cp;
pub(crate) mod create;
pub(crate) mod diff;
pub(crate) mod exec;
pub(crate) mod fork;
pub(crate) mod inspect;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod network;
pub(crate) mod pause;
pub(crate) mod shell;
pub(crate) mod why;

use super::Context;
use crate::error::Failure;
use crate::exit::Exit;

/// The commands about sandboxes. ID: a sandbox's id, or its beginning or end as far as
/// that is unambiguous.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a sandbox and print its id
    Create(create::Args),
    /// List the sandboxes there are
    #[command(visible_alias = "ls")]
    List(list::Args),
    /// Show all there is to know about a sandbox
    Inspect(inspect::Args),
    /// Run a command in a sandbox
    Exec(exec::Args),
    /// Open a terminal in a sandbox
    Shell(shell::Args),
    /// Copy a file into or out of a sandbox
    Cp(cp::Args),
    /// End sandboxes
    #[command(visible_alias = "rm")]
    Kill(kill::Args),
    /// Save a sandbox, programs and all, and free what it takes of this machine
    Pause(pause::PauseArgs),
    /// Go on with a paused sandbox
    Resume(pause::ResumeArgs),
    /// Start new sandboxes in the very state that this one is in; it goes on
    Fork(fork::Args),
    /// Note a point that the sandbox can go back to
    Checkpoint(checkpoint::Args),
    /// List those points
    Checkpoints(checkpoint::ListArgs),
    /// Go back to one; what was done since is lost
    Rollback(checkpoint::RollbackArgs),
    /// Show what differs from a checkpoint or from another sandbox
    Diff(diff::Args),
    /// Show the log of a sandbox's console, where its kernel and guest agent write
    Logs(logs::Args),
    /// Tell why a sandbox is as it is, and how it ended
    Why(why::Args),
    /// List what happened to a sandbox
    Events(why::Args),
    /// Show how busy a sandbox is and was
    Stats(why::StatsArgs),
    /// Show or change what a sandbox may reach, connections that are open included
    Network(network::Args),
    /// List what a sandbox tried to reach and was refused
    Denials(network::DenialsArgs),
}

impl Command {
    /// Whether errors go out as JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Create(args) => args.output.json,
            Command::List(args) => args.output.json,
            Command::Inspect(args) => args.output.json,
            Command::Kill(args) => args.output.json,
            Command::Pause(args) => args.output.json,
            Command::Resume(args) => args.output.json,
            Command::Fork(args) => args.output.json,
            Command::Checkpoint(args) => args.output.json,
            Command::Checkpoints(args) => args.output.json,
            Command::Rollback(args) => args.output.json,
            Command::Diff(args) => args.output.json,
            Command::Why(args) | Command::Events(args) => args.output.json,
            Command::Stats(args) => args.output.json,
            Command::Network(args) => args.output.json,
            Command::Denials(args) => args.output.json,
            Command::Exec(_) | Command::Shell(_) | Command::Cp(_) | Command::Logs(_) => false,
        }
    }

    /// Does it.
    pub(crate) async fn run(&self, context: &Context) -> Result<Exit, Failure> {
        match self {
            Command::Create(args) => create::run(args, context).await,
            Command::List(args) => list::run(args, context).await,
            Command::Inspect(args) => inspect::run(args, context).await,
            Command::Exec(args) => exec::run(args, context).await,
            Command::Shell(args) => shell::run(args, context).await,
            Command::Cp(args) => cp::run(args, context).await,
            Command::Kill(args) => kill::run(args, context).await,
            Command::Pause(args) => pause::pause(args, context).await,
            Command::Resume(args) => pause::resume(args, context).await,
            Command::Fork(args) => fork::run(args, context).await,
            Command::Checkpoint(args) => checkpoint::run(args, context).await,
            Command::Checkpoints(args) => checkpoint::list(args, context).await,
            Command::Rollback(args) => checkpoint::rollback(args, context).await,
            Command::Diff(args) => diff::run(args, context).await,
            Command::Logs(args) => logs::run(args, context).await,
            Command::Why(args) => why::why(args, context).await,
            Command::Events(args) => why::events(args, context).await,
            Command::Stats(args) => why::stats(args, context).await,
            Command::Network(args) => network::run(args, context).await,
            Command::Denials(args) => network::denials(args, context).await,
        }
    }
}
