//! `wrenn sandbox shell`.

use std::collections::BTreeMap;

use super::create::unique;
use crate::args::key_value;
use crate::client::PtyStart;
use crate::commands::Context;
use crate::commands::terminal::{SessionEnd, lend, require_terminal};
use crate::env;
use crate::error::Failure;
use crate::exit::Exit;
use crate::signals::Signals;

/// What every terminal of today understands.
const DEFAULT_TERM: &str = "xterm-256color";

/// Options of `wrenn sandbox shell`.
///
/// To leave a session without ending it: Enter, `~`, `.`; it can be taken up again with
/// --connect.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    /// Variable for the session; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = key_value)]
    env: Vec<(String, String)>,
    /// Folder to start in [default: the user's home]
    #[arg(long, value_name = "FOLDER")]
    cwd: Option<String>,
    /// User to run as [default: user]
    #[arg(short, long)]
    user: Option<String>,
    /// Take up the session of this tag instead of starting one
    #[arg(long, value_name = "TAG", conflicts_with_all = ["env", "cwd", "user", "command"])]
    connect: Option<String>,
    /// What to run instead of a shell
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<String>,
}

/// Opens it and stays until it ends.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    require_terminal("`wrenn sandbox exec` runs commands without one")?;
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
    let start = match &args.connect {
        Some(tag) => PtyStart::Existing(tag.clone()),
        None => PtyStart::New {
            command: args
                .command
                .split_first()
                .map(|(cmd, rest)| (cmd.clone(), rest.to_vec())),
            envs: terminal_envs(unique(&args.env, "--env")?),
            cwd: args.cwd.clone(),
            user: args.user.clone(),
        },
    };
    let end = lend(&client, &id, &start, &mut signals)
        .await
        .map_err(|failure| match failure.ends_with() {
            Exit::Failed => failure.exit(Exit::RunFailed),
            _ => failure,
        })?;
    match end {
        SessionEnd::Exited(exit) => Ok(exit),
        SessionEnd::Detached(tag) => {
            context.printer.note(format!(
                "\nleft; come back with: wrenn sandbox shell {id} --connect {tag}"
            ));
            Ok(Exit::Ok)
        }
    }
}

/// `envs` and what a program must know about our terminal.
pub(crate) fn terminal_envs(mut envs: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let term = std::env::var(env::TERM)
        .ok()
        .filter(|term| !term.is_empty() && term != "dumb");
    envs.entry(env::TERM.to_owned())
        .or_insert_with(|| term.unwrap_or_else(|| DEFAULT_TERM.to_owned()));
    if let Ok(colors) = std::env::var(env::COLORTERM) {
        envs.entry(env::COLORTERM.to_owned()).or_insert(colors);
    }
    envs
}
