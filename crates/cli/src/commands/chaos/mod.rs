//! `wrenn chaos`: kills this very program and its machines at every step of every operation, and
//! looks whether anything was lost, is left, or is not as it is said to be.
//!
//! ```text
//! for each case: a server of its own ─ sandbox ─ operation ✝ at a step ─▶ next server
//!                                                                        │
//!      the sandbox is what it was, another goes on counting, nothing is left ◀┘
//! ```

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
use plan::{Case, cases};
use trial::{Bed, Outcome};

/// Options of `wrenn chaos`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Try so many cases that the seed chooses, not all of them
    #[arg(long, value_name = "NUMBER")]
    sample: Option<u32>,
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
    let ground = Ground::lay(&context.settings, "chaos")?;
    let crash_file = ground.folder().join("crash-at");
    let mut bed = match Bed::make(ground, crash_file).await {
        Ok(bed) => bed,
        Err((ground, failure)) => {
            if let Err(left) = ground.clean().await {
                context.printer.warn(left.lines().0);
            }
            return Err(failure);
        }
    };
    let mut tried: Vec<Tried> = Vec::new();
    let mut signal = None;
    for case in cases(args.sample, args.seed) {
        let name = format!("{} at `{}`", case.operation.name(), case.step);
        context.printer.note(format!("{name} …"));
        let outcome = tokio::select! {
            outcome = bed.trial(case) => outcome,
            got = signals.next() => {
                signal = Some(got);
                break;
            }
        };
        let broken = outcome.is_err();
        tried.push((case, outcome));
        if broken {
            // What comes after would be tried on what that has left.
            break;
        }
    }
    let cleaned = bed.into_ground().clean().await;
    show(&tried, args.output.json, context)?;
    cleaned?;
    if let Some(signal) = signal {
        return Ok(Exit::Signal(signal));
    }
    match tried.pop() {
        Some((case, Err(failure))) => Err(failure.hint(format!(
            "{} was killed at `{}`",
            case.operation.name(),
            case.step
        ))),
        _ => Ok(Exit::Ok),
    }
}

fn show(tried: &[Tried], as_json: bool, context: &Context) -> Result<(), Failure> {
    if as_json {
        let one = |(case, outcome): &Tried| {
            json!({
                "operation": case.operation.name(),
                "killed_at": case.step,
                "outcome": outcome.as_ref().ok().map(|outcome| &outcome.what),
                "back_after_ms": outcome.as_ref().ok().and_then(|outcome| Some(outcome.back?.as_millis() as u64)),
                "broken": outcome.as_ref().err().map(|failure| failure.lines().0),
            })
        };
        let all: Vec<Value> = tried.iter().map(one).collect();
        return context.printer.json(&all);
    }
    let mut table = Table::new(["OPERATION", "KILLED AT", "OUTCOME", "BACK AFTER"]).right([3]);
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
            (case.step.to_owned(), Tone::Plain),
            (what, tone),
            (back, Tone::Dim),
        ]);
    }
    context.printer.table(table);
    Ok(())
}
