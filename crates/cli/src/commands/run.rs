//! `wrenn run`: a command in a sandbox that lives exactly as long as it.

use std::time::Duration;

use super::follow::{OnSignal, Options, follow};
use super::sandbox::create::Shape;
use super::sandbox::exec::CommandArgs;
use super::terminal::{SessionEnd, lend, require_terminal};
use super::{Context, sandbox};
use crate::client::{Client, Created, PtyStart};
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::with_spinner;
use crate::signals::Signals;

/// After so many seconds without any use nobody is there any more to end the sandbox.
const ABANDONED_SECS: u32 = 300;

/// Options of `wrenn run`.
///
/// Exit codes: the command's own; 128+n when signal n ended it; 124 after --limit; 125 when
/// Wrenn failed; 126 when the command cannot be executed; 127 when there is none.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    how: CommandArgs,
    /// Give the command a terminal
    #[arg(short, long, conflicts_with_all = ["no_stdin", "limit"])]
    tty: bool,
    /// Command and arguments, as they are; for a shell's line use: bash -c '…'
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub(crate) command: Vec<String>,
}

/// Runs it.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let failed_beside_it = |failure: Failure| match failure.ends_with() {
        Exit::Failed => failure.exit(Exit::RunFailed),
        _ => failure,
    };
    in_sandbox(args, context).await.map_err(failed_beside_it)
}

async fn in_sandbox(args: &Args, context: &Context) -> Result<Exit, Failure> {
    if args.tty {
        require_terminal("leave out -t to run without a terminal")?;
    }
    let client = context.client()?;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
    let mut request = args.shape.request()?;
    // An open stream is use, so this ends only what a killed `wrenn run` has left behind.
    request.timeout_sec = Some(ABANDONED_SECS);
    request.on_timeout = Some("kill");
    let create = with_spinner(
        &context.printer,
        "starting a sandbox",
        client.create(&request),
    );
    let mut create = std::pin::pin!(create);
    let created = tokio::select! {
        created = &mut create => created?,
        signal = signals.next() => {
            // The server goes through with it (a sandbox's life hangs on no connection),
            // so leaving now would leave the sandbox behind.
            let created = create.await?;
            end(&client, &created, context).await?;
            return Ok(Exit::Signal(signal));
        }
    };
    let result = inside(args, &client, &created.sandbox.id, &mut signals).await;
    let ended = end(&client, &created, context).await;
    // What the command did matters more than that its sandbox cannot be ended.
    let exit = result?;
    ended?;
    Ok(exit)
}

async fn inside(
    args: &Args,
    client: &Client,
    id: &str,
    signals: &mut Signals,
) -> Result<Exit, Failure> {
    let command = args.how.command(&args.command)?;
    if args.tty {
        let start = PtyStart::New {
            command: Some((command.cmd, command.args)),
            envs: sandbox::shell::terminal_envs(command.envs),
            cwd: command.cwd,
            user: command.user,
        };
        return match lend(client, id, &start, signals).await? {
            SessionEnd::Exited(exit) => Ok(exit),
            // Nobody can come back to a sandbox that ends with its command.
            SessionEnd::Detached(_) => Ok(Exit::Ok),
        };
    }
    let options = Options {
        stdin: args.how.stdin(),
        limit: args.how.limit(),
        on_signal: OnSignal::Leave,
    };
    follow(client, id, &command, options, signals).await
}

/// Ends the sandbox. One more try bridges a server that is just being restarted.
async fn end(client: &Client, created: &Created, context: &Context) -> Result<(), Failure> {
    let id = &created.sandbox.id;
    let first = client.destroy(id).await;
    let outcome = match first {
        Err(error) if !error.is_not_found() => {
            tokio::time::sleep(Duration::from_secs(1)).await;
            client.destroy(id).await
        }
        other => other,
    };
    match outcome {
        Ok(()) => Ok(()),
        // It has expired or somebody else ended it.
        Err(error) if error.is_not_found() => Ok(()),
        Err(error) => {
            context.printer.warn(format!(
                "sandbox {id} is still there: end it with `wrenn sandbox kill {id}`"
            ));
            Err(error.into())
        }
    }
}
