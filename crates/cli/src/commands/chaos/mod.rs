//! `wrenn chaos`: kills this very program and its machines at every step of every operation, has
//! its disk be full or slow, and looks whether anything was lost, is left, or is not as it is said
//! to be.
//!
//! ```text
//! for each case: a server of its own ─ sandbox ─ operation ✝ at a step ─▶ next server, or on a
//!                                                                        │ disk with room
//!                                                                        │
//!      the sandbox is what it was, another goes on counting, nothing is left ◀┘
//! ```

mod disk;
mod plan;
mod trial;

use serde_json::{Value, json};

use crate::args::OutputArgs;
use crate::commands::Context;
use crate::commands::own_server::Ground;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::output::{Table, Tone, milliseconds};
use crate::signals::Signals;
use disk::SmallDisk;
use plan::{Case, Harm, cases};
use trial::{Bed, Given, Outcome};

/// Options of `wrenn chaos`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Try so many cases that the seed chooses, not all of them
    #[arg(long, value_name = "NUMBER")]
    sample: Option<u32>,
    /// Only cases whose name holds this, such as "fork, killed" or "disk full at `commit`"
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    only: String,
    /// What chooses the sample
    #[arg(long, value_name = "NUMBER", default_value_t = 1, requires = "sample")]
    seed: u64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

type Tried = (Case, Result<Outcome, Failure>);

/// Tries the cases.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    require_root("killing machines")?;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
    let mut tried: Vec<Tried> = Vec::new();
    let mut signal = None;
    let mut cleaned = Ok(());
    // Those that harm the disk come last, and have one of their own.
    let cases = cases(&args.only, args.sample, args.seed);
    if cases.is_empty() {
        return Err(Failure::usage(format!("no case is called {:?}", args.only)));
    }
    for cases in cases.chunk_by(|a, b| (a.harm == Harm::Kill) == (b.harm == Harm::Kill)) {
        let kills = cases.iter().any(|case| case.harm == Harm::Kill);
        let mut bed = make(context, kills).await?;
        for case in cases {
            context.printer.note(format!("{case} …"));
            let outcome = tokio::select! {
                outcome = bed.trial(*case) => outcome,
                got = signals.next() => {
                    signal = Some(got);
                    break;
                }
            };
            let broken = outcome.is_err();
            tried.push((*case, outcome));
            if broken {
                context.printer.warn(bed.end_of_log());
                // What comes after would be tried on what that has left.
                break;
            }
        }
        cleaned = give_back(bed.into_given()).await;
        let broken = tried.last().is_some_and(|(_, outcome)| outcome.is_err());
        if signal.is_some() || broken || cleaned.is_err() {
            break;
        }
    }
    show(&tried, args.output.json, context)?;
    cleaned?;
    if let Some(signal) = signal {
        return Ok(Exit::Signal(signal));
    }
    match tried.pop() {
        Some((case, Err(failure))) => Err(failure.hint(format!("it was tried: {case}"))),
        _ => Ok(Exit::Ok),
    }
}

/// A server to be killed, or one whose disk can be harmed.
async fn make(context: &Context, kills: bool) -> Result<Bed, Failure> {
    let settings = &context.settings;
    let given = match kills {
        true => (Ground::lay(settings, "chaos")?, None),
        false => {
            let disk = SmallDisk::make(&settings.data_dir)?;
            match Ground::lay_at(settings, disk.folder().join("d")) {
                Ok(ground) => (ground, Some(disk)),
                Err(failure) => {
                    warn_of(disk.remove(), context);
                    return Err(failure);
                }
            }
        }
    };
    match Bed::make(given.0, given.1).await {
        Ok(bed) => Ok(bed),
        Err((given, failure)) => {
            warn_of(give_back(given).await, context);
            Err(failure)
        }
    }
}

async fn give_back((ground, disk): Given) -> Result<(), Failure> {
    ground.clean().await?;
    disk.map_or(Ok(()), SmallDisk::remove)
}

/// What could not be cleaned does not hide why it came to that.
fn warn_of(cleaned: Result<(), Failure>, context: &Context) {
    if let Err(left) = cleaned {
        context.printer.warn(left.lines().0);
    }
}

fn show(tried: &[Tried], as_json: bool, context: &Context) -> Result<(), Failure> {
    if as_json {
        let one = |(case, outcome): &Tried| {
            json!({
                "operation": case.operation.name(),
                "harm": case.harm.name(),
                "at": case.step,
                "outcome": outcome.as_ref().ok().map(|outcome| &outcome.what),
                "back_after_ms": outcome.as_ref().ok().and_then(|outcome| Some(outcome.back?.as_millis() as u64)),
                "broken": outcome.as_ref().err().map(|failure| failure.lines().0),
            })
        };
        let all: Vec<Value> = tried.iter().map(one).collect();
        return context.printer.json(&all);
    }
    let mut table = Table::new(["OPERATION", "HARM", "AT", "OUTCOME", "BACK AFTER"]).right([4]);
    for (case, outcome) in tried {
        let (what, tone, back) = match outcome {
            Ok(outcome) => (
                outcome.what.clone(),
                Tone::Good,
                outcome.back.map(milliseconds).unwrap_or_default(),
            ),
            Err(failure) => (failure.lines().0.to_owned(), Tone::Bad, String::new()),
        };
        table.row([
            (case.operation.name().to_owned(), Tone::Plain),
            (case.harm.name().to_owned(), Tone::Plain),
            (case.step.to_owned(), Tone::Plain),
            (what, tone),
            (back, Tone::Dim),
        ]);
    }
    context.printer.table(table);
    Ok(())
}
