//! `wrenn snapshot …`: templates made of sandboxes.

use serde_json::json;

use super::Context;
use crate::args::OutputArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, bytes, with_spinner};

/// The commands about snapshots.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Make a template of a sandbox, which goes on, and print its name
    Create(CreateArgs),
    /// List the templates that are snapshots
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Delete a template; sandboxes made from it live on
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

/// Options of `wrenn snapshot create`.
#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    /// Which sandbox
    id: String,
    /// What to call it [default: made up]
    #[arg(long)]
    name: Option<String>,
    /// Take the name from the template that has it
    #[arg(long, requires = "name")]
    overwrite: bool,
    /// Without its memory: what is made of it boots
    #[arg(long)]
    disk_only: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Options of `wrenn snapshot list`.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// Options of `wrenn snapshot delete`.
#[derive(Debug, clap::Args)]
pub(crate) struct DeleteArgs {
    /// Which template
    name: String,
    #[command(flatten)]
    output: OutputArgs,
}

impl Command {
    /// Whether errors go out as JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Create(args) => args.output.json,
            Command::List(args) => args.output.json,
            Command::Delete(args) => args.output.json,
        }
    }

    /// Does it.
    pub(crate) async fn run(&self, context: &Context) -> Result<Exit, Failure> {
        match self {
            Command::Create(args) => create(args, context).await,
            Command::List(args) => list(args, context).await,
            Command::Delete(args) => delete(args, context).await,
        }
    }
}

async fn create(args: &CreateArgs, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let name = args.name.as_deref();
    let make = client.create_snapshot(&id, name, args.overwrite, !args.disk_only);
    let made = with_spinner(&context.printer, "taking a snapshot", make).await?;
    if args.output.json {
        context.printer.json(&made)?;
    } else {
        context
            .printer
            .line(made["name"].as_str().unwrap_or_default());
    }
    Ok(Exit::Ok)
}

async fn list(args: &ListArgs, context: &Context) -> Result<Exit, Failure> {
    let all = context.client()?.snapshots().await?;
    if args.output.json {
        context.printer.json(&all)?;
    } else if all.is_empty() {
        context
            .printer
            .note("no snapshots: `wrenn snapshot create` makes one of a sandbox");
    } else {
        let now = jiff::Timestamp::now();
        let mut table = Table::new(["NAME", "VCPU", "MEMORY", "SIZE", "TAKEN"]).right([1, 2, 3]);
        for one in &all {
            let taken = one["created_at"].as_str().unwrap_or_default();
            table.row([
                (
                    one["name"].as_str().unwrap_or_default().to_owned(),
                    Tone::Plain,
                ),
                (one["vcpus"].to_string(), Tone::Plain),
                (format!("{} MiB", one["memory_mb"]), Tone::Plain),
                (bytes(one["size_bytes"].as_u64().unwrap_or(0)), Tone::Plain),
                (age(taken, now), Tone::Dim),
            ]);
        }
        context.printer.table(table);
    }
    Ok(Exit::Ok)
}

async fn delete(args: &DeleteArgs, context: &Context) -> Result<Exit, Failure> {
    context.client()?.delete_snapshot(&args.name).await?;
    if args.output.json {
        context.printer.json(&json!({ "deleted": args.name }))?;
    } else {
        context.printer.line(&args.name);
    }
    Ok(Exit::Ok)
}
