//! The `wrenn` command.
//!
//! ```text
//! args (clap) ─▶ settings (flags > environment > file > defaults) ─▶ commands/<verb> ─▶ output
//!                                                                        │
//!                                            client (HTTP, WebSocket) ◀──┴──▶ crates of the server
//! ```
//!
//! Everything but `up`, `host-agent`, `keeper`, `service`, `doctor`, `image` and `gc` is a client of the API and
//! works from another machine as well. `exit` lists the exit codes, `env` the environment
//! variables, `settings` the configuration file.

mod args;
mod client;
mod commands;
mod env;
mod error;
mod exit;
mod guest_programs;
mod heap;
mod host_address;
mod logging;
mod output;
mod server_file;
mod settings;
mod signals;

use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::{Builder, Runtime};

use crate::args::{Cli, Command};
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Printer;
use crate::settings::{ColorChoice, Settings};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.command.json();
    let (printer, outcome) = match Settings::resolve(&cli.global, &environment) {
        Ok(settings) => {
            let printer = Printer::new(settings.color);
            (printer, run(cli.command, Context { settings, printer }))
        }
        Err(error) => (Printer::new(ColorChoice::Auto), Err(error.into())),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            tracing::debug!(code = failure.word(), "failed");
            printer.failure(&failure, json);
            failure.ends_with().into()
        }
    }
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn run(command: Command, context: Context) -> Result<ExitCode, Failure> {
    logging::start(
        &context.settings,
        matches!(
            command,
            Command::Up(_) | Command::HostAgent(_) | Command::Keeper(_) | Command::PageServer(_)
        ),
    )?;
    // The keeper forks and drops rights, for which there must be no other thread yet.
    if let Command::Keeper(args) = &command {
        return Ok(commands::keeper::run(args));
    }
    if let Command::PageServer(args) = &command {
        return Ok(commands::page_server::run(args));
    }
    let serves = matches!(command, Command::Up(_) | Command::HostAgent(_));
    if serves {
        heap::share_arenas();
    }
    let runtime = runtime(&command)?;
    if serves {
        // It ends with the runtime.
        runtime.spawn(heap::keep_small());
    }
    let outcome = runtime.block_on(dispatch(command, &context));
    // A thread may still wait for a key on stdin; nothing needs what it would read.
    runtime.shutdown_background();
    outcome.map(ExitCode::from)
}

fn runtime(command: &Command) -> Result<Runtime, Failure> {
    let mut builder = match command {
        Command::Up(_) | Command::HostAgent(_) => Builder::new_multi_thread(),
        _ => Builder::new_current_thread(),
    };
    builder
        .enable_all()
        .build()
        .map_err(|error| Failure::message(format!("cannot start the async runtime: {error}")))
}

async fn dispatch(command: Command, context: &Context) -> Result<Exit, Failure> {
    match command {
        Command::Up(args) => {
            let up = context.settings.up(&args, &environment)?;
            commands::up::run(&args, &up, &context.settings, &context.printer).await
        }
        Command::HostAgent(args) => commands::host_agent::run(&args, context).await,
        Command::Down(args) => commands::down::run(&args, context).await,
        Command::Drain(args) => commands::drain::run(&args, context).await,
        Command::Debug(args) => commands::debug::run(&args, context).await,
        Command::Service(command) => command.run(context),
        Command::Doctor(args) => commands::doctor::run(&args, context),
        Command::Gc(args) => commands::gc::run(&args, context).await,
        Command::Image(command) => command.run(context).await,
        Command::Run(args) => commands::run::run(&args, context).await,
        Command::Sandbox(command) => command.run(context).await,
        Command::Snapshot(command) => command.run(context).await,
        Command::Bench(command) => command.run(context).await,
        Command::Chaos(args) => commands::chaos::run(&args, context).await,
        Command::Version(args) => commands::version::run(&args, context).await,
        // `run` has taken them already.
        Command::Keeper(_) | Command::PageServer(_) => Err(Failure::message(
            "keepers and page servers run without an async runtime",
        )),
    }
}
