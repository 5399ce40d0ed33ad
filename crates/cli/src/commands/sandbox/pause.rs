//! `wrenn sandbox pause` and `wrenn sandbox resume`.

use serde_json::Value;

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::with_spinner;

/// Options of `wrenn sandbox pause`.
#[derive(Debug, clap::Args)]
pub(crate) struct PauseArgs {
    /// Which sandbox
    id: String,
    /// Save its disk alone: its programs end, and it boots when it is resumed
    #[arg(long)]
    disk_only: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Options of `wrenn sandbox resume`.
#[derive(Debug, clap::Args)]
pub(crate) struct ResumeArgs {
    /// Which sandbox
    id: String,
    /// Boot it from its disk, without the memory it was saved with
    #[arg(long)]
    boot: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Pauses it.
pub(crate) async fn pause(args: &PauseArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let paused = with_spinner(
        &context.printer,
        "pausing",
        client.pause(&id, !args.disk_only),
    )
    .await?;
    show(&paused, args.output.json, context)
}

/// Resumes it.
pub(crate) async fn resume(args: &ResumeArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let resumed =
        with_spinner(&context.printer, "resuming", client.resume(&id, !args.boot)).await?;
    show(&resumed, args.output.json, context)
}

/// A sandbox as an operation left it: its id, or everything for programs.
pub(super) fn show(sandbox: &Value, json: bool, context: &Context) -> Result<Exit, Failure> {
    if json {
        context.printer.json(sandbox)?;
    } else {
        context
            .printer
            .line(sandbox["id"].as_str().unwrap_or_default());
    }
    Ok(Exit::Ok)
}
