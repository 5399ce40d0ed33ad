//! `wrenn drain`: the host starts nothing any more, and is emptied if that is asked for.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Context;
use crate::args::OutputArgs;
use crate::client::{Client, ClientError};
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Printer, Table, Tone, age, sandboxes};

/// How often to look how many still run.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Options of `wrenn drain`.
///
/// Until `wrenn drain --off`, restarts included, no sandbox is created, forked or resumed on
/// this host. Those that run go on, unless --pause.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Pause those that run
    #[arg(long, conflicts_with_all = ["wait", "off"])]
    pause: bool,
    /// Wait until none runs any more, at most so many seconds; the exit code is 124 if some still do
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, conflicts_with = "off")]
    wait: Option<Option<u64>>,
    /// Start sandboxes again
    #[arg(long)]
    off: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// What came of it.
#[derive(Debug, Default)]
struct Drained {
    since: Option<String>,
    paused: Vec<String>,
    failed: Vec<Value>,
    running: Vec<String>,
}

/// Drains the host, or ends that.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let printer = &context.printer;
    let since = client.set_draining(!args.off).await?;
    let mut drained = Drained {
        since,
        ..Drained::default()
    };
    if args.pause {
        let all = pause_all(&client, printer).await?;
        drained.paused = all.paused;
        drained.failed = all.failed;
    }
    if let Some(limit) = args.wait {
        wait(&client, printer, limit.map(Duration::from_secs)).await?;
    }
    drained.running = running(&client).await?;
    drained.show(args, printer)
}

impl Drained {
    fn show(&self, args: &Args, printer: &Printer) -> Result<Exit, Failure> {
        if args.output.json {
            printer.json(&json!({
                "draining_since": self.since,
                "paused": self.paused,
                "failed": self.failed,
                "running": self.running,
            }))?;
        } else {
            self.table(printer);
        }
        Ok(if !self.failed.is_empty() {
            Exit::Failed
        } else if args.wait.is_some() && !self.running.is_empty() {
            Exit::TimedOut
        } else {
            Exit::Ok
        })
    }

    fn table(&self, printer: &Printer) {
        printer.line(match &self.since {
            Some(since) => format!(
                "this host drains ({}): it starts no sandboxes until `wrenn drain --off`",
                age(since, jiff::Timestamp::now())
            ),
            None => "this host starts sandboxes".to_owned(),
        });
        let mut table = Table::new(["SANDBOX", "", "WHY"]);
        let mut row = |id: &str, word: &str, tone, why: &str| {
            table.row([
                (id.to_owned(), Tone::Plain),
                (word.to_owned(), tone),
                (why.to_owned(), Tone::Dim),
            ]);
        };
        for id in &self.paused {
            row(id, "paused", Tone::Good, "");
        }
        let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
        for failed in &self.failed {
            let why = text(failed, "message");
            row(&text(failed, "id"), "not paused", Tone::Bad, &why);
        }
        let told = |id: &String| self.failed.iter().any(|failed| failed["id"] == id.as_str());
        if self.since.is_some() {
            for id in self.running.iter().filter(|id| !told(id)) {
                row(id, "runs", Tone::Doubtful, "");
            }
        }
        printer.table(table);
        if self.since.is_some() && self.running.is_empty() {
            printer.line("nothing runs on it");
        }
    }
}

/// What the server says it paused, and what it could not.
pub(super) struct Paused {
    /// Ids.
    pub(super) paused: Vec<String>,
    /// An id, a code and a message each.
    pub(super) failed: Vec<Value>,
}

/// Pauses all that runs, and tells meanwhile how many still do.
pub(super) async fn pause_all(client: &Client, printer: &Printer) -> Result<Paused, ClientError> {
    let mut left = None;
    let mut pausing = std::pin::pin!(client.pause_all());
    let done = loop {
        tokio::select! {
            done = &mut pausing => break done?,
            () = tokio::time::sleep(LOOK_EVERY) => {
                // Only to tell; what counts is the answer.
                if let Ok(running) = running(client).await {
                    tell(printer, &mut left, running.len());
                }
            }
        }
    };
    let ids = done["paused"].as_array().into_iter().flatten();
    Ok(Paused {
        paused: ids
            .filter_map(|id| id.as_str().map(str::to_owned))
            .collect(),
        failed: done["failed"].as_array().cloned().unwrap_or_default(),
    })
}

/// Waits until nothing runs, or for so long.
async fn wait(
    client: &Client,
    printer: &Printer,
    limit: Option<Duration>,
) -> Result<(), ClientError> {
    let begun = Instant::now();
    let mut left = None;
    loop {
        let running = running(client).await?;
        if running.is_empty() {
            return Ok(());
        }
        tell(printer, &mut left, running.len());
        let rest = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
        if rest == Some(Duration::ZERO) {
            return Ok(());
        }
        tokio::time::sleep(rest.map_or(LOOK_EVERY, |rest| rest.min(LOOK_EVERY))).await;
    }
}

/// Says how many run, when it is another number than before.
fn tell(printer: &Printer, before: &mut Option<usize>, now: usize) {
    if before.replace(now) != Some(now) {
        printer.note(format!("{} left", sandboxes(now)));
    }
}

/// Whether a sandbox in this state has a machine, or is about to. A state that a newer server
/// may have counts.
fn occupies(status: &str) -> bool {
    !matches!(status, "paused" | "missing" | "stopped" | "error")
}

/// Those that have a machine.
pub(super) async fn running(client: &Client) -> Result<Vec<String>, ClientError> {
    let all = client.list_sandboxes(&[]).await?.into_iter();
    let running = all.filter(|(sandbox, _)| occupies(&sandbox.status));
    Ok(running.map(|(sandbox, _)| sandbox.id).collect())
}
