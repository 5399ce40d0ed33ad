//! `wrenn bench start`: how fast sandboxes start, and what they cost while idle.
//!
//! Measured from the outside, through the API, as any client sees it. Every sandbox it
//! makes it ends, whichever way it ends itself.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};

use super::ground::{Ground, command, conditions, ms};
use super::machine;
use super::report::{self, Phase, Unit};
use crate::args::OutputArgs;
use crate::client::{Client, ClientError, Command, CreateRequest, ExecEvent};
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Table;

/// What is said of a sandbox where nothing else is.
const DEFAULT_TEMPLATE: &str = "minimal";
/// What the median of each phase should not exceed, on two cores without hardware
/// virtualisation: milliseconds, bytes, percent of a core.
const TARGET_COLD_BOOT: f64 = 6000.0;
const TARGET_CREATE: f64 = 300.0;
const TARGET_FIRST_OUTPUT: f64 = 450.0;
const TARGET_PYTHON: f64 = 700.0;
const TARGET_MEMORY: f64 = (50 << 20) as f64;
const TARGET_CPU: f64 = 1.5;
/// A sandbox is idle once its start has died away.
const SETTLE: Duration = Duration::from_secs(5);

/// Options of `wrenn bench start`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How often each phase is measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    n: u32,
    /// How many sandboxes are made at once
    #[arg(long, default_value_t = 20, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=500))]
    at_once: u32,
    /// Template to start from
    #[arg(long, value_name = "NAME", default_value = DEFAULT_TEMPLATE)]
    template: String,
    /// Wait between two measurements, in which the pool may fill up again
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pause: u64,
    /// How long idle sandboxes are watched
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    idle: u64,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Everything that was measured.
#[derive(Debug, Default)]
struct Results {
    phases: Vec<Phase>,
    /// Where the server's time went while creating, in its order.
    server: Vec<Phase>,
    failures: Vec<String>,
}

/// Measures.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let client = context.client()?;
    let host = client.host().await?;
    let mut ground = Ground::new(&client, context);
    let measured = ground.measure(async |ground| Bench { ground, args }.measure().await);
    let results = match measured.await? {
        ControlFlow::Continue(results) => results,
        ControlFlow::Break(exit) => return Ok(exit),
    };
    let mut conditions = conditions(&host);
    conditions["template"] = json!(args.template);
    conditions["pool_ready_at_start"] = json!(host.pool_ready);
    conditions["pause_ms"] = json!(args.pause);
    if args.output.json {
        context.printer.json(&json!({
            "conditions": conditions,
            "phases": results.phases.iter().map(Phase::to_json).collect::<Vec<_>>(),
            "server_timing": results.server.iter().map(Phase::to_json).collect::<Vec<_>>(),
            "failures": results.failures,
        }))?;
    } else {
        show(&results, &conditions, context);
    }
    if results.failures.is_empty() {
        Ok(Exit::Ok)
    } else {
        Err(Failure::message(format!(
            "{} sandboxes did not work: {}",
            results.failures.len(),
            results.failures[0]
        )))
    }
}

/// A run of measurements.
struct Bench<'a, 'b> {
    ground: &'a mut Ground<'b>,
    args: &'a Args,
}

impl Bench<'_, '_> {
    async fn measure(&mut self) -> Result<Results, Failure> {
        let mut results = Results::default();
        results.phases.push(self.cold_boot());
        self.one_by_one(&mut results).await?;
        self.at_once(&mut results).await;
        self.idle(&mut results).await;
        Ok(results)
    }

    fn request(&self) -> CreateRequest {
        CreateRequest {
            template: Some(self.args.template.clone()),
            ..self.ground.request()
        }
    }

    fn cold_boot(&self) -> Phase {
        let (name, target) = ("cold boot of the template", Some(TARGET_COLD_BOOT));
        match machine::cold_boots(self.ground.client.data_dir(), &self.args.template) {
            Ok(boots) if !boots.is_empty() => Phase::new(name, Unit::Milliseconds, boots, target),
            Ok(_) => Phase::missing(
                name,
                Unit::Milliseconds,
                target,
                "no template has it in its manifest".to_owned(),
            ),
            Err(error) => Phase::missing(name, Unit::Milliseconds, target, on_the_host(&error)),
        }
    }

    /// One sandbox after the other: for bash, then for Python, each in a fresh one.
    async fn one_by_one(&mut self, results: &mut Results) -> Result<(), Failure> {
        self.ground.say(&format!(
            "{} sandboxes one by one, a shell in each",
            self.args.n
        ));
        let (mut create, mut exec, mut first_output) = (Vec::new(), Vec::new(), Vec::new());
        let mut server: BTreeMap<(usize, String), Vec<f64>> = BTreeMap::new();
        for _ in 0..self.args.n {
            let started = Instant::now();
            let created = self.ground.create(&self.request()).await?;
            let id = created.sandbox.id;
            create.push(ms(started));
            let before = Instant::now();
            self.ground.shell(&id).await?;
            exec.push(ms(before));
            first_output.push(ms(started));
            for (place, (phase, took)) in created.phases.into_iter().enumerate() {
                server
                    .entry((place, phase))
                    .or_default()
                    .push(took.as_secs_f64() * 1000.0);
            }
            self.end(&id).await?;
        }
        self.ground.say(&format!(
            "{} sandboxes one by one, Python in each",
            self.args.n
        ));
        let mut python = Vec::new();
        for _ in 0..self.args.n {
            let created = self.ground.create(&self.request()).await?;
            let id = created.sandbox.id;
            let before = Instant::now();
            first_line(
                self.ground.client,
                &id,
                &command("python3", &["-c", "print(1)"]),
            )
            .await?;
            python.push(ms(before));
            self.end(&id).await?;
        }
        let phase =
            |name: &str, values, target| Phase::new(name, Unit::Milliseconds, values, target);
        results.phases.extend([
            phase("create (call to 201)", create, Some(TARGET_CREATE)),
            phase("bash -l -c true in a fresh one", exec, None),
            phase(
                "create to first command's end",
                first_output,
                Some(TARGET_FIRST_OUTPUT),
            ),
            phase(
                "Python's first line in a fresh one",
                python,
                Some(TARGET_PYTHON),
            ),
        ]);
        results.server.extend(
            server
                .into_iter()
                .map(|((_, name), values)| Phase::new(name, Unit::Milliseconds, values, None)),
        );
        Ok(())
    }

    /// Ends one that was measured and lets the host catch its breath, if so wished.
    async fn end(&mut self, id: &str) -> Result<(), Failure> {
        self.ground.client.destroy(id).await?;
        self.ground.made.retain(|made| made != id);
        if self.args.pause > 0 {
            tokio::time::sleep(Duration::from_millis(self.args.pause)).await;
        }
        Ok(())
    }

    /// Many at the same time, each with a command.
    async fn at_once(&mut self, results: &mut Results) {
        self.ground
            .say(&format!("{} sandboxes at once", self.args.at_once));
        let started = Instant::now();
        let request = self.request();
        let client = self.ground.client;
        let one = || async {
            let before = Instant::now();
            let created = client
                .create(&request)
                .await
                .map_err(|error| (None, error.to_string()))?;
            let id = created.sandbox.id;
            let create = ms(before);
            let echo = command("echo", &[&id]);
            let answer = client
                .exec(&id, &echo)
                .await
                .map_err(|error| (Some(id.clone()), error.to_string()))?;
            if answer["stdout"].as_str().map(str::trim) == Some(id.as_str()) {
                Ok((id, create, ms(before)))
            } else {
                Err((Some(id), format!("`echo` answered {answer}")))
            }
        };
        let outcomes = join_all((0..self.args.at_once).map(|_| one())).await;
        let all = ms(started);
        let (mut create, mut output) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Ok((id, created, done)) => {
                    self.ground.made.push(id);
                    create.push(created);
                    output.push(done);
                }
                Err((id, why)) => {
                    self.ground.made.extend(id);
                    results.failures.push(why);
                }
            }
        }
        let n = self.args.at_once;
        let phase = |name: String, values| Phase::new(name, Unit::Milliseconds, values, None);
        results.phases.extend([
            phase(format!("{n} at once: create"), create),
            phase(format!("{n} at once: create to output"), output),
            phase(format!("{n} at once: all done"), vec![all]),
        ]);
    }

    /// Those made at once, left alone.
    async fn idle(&mut self, results: &mut Results) {
        let names = ["idle: private memory each", "idle: processor each"];
        let watch = Duration::from_secs(self.args.idle);
        self.ground.say(&format!(
            "{} idle sandboxes for {} s",
            self.ground.made.len(),
            (SETTLE + watch).as_secs()
        ));
        match self.watch_idle(watch).await {
            Ok((memory, cpu)) => results.phases.extend([
                Phase::new(names[0], Unit::Bytes, memory, Some(TARGET_MEMORY)),
                Phase::new(names[1], Unit::PercentOfCore, cpu, Some(TARGET_CPU)),
            ]),
            Err(error) => {
                let why = on_the_host(&error);
                results.phases.extend([
                    Phase::missing(names[0], Unit::Bytes, Some(TARGET_MEMORY), why.clone()),
                    Phase::missing(names[1], Unit::PercentOfCore, Some(TARGET_CPU), why),
                ]);
            }
        }
    }

    async fn watch_idle(&self, watch: Duration) -> std::io::Result<(Vec<f64>, Vec<f64>)> {
        let processes = machine::find(self.ground.client.data_dir(), &self.ground.made)?;
        tokio::time::sleep(SETTLE).await;
        let (mut memory, mut cpu) = (Vec::new(), Vec::new());
        let mut before = Vec::new();
        for process in &processes {
            before.push((Instant::now(), process.measure()?));
        }
        tokio::time::sleep(watch).await;
        for (process, (since, earlier)) in processes.iter().zip(before) {
            let now = process.measure()?;
            memory.push(now.private_bytes as f64);
            cpu.push(
                (now.cpu_seconds - earlier.cpu_seconds) / since.elapsed().as_secs_f64() * 100.0,
            );
        }
        Ok((memory, cpu))
    }
}

/// Waits for a program's first output.
async fn first_line(client: &Client, id: &str, command: &Command) -> Result<(), Failure> {
    let (_input, mut output) = client.exec_stream(id, command, false).await?;
    loop {
        match output.next().await? {
            ExecEvent::Stdout(_) => return Ok(()),
            ExecEvent::Started | ExecEvent::Stderr(_) => {}
            ExecEvent::Exited(ended) => {
                return Err(Failure::message(format!(
                    "`{}` in {id} ended with {} and said nothing",
                    command.cmd, ended.code
                )));
            }
            ExecEvent::Failed { code, message } => {
                return Err(ClientError::Api {
                    status: 0,
                    code,
                    message,
                }
                .into());
            }
        }
    }
}

fn on_the_host(error: &std::io::Error) -> String {
    format!("needs root on the server's host ({error})")
}

fn show(results: &Results, conditions: &Value, context: &Context) {
    let printer = &context.printer;
    printer.table(report::table(&results.phases));
    if !results.server.is_empty() {
        printer.line("");
        printer.heading("where the server's time goes in create");
        let mut table = Table::new(["STEP", "MEDIAN", "P95", "N"]).right([1, 2, 3]);
        for phase in &results.server {
            let value = |value: Option<f64>| {
                value
                    .map(|value| phase.unit.show(value))
                    .unwrap_or_default()
            };
            table.plain([
                phase.name.clone(),
                value(phase.sample.median()),
                value(phase.sample.p95()),
                phase.sample.n().to_string(),
            ]);
        }
        printer.table(table);
    }
    report::show_conditions(conditions, printer);
}
