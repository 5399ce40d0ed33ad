//! `wrenn sandbox exec`.

use std::time::Duration;

use super::create::unique;
use crate::args::key_value;
use crate::client::Command;
use crate::commands::Context;
use crate::commands::follow::{OnSignal, Options, follow};
use crate::error::Failure;
use crate::exit::Exit;
use crate::signals::Signals;

/// How to run a command.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Command")]
pub(crate) struct CommandArgs {
    /// Variable for the command; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,
    /// Folder to start in [default: the user's home]
    #[arg(long, value_name = "FOLDER")]
    cwd: Option<String>,
    /// User to run as [default: user]
    #[arg(short, long)]
    user: Option<String>,
    /// Leave our stdin alone; the command's input is empty
    #[arg(short = 'n', long)]
    no_stdin: bool,
    /// End the command after so many seconds, with exit code 124
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
}

impl CommandArgs {
    /// `words` as the API wants them.
    pub(crate) fn command(&self, words: &[String]) -> Result<Command, Failure> {
        let Some((cmd, args)) = words.split_first() else {
            return Err(Failure::usage("no command: put it behind `--`"));
        };
        Ok(Command {
            cmd: cmd.clone(),
            args: args.to_vec(),
            envs: unique(&self.env, "--env")?,
            cwd: self.cwd.clone(),
            user: self.user.clone(),
        })
    }

    /// Whether to pass our stdin on.
    pub(crate) fn stdin(&self) -> bool {
        !self.no_stdin
    }

    /// How long it may take.
    pub(crate) fn limit(&self) -> Option<Duration> {
        self.limit.map(Duration::from_secs)
    }
}

/// Options of `wrenn sandbox exec`.
///
/// Exit codes as for `wrenn run`. The first Ctrl-C asks the command to end, the second
/// makes it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    #[command(flatten)]
    how: CommandArgs,
    /// Command and arguments, as they are; for a shell's line use: bash -c '…'
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<String>,
}

/// Runs it.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let outcome = async {
        let client = context.client()?;
        let id = client.find(&args.id).await?;
        let mut signals = Signals::listen()
            .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
        let options = Options {
            stdin: args.how.stdin(),
            limit: args.how.limit(),
            on_signal: OnSignal::PassOn,
        };
        follow(
            &client,
            &id,
            &args.how.command(&args.command)?,
            options,
            &mut signals,
        )
        .await
    };
    outcome
        .await
        .map_err(|failure: Failure| match failure.ends_with() {
            Exit::Failed => failure.exit(Exit::RunFailed),
            _ => failure,
        })
}
