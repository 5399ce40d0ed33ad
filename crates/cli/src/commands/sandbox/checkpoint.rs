//! `wrenn sandbox checkpoint`, `checkpoints` and `rollback`.

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, bytes, with_spinner};

/// Options of `wrenn sandbox checkpoint`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    /// What to call it [default: made up]
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Takes it and prints its name.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let take = client.checkpoint(&id, args.name.as_deref());
    let taken = with_spinner(&context.printer, "taking a checkpoint", take).await?;
    if args.output.json {
        context.printer.json(&taken)?;
    } else {
        context
            .printer
            .line(taken["name"].as_str().unwrap_or_default());
    }
    Ok(Exit::Ok)
}

/// Options of `wrenn sandbox checkpoints`.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Which sandbox
    id: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Lists them, the newest first.
pub(crate) async fn list(args: &ListArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let all = client.checkpoints(&id).await?;
    if args.output.json {
        context.printer.json(&all)?;
    } else if all.is_empty() {
        context
            .printer
            .note("no checkpoints: `wrenn sandbox checkpoint` takes one");
    } else {
        let now = jiff::Timestamp::now();
        let mut table = Table::new(["NAME", "SIZE", "TAKEN"]).right([1]);
        for one in &all {
            let taken = one["created_at"].as_str().unwrap_or_default();
            table.row([
                (
                    one["name"].as_str().unwrap_or_default().to_owned(),
                    Tone::Plain,
                ),
                (bytes(one["size_bytes"].as_u64().unwrap_or(0)), Tone::Plain),
                (age(taken, now), Tone::Dim),
            ]);
        }
        context.printer.table(table);
    }
    Ok(Exit::Ok)
}

/// Options of `wrenn sandbox rollback`.
#[derive(Debug, clap::Args)]
pub(crate) struct RollbackArgs {
    /// Which sandbox
    id: String,
    /// Name of one of its checkpoints
    checkpoint: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Puts it back.
pub(crate) async fn rollback(args: &RollbackArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let back = client.rollback(&id, &args.checkpoint);
    let back = with_spinner(&context.printer, "rolling back", back).await?;
    super::pause::show(&back, args.output.json, context)
}
