//! `wrenn bench guest`: how fast and how small the guest agent is, as a plain process of
//! this machine, without a virtual machine around it.
//!
//! Each group of measurements has an agent of its own, so that none sees what another left
//! behind. Everything it makes is gone when it ends, whichever way it ends.

mod agent;
mod baseline;
mod client;
mod content;
mod files;
mod latency;
mod memory;
mod output;
mod requests;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use self::agent::{Agent, AgentError};
use self::client::CallError;
use super::report::{self, Phase, Unit, load_average};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::guest_programs::guest_programs;
use crate::signals::Signals;

/// Bytes of the program, at most.
const TARGET_SIZE: f64 = 8e6;
/// No phase takes longer, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Options of `wrenn bench guest`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often short phases are measured
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    n: u32,
    /// How often long phases are measured
    #[arg(long, default_value_t = 5, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Size of outputs and files
    #[arg(long, default_value_t = 1024, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    size: u64,
    /// How many idle streams are open at once
    #[arg(long, default_value_t = 1000, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    streams: u32,
    /// How many short programs an agent runs before its memory is measured again
    #[arg(long, default_value_t = 10_000, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    programs: u32,
    /// How many entries the directory has that is listed
    #[arg(long, default_value_t = 100_000, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    entries: u32,
    /// Folder for files, best on a tmpfs: a disk would be measured otherwise
    #[arg(long, value_name = "FOLDER", default_value = "/dev/shm")]
    folder: PathBuf,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Why a measurement failed.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error("the guest agent cannot be measured")]
    Agent(#[from] AgentError),
    #[error("a call to the guest agent failed")]
    Call(#[from] CallError),
    #[error("cannot use {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the measurement without an agent failed")]
    Baseline(#[source] io::Error),
    #[error("{0}")]
    Wrong(String),
    #[error("`{0}` was not done after {PATIENCE:?}")]
    Slow(&'static str),
}

/// Measures.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let program = guest_programs()?.envd;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
    let bench = Bench {
        args,
        context,
        program,
    };
    let before = load_average();
    let phases = tokio::select! {
        phases = bench.measure() => phases.map_err(|error| Failure::from_error(&error))?,
        // What was made ends with the measurement that made it.
        signal = signals.next() => return Ok(Exit::Signal(signal)),
    };
    let conditions = json!({
        "wrenn": crate::commands::version::VERSION,
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "transport": "HTTP/1.1 over loopback, client and agent on this machine",
        "folder": args.folder,
        "size_mib": args.size,
        "load_average_before": before,
    });
    report::show(&conditions, &phases, args.output.json, &context.printer)?;
    Ok(Exit::Ok)
}

struct Bench<'a> {
    args: &'a Args,
    context: &'a Context,
    program: &'static [u8],
}

impl Bench<'_> {
    async fn measure(&self) -> Result<Vec<Phase>, BenchError> {
        let mut phases = vec![Phase::new(
            "size of the program",
            Unit::Bytes,
            vec![self.program.len() as f64],
            Some(TARGET_SIZE),
        )];
        phases.push(self.within("memory of an idle agent", self.idle()).await?);
        phases.extend(self.within("start to end", self.start_to_end()).await?);
        phases.extend(self.within("key echo", self.echo()).await?);
        phases.extend(self.within("output", self.output()).await?);
        phases.extend(self.within("files", self.files()).await?);
        phases.extend(self.within("listing", self.listing()).await?);
        phases.extend(self.within("idle streams", self.streams()).await?);
        phases.extend(self.within("many programs", self.programs()).await?);
        Ok(phases)
    }

    /// One group of phases, announced and in bounds.
    async fn within<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T, BenchError>>,
    ) -> Result<T, BenchError> {
        self.context.printer.note(format!("{what} …"));
        tokio::time::timeout(PATIENCE, work)
            .await
            .map_err(|_| BenchError::Slow(what))?
    }

    async fn agent(&self) -> Result<Agent, BenchError> {
        Ok(Agent::start(self.program).await?)
    }

    fn bytes(&self) -> u64 {
        self.args.size << 20
    }

    /// A folder that is removed with all that is in it.
    fn scratch(&self) -> Result<TempDir, BenchError> {
        tempfile::Builder::new()
            .prefix("wrenn-bench-")
            .tempdir_in(&self.args.folder)
            .map_err(|source| self.file_error(&self.args.folder, source))
    }

    fn file_error(&self, path: &Path, source: io::Error) -> BenchError {
        BenchError::File {
            path: path.to_owned(),
            source,
        }
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
