//! `wrenn sandbox list`.

use serde_json::Value;

use crate::args::OutputArgs;
use crate::client::Sandbox;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Table, Tone, age, with_spinner};

/// Options of `wrenn sandbox list`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only those in this state, such as `running`; `all` also shows those that have ended
    #[arg(long)]
    state: Option<String>,
    /// Only the ids, one a line
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Lists them, the oldest first.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let state = args.state.as_deref();
    let filter: Vec<_> = state.map(|state| ("state", state)).into_iter().collect();
    let mut all = with_spinner(
        &context.printer,
        "asking the server",
        client.list_sandboxes(&filter),
    )
    .await?;
    // Ids start with the time of their making.
    all.sort_by(|(a, _), (b, _)| a.id.cmp(&b.id));
    let printer = &context.printer;
    if args.output.json {
        let values: Vec<&Value> = all.iter().map(|(_, json)| json).collect();
        printer.json(&values)?;
    } else if args.quiet {
        for (sandbox, _) in &all {
            printer.line(&sandbox.id);
        }
    } else if all.is_empty() {
        printer.note(match state.filter(|state| *state != "all") {
            Some(state) => format!("no sandbox is {state}"),
            None => "no sandboxes: `wrenn sandbox create` makes one".to_owned(),
        });
    } else {
        printer.table(table(all.iter().map(|(sandbox, _)| sandbox)));
    }
    Ok(Exit::Ok)
}

fn table<'a>(sandboxes: impl Iterator<Item = &'a Sandbox>) -> Table {
    let now = jiff::Timestamp::now();
    let mut table = Table::new([
        "ID",
        "STATE",
        "TEMPLATE",
        "VCPU",
        "MEMORY",
        "CREATED",
        "LAST USED",
    ])
    .right([3, 4]);
    for sandbox in sandboxes {
        let time = |time: &Option<String>| {
            time.as_deref()
                .map(|time| age(time, now))
                .unwrap_or_default()
        };
        table.row([
            (sandbox.id.clone(), Tone::Plain),
            (sandbox.status.clone(), tone(&sandbox.status)),
            (sandbox.template.clone(), Tone::Plain),
            (sandbox.vcpus.to_string(), Tone::Plain),
            (format!("{} MiB", sandbox.memory_mb), Tone::Plain),
            (time(&sandbox.created_at), Tone::Dim),
            (time(&sandbox.last_active_at), Tone::Dim),
        ]);
    }
    table
}

/// How a state looks.
pub(super) fn tone(state: &str) -> Tone {
    match state {
        "running" => Tone::Good,
        "error" | "missing" => Tone::Bad,
        "paused" | "stopped" => Tone::Dim,
        // Everything else passes.
        _ => Tone::Doubtful,
    }
}
