//! `wrenn bench snapshot`: what saving, restoring and forking a sandbox takes.
//!
//! Measured from the outside, through the API. Every sandbox it makes it ends.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::ground::{Ground, conditions, ms};
use super::report::{self, Phase, Unit};
use crate::args::OutputArgs;
use crate::client::CreateRequest;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;

/// What the median of each phase should not exceed, on two cores without hardware
/// virtualisation and for an idle guest of 512 MiB: milliseconds, bytes.
const TARGET_PAUSE: f64 = 60.0;
const TARGET_RESUME: f64 = 350.0;
const TARGET_POOLED: f64 = 200.0;
const TARGET_FORK: f64 = 350.0;
const TARGET_FROZEN: f64 = 40.0;
const TARGET_TEN: f64 = 2000.0;
const TARGET_SIZE: f64 = (8 << 20) as f64;
/// So much longer a guest of four times the memory may take to pause.
const LARGER: f64 = 1.5;
/// A sandbox is idle once its start has died away.
const SETTLE: Duration = Duration::from_secs(2);
/// How long the pool may take to have a machine.
const POOL_PATIENCE: Duration = Duration::from_secs(30);
/// Written anew between two checkpoints, to state what that costs.
const DIRTIED_MIB: u32 = 100;

/// Options of `wrenn bench snapshot`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often each phase is measured
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    n: u32,
    /// Leave out the guest of 2 GiB, which takes a template of its own
    #[arg(long)]
    no_large: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Measures.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let host = client.host().await?;
    let mut ground = Ground::new(&client, context);
    let measured = ground.measure(async |ground| Bench { ground, args }.measure().await);
    let phases = match measured.await? {
        ControlFlow::Continue(phases) => phases,
        ControlFlow::Break(exit) => return Ok(exit),
    };
    let conditions = conditions(&host);
    report::show(&conditions, &phases, args.output.json, &context.printer)?;
    Ok(Exit::Ok)
}

struct Bench<'a, 'b> {
    ground: &'a mut Ground<'b>,
    args: &'a Args,
}

impl Bench<'_, '_> {
    async fn measure(&mut self) -> Result<Vec<Phase>, Failure> {
        let mut phases = Vec::new();
        self.pooled(&mut phases).await?;
        let small = self.create(None).await?;
        let pause = self.pauses(&small, &mut phases, "", TARGET_PAUSE).await?;
        self.forks(&small, &mut phases).await?;
        self.checkpoints(&small, &mut phases).await?;
        if !self.args.no_large {
            self.ground
                .say("a guest of 2 GiB: its template is booted first");
            let large = self.create(Some(2048)).await?;
            let target = pause * LARGER;
            self.pauses(&large, &mut phases, " (2 GiB guest)", target)
                .await?;
        }
        Ok(phases)
    }

    async fn create(&mut self, memory_mb: Option<u32>) -> Result<String, Failure> {
        let request = CreateRequest {
            memory_mb,
            ..self.ground.request()
        };
        let id = self.ground.create(&request).await?.sandbox.id;
        self.ground.shell(&id).await?;
        tokio::time::sleep(SETTLE).await;
        Ok(id)
    }

    /// The same as a resume to its first program's end, of the template and from the pool.
    async fn pooled(&mut self, phases: &mut Vec<Phase>) -> Result<(), Failure> {
        self.ground
            .say(&format!("{} sandboxes of the pool", self.args.n));
        let mut took = Vec::new();
        for _ in 0..self.args.n {
            let asked = Instant::now();
            while self.ground.client.host().await?.pool_ready == 0
                && asked.elapsed() < POOL_PATIENCE
            {
                tokio::time::sleep(SETTLE / 10).await;
            }
            tokio::time::sleep(SETTLE).await;
            let began = Instant::now();
            let request = self.ground.request();
            let id = self.ground.create(&request).await?.sandbox.id;
            self.ground.shell(&id).await?;
            took.push(ms(began));
            self.ground.clean().await;
        }
        phases.push(Phase::new(
            "template to bash -l -c true's end",
            Unit::Milliseconds,
            took,
            Some(TARGET_POOLED),
        ));
        Ok(())
    }

    /// Pauses and resumes, the guest idle in between; gives the median pause.
    async fn pauses(
        &mut self,
        id: &str,
        phases: &mut Vec<Phase>,
        of: &str,
        target: f64,
    ) -> Result<f64, Failure> {
        self.ground
            .say(&format!("{} pauses and resumes{of}", self.args.n));
        let (mut pause, mut resume, mut output) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.args.n {
            tokio::time::sleep(SETTLE).await;
            let began = Instant::now();
            self.ground.client.pause(id, true).await?;
            pause.push(ms(began));
            let began = Instant::now();
            self.ground.client.resume(id, true).await?;
            resume.push(ms(began));
            self.ground.shell(id).await?;
            output.push(ms(began));
        }
        let phase = |name: &str, values, target| {
            Phase::new(format!("{name}{of}"), Unit::Milliseconds, values, target)
        };
        let pause = phase("pause", pause, Some(target));
        let median = pause.sample.median().unwrap_or_default();
        phases.extend([
            pause,
            phase("resume", resume, None),
            phase(
                "resume to bash -l -c true's end",
                output,
                Some(TARGET_RESUME),
            ),
        ]);
        Ok(median)
    }

    async fn forks(&mut self, id: &str, phases: &mut Vec<Phase>) -> Result<(), Failure> {
        self.ground
            .say(&format!("{} forks of one child, then of ten", self.args.n));
        let (mut one, mut frozen) = (Vec::new(), Vec::new());
        for _ in 0..self.args.n {
            tokio::time::sleep(SETTLE).await;
            let began = Instant::now();
            let steps = self.fork(id, 1).await?;
            one.push(ms(began));
            let stood = steps.iter().find(|(name, _)| name == "frozen");
            frozen.extend(stood.map(|(_, took)| took.as_secs_f64() * 1000.0));
            self.end_children(id).await;
        }
        let began = Instant::now();
        self.fork(id, 10).await?;
        let ten = ms(began);
        self.end_children(id).await;
        let phase = |name, values, target| Phase::new(name, Unit::Milliseconds, values, target);
        phases.extend([
            phase("fork of one child", one, Some(TARGET_FORK)),
            phase("  its parent frozen", frozen, Some(TARGET_FROZEN)),
            phase("fork of ten children", vec![ten], Some(TARGET_TEN)),
        ]);
        Ok(())
    }

    async fn fork(&mut self, id: &str, count: u32) -> Result<Vec<(String, Duration)>, Failure> {
        let (children, steps) = self.ground.client.fork(id, count).await?;
        for child in children {
            match child["id"].as_str() {
                Some(child) => self.ground.made.push(child.to_owned()),
                None => return Err(Failure::message(format!("a child of {id}: {child}"))),
            }
        }
        Ok(steps)
    }

    async fn end_children(&mut self, parent: &str) {
        let (parents, children): (Vec<_>, Vec<_>) = std::mem::take(&mut self.ground.made)
            .into_iter()
            .partition(|id| id == parent);
        self.ground.made = children;
        self.ground.clean().await;
        self.ground.made = parents;
    }

    /// What a checkpoint takes on disk and in time, idle and after much was written.
    async fn checkpoints(&mut self, id: &str, phases: &mut Vec<Phase>) -> Result<(), Failure> {
        self.ground.say(&format!(
            "checkpoints, idle and with {DIRTIED_MIB} MiB written anew"
        ));
        let mut sizes = Vec::new();
        for written in [0, 0, DIRTIED_MIB] {
            if written > 0 {
                let line = format!("head -c {written}M /dev/urandom > /dev/shm/dirt");
                self.ground.exec(id, "bash", &["-c", &line]).await?;
            } else {
                tokio::time::sleep(SETTLE).await;
            }
            let began = Instant::now();
            let point = self.ground.client.checkpoint(id, None).await?;
            sizes.push((ms(began), size(&point)));
        }
        // A checkpoint shares with the one before it all that it did not write itself.
        let [(_, first), (idle, second), (dirty, third)] = sizes[..] else {
            return Ok(());
        };
        let added = |now: f64, before: f64| vec![(now - before).max(0.0)];
        phases.extend([
            Phase::new("checkpoint, idle", Unit::Milliseconds, vec![idle], None),
            Phase::new(
                "  on disk",
                Unit::Bytes,
                added(second, first),
                Some(TARGET_SIZE),
            ),
            Phase::new(
                format!("checkpoint, {DIRTIED_MIB} MiB written"),
                Unit::Milliseconds,
                vec![dirty],
                None,
            ),
            Phase::new("  on disk", Unit::Bytes, added(third, second), None),
        ]);
        Ok(())
    }
}

fn size(point: &Value) -> f64 {
    point["size_bytes"].as_f64().unwrap_or_default()
}
