//! `wrenn sandbox inspect`.

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, duration};

use super::list::tone;

/// Options of `wrenn sandbox inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which sandbox
    id: String,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Shows it.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let id = client.find(&args.id).await?;
    let (sandbox, json) = client.get_sandbox(&id).await?;
    if args.output.json {
        context.printer.json(&json)?;
        return Ok(Exit::Ok);
    }
    let now = jiff::Timestamp::now();
    let mut table = Table::new([]);
    let mut row =
        |name: &str, value: String, tone| table.row([(name.to_owned(), Tone::Dim), (value, tone)]);
    row("id", sandbox.id, Tone::Plain);
    row("state", sandbox.status.clone(), tone(&sandbox.status));
    if let Some(reason) = sandbox.reason {
        row("because", reason, Tone::Plain);
    }
    row("template", sandbox.template, Tone::Plain);
    row(
        "size",
        format!("{} vCPU, {} MiB", sandbox.vcpus, sandbox.memory_mb),
        Tone::Plain,
    );
    let limit = match sandbox.timeout_sec {
        0 => "never".to_owned(),
        seconds => format!(
            "after {} without use",
            duration(std::time::Duration::from_secs(seconds.into()))
        ),
    };
    row("expires", limit, Tone::Plain);
    for (name, time) in [
        ("created", sandbox.created_at),
        ("last used", sandbox.last_active_at),
    ] {
        if let Some(time) = time {
            row(name, format!("{time} ({})", age(&time, now)), Tone::Plain);
        }
    }
    for (key, value) in sandbox.metadata.unwrap_or_default() {
        row("metadata", format!("{key}={value}"), Tone::Plain);
    }
    context.printer.table(table);
    Ok(Exit::Ok)
}
