//! `wrenn bench host`: what the host agent costs, and how fast the next one takes over.
//!
//! Runs a server of its own, in a folder beside the image of the data folder, and kills it on the
//! way; needs root, and no server.

mod slots;

use std::fs;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::json;

use super::machine;
use super::report::{self, Phase, Unit, load_average};
use crate::args::OutputArgs;
use crate::client::{Client, CreateRequest};
use crate::commands::Context;
use crate::commands::own_server::Ground;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::signals::Signals;

/// Milliseconds, bytes.
const TARGET_JOURNAL: f64 = 3.0;
const TARGET_ADOPTION: f64 = 2000.0;
const TARGET_AGENT: f64 = (40 << 20) as f64;
/// Creates under way at once.
const AT_ONCE: usize = 4;
/// A host is idle once its creates have died away, and what they freed was given back.
const SETTLE: Duration = Duration::from_secs(25);
/// Restarts that are measured.
const RESTARTS: usize = 3;

/// Options of `wrenn bench host`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Sandboxes that the next agent takes over
    #[arg(long, default_value_t = 50, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=500))]
    adopt: u32,
    /// Sandboxes for which the agent's memory is measured
    #[arg(long, default_value_t = 100, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000))]
    idle: u32,
    /// Network slots that are made
    #[arg(long, default_value_t = 200, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=2000))]
    slots: u32,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Measures.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    require_root("measuring a host")?;
    let mut signals = Signals::listen()
        .map_err(|error| Failure::message(format!("cannot listen for signals: {error}")))?;
    let ground = Ground::lay(&context.settings, "bench")?;
    let outcome = tokio::select! {
        outcome = measure(args, context, &ground) => outcome.map(Ok),
        signal = signals.next() => Ok(Err(signal)),
    };
    let cleaned = ground.clean().await;
    let (phases, host) = match outcome? {
        Ok(measured) => measured,
        Err(signal) => return Ok(Exit::Signal(signal)),
    };
    cleaned?;
    let conditions = json!({
        "wrenn": crate::commands::version::VERSION,
        "vmm": host.0,
        "accelerator": host.1,
        "adopted": args.adopt,
        "load_average": load_average(),
    });
    report::show(&conditions, &phases, args.output.json, &context.printer)?;
    Ok(Exit::Ok)
}

async fn measure(
    args: &Args,
    context: &Context,
    ground: &Ground,
) -> Result<(Vec<Phase>, (String, String)), Failure> {
    let say = |what: &str| context.printer.note(format!("{what} …"));
    say("network slots");
    let mut phases = slots::measure(&ground.folder().join("slots"), args.slots as usize).await?;

    say("restarts with nothing to take over");
    let mut server = ground.start_with(0).await?;
    let mut alone = Vec::new();
    for _ in 0..RESTARTS {
        server.kill().await?;
        let began = Instant::now();
        server = ground.start_with(0).await?;
        alone.push(ms(began));
    }

    say(&format!("{} sandboxes", args.adopt));
    let host = server.client.host().await?;
    let mut journal = Vec::new();
    fill(&server.client, args.adopt, &mut journal).await?;
    let mut adopting = Vec::new();
    for _ in 0..RESTARTS {
        server.kill().await?;
        let began = Instant::now();
        server = ground.start_with(args.adopt as usize).await?;
        adopting.push(ms(began));
    }
    let base = median(&alone);
    let adoption = adopting.iter().map(|took| (took - base).max(0.0));

    if args.idle > args.adopt {
        say(&format!("{} more", args.idle - args.adopt));
        fill(&server.client, args.idle - args.adopt, &mut journal).await?;
    }
    tokio::time::sleep(SETTLE).await;
    let memory = Memory::of(server.pid()?)?;
    let keepers = machine::keepers(ground.folder()).map_err(|e| Failure::from_error(&e))?;
    server.kill().await?;
    let phase = |name: String, values, target| Phase::new(name, Unit::Milliseconds, values, target);
    phases.extend([
        phase("journal, of a create".into(), journal, Some(TARGET_JOURNAL)),
        phase("restart with no sandbox".into(), alone, None),
        phase(
            format!("restart with {} sandboxes", args.adopt),
            adopting.clone(),
            None,
        ),
        phase(
            format!("  of it, adoption of {}", args.adopt),
            adoption.collect(),
            Some(TARGET_ADOPTION),
        ),
        Phase::new(
            format!(
                "server's memory with {} sandboxes",
                args.idle.max(args.adopt)
            ),
            Unit::Bytes,
            vec![memory.resident],
            Some(TARGET_AGENT),
        ),
        Phase::new("  of it, its own", Unit::Bytes, vec![memory.own], None),
        Phase::new(
            "  of it, its program file",
            Unit::Bytes,
            vec![memory.resident - memory.own],
            None,
        ),
        Phase::new("a keeper's own memory", Unit::Bytes, keepers, None),
    ]);
    let vmm = format!("{} {}", host.vmm, host.vmm_version);
    Ok((phases, (vmm, host.accelerator)))
}

/// Makes sandboxes, and notes what their agent took to write each down.
async fn fill(client: &Client, count: u32, journal: &mut Vec<f64>) -> Result<(), Failure> {
    let request = CreateRequest::default();
    let creates = (0..count).map(|_| client.create(&request));
    let mut made = futures::stream::iter(creates).buffer_unordered(AT_ONCE);
    while let Some(created) = made.next().await {
        let phases = created?.phases;
        let wrote = phases.iter().filter(|(name, _)| name == "journal");
        journal.extend(wrote.map(|(_, took)| took.as_secs_f64() * 1000.0));
    }
    Ok(())
}

/// Memory of a process in bytes.
struct Memory {
    /// All that is mapped, files included, which other processes share.
    resident: f64,
    /// What no file is behind.
    own: f64,
}

impl Memory {
    fn of(pid: u32) -> Result<Memory, Failure> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        let status = status.map_err(|e| Failure::from_error(&e))?;
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            kib.map(|kib| (kib << 10) as f64)
                .ok_or_else(|| Failure::message("/proc/PID/status is not as proc(5) says"))
        };
        Ok(Memory {
            resident: bytes("VmRSS:")?,
            own: bytes("RssAnon:")?,
        })
    }
}

fn median(values: &[f64]) -> f64 {
    super::statistics::Sample::new(values.to_vec())
        .median()
        .unwrap_or_default()
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
