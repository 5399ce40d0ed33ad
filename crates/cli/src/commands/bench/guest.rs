//! `wrenn bench guest`: how fast and how small the guest agent is, as a plain process of
//! this machine, without a virtual machine around it.
//!
//! Each group of measurements has an agent of its own, so that none sees what another left
//! behind. Everything it makes is gone when it ends, whichever way it ends.

mod agent;
mod baseline;
mod client;
mod content;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use buffa::MessageField;
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::Method;
use hyper::body::Frame;
use rustix::process::{Resource, Rlimit};
use serde_json::json;
use tempfile::TempDir;
use wrenn_wire::filesystem::ListDirRequest;
use wrenn_wire::process::__buffa::oneof::{process_input, process_selector};
use wrenn_wire::process::{
    PTY, ProcessConfig, ProcessInput, ProcessSelector, SendInputRequest, StartRequest, pty,
};

use self::agent::{Agent, AgentError};
use self::client::{CallError, Codec, Connection, Told, full};
use self::content::{continues, count, is_written, piece};
use super::report::{self, Phase, Unit, load_average};
use crate::args::OutputArgs;
use crate::commands::Context;
use crate::error::Failure;
use crate::exit::Exit;
use crate::guest_programs::guest_programs;
use crate::signals::Signals;

/// What the median of each phase should keep: milliseconds, bytes, bytes per second.
const TARGET_START: f64 = 3.0;
const TARGET_ECHO: f64 = 2.0;
const TARGET_OUTPUT_JSON: f64 = 300e6;
const TARGET_OUTPUT_BINARY: f64 = 1e9;
const TARGET_FILE: f64 = 1e9;
const TARGET_LISTING: f64 = 1000.0;
const TARGET_IDLE: f64 = (12 << 20) as f64;
const TARGET_STREAMS: f64 = (40 << 20) as f64;
const TARGET_SIZE: f64 = 8e6;
/// "Where it was", give or take what an allocator keeps and the exits of the last programs,
/// which are there for those who connect late.
const TARGET_GROWTH: f64 = (1 << 20) as f64;
/// Those exits are as many as will ever be kept after the first half of the programs.
const TARGET_FLAT: f64 = (256 << 10) as f64;
/// An agent is idle once its start, or what it did, has died away.
const SETTLE: Duration = Duration::from_secs(2);
/// Programs before the count begins: buffers and pools have their size then.
const WARM: u32 = 200;
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

    /// Memory of an agent that has answered once.
    async fn idle(&self) -> Result<Phase, BenchError> {
        let mut resident = Vec::new();
        for _ in 0..3 {
            let agent = self.agent().await?;
            let mut connection = Connection::open(agent.address).await?;
            connection
                .send(Method::GET, "/health", &[], full(""))
                .await?;
            tokio::time::sleep(SETTLE).await;
            resident.push(agent.resident()? as f64);
            agent.stop().await?;
        }
        Ok(Phase::new(
            "memory of an idle agent",
            Unit::Bytes,
            resident,
            Some(TARGET_IDLE),
        ))
    }

    /// From the request to the end of its stream.
    async fn start_to_end(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let mut phases = Vec::new();
        for codec in CODECS {
            let mut connection = Connection::open(agent.address).await?;
            let mut times = Vec::new();
            for round in 0..self.args.n + 20 {
                let began = Instant::now();
                run_true(&mut connection, codec).await?;
                // The first ones only warm the agent up.
                if round >= 20 {
                    times.push(ms(began));
                }
            }
            phases.push(Phase::new(
                format!("/bin/true, start to end ({})", codec.name()),
                Unit::Milliseconds,
                times,
                Some(TARGET_START),
            ));
        }
        agent.stop().await?;
        Ok(phases)
    }

    /// From a key sent to its echo, written by the terminal itself.
    async fn echo(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let mut phases = Vec::new();
        for codec in CODECS {
            let mut request = command("/bin/cat", &[], true);
            request.pty = MessageField::some(PTY {
                size: MessageField::some(pty::Size {
                    cols: 80,
                    rows: 24,
                    ..Default::default()
                }),
                ..Default::default()
            });
            let mut output = Connection::open(agent.address).await?;
            let mut input = Connection::open(agent.address).await?;
            let mut events = output.stream(codec, START, &request).await?;
            let mut pid = 0;
            while pid == 0 {
                events
                    .next(|told| {
                        if let Told::Started(id) = told {
                            pid = id;
                        }
                    })
                    .await?;
            }
            let key = key(pid);
            let mut times = Vec::new();
            for _ in 0..self.args.n {
                let began = Instant::now();
                let send = input.call(codec, "/process.Process/SendInput", &key);
                let echo = async {
                    let mut seen = false;
                    while !seen {
                        let more = events
                            .next(|told| seen |= matches!(told, Told::Output(_)))
                            .await?;
                        if !more {
                            return Err(CallError::Wrong("a terminal that ended".to_owned()));
                        }
                    }
                    Ok(ms(began))
                };
                let (sent, echoed) = tokio::join!(send, echo);
                sent?;
                times.push(echoed?);
            }
            phases.push(Phase::new(
                format!("echo of a key in a terminal ({})", codec.name()),
                Unit::Milliseconds,
                times,
                Some(TARGET_ECHO),
            ));
        }
        agent.stop().await?;
        Ok(phases)
    }

    /// Standard output at full speed; every byte is compared.
    async fn output(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let size = self.bytes();
        let request = command(
            "/usr/bin/head",
            &["-c", &size.to_string(), "/dev/zero"],
            false,
        );
        let (mut phases, mut alone) = (Vec::new(), Vec::new());
        for (codec, target) in [
            (Codec::Json, TARGET_OUTPUT_JSON),
            (Codec::Binary, TARGET_OUTPUT_BINARY),
        ] {
            let mut connection = Connection::open(agent.address).await?;
            let mut rates = Vec::new();
            for _ in 0..self.args.rounds {
                alone.push(baseline::output(size).await.map_err(BenchError::Baseline)?);
                let began = Instant::now();
                let events = connection.stream(codec, START, &request).await?;
                let (mut zeros, mut others) = (0, 0);
                let code = events
                    .finish(|told| match told {
                        Told::Zeros(count) => zeros += count,
                        Told::Output(bytes) => others += bytes.len(),
                        Told::Started(_) | Told::Ended(_) => {}
                    })
                    .await?;
                rates.push(size as f64 / began.elapsed().as_secs_f64());
                if (code, zeros, others) != (0, size, 0) {
                    return Err(BenchError::Wrong(format!(
                        "`head -c {size} /dev/zero` ended with {code} after {zeros} zeros and {others} other bytes"
                    )));
                }
            }
            phases.push(Phase::new(
                format!("{} MiB of output ({})", self.args.size, codec.name()),
                Unit::BytesPerSecond,
                rates,
                Some(target),
            ));
        }
        agent.stop().await?;
        phases.push(Phase::new(
            "  the same, only a pipe and a socket",
            Unit::BytesPerSecond,
            alone,
            None,
        ));
        Ok(phases)
    }

    /// A file up and down; every byte is compared.
    async fn files(&self) -> Result<Vec<Phase>, BenchError> {
        let names = [
            format!("upload of {} MiB", self.args.size),
            format!("download of {} MiB", self.args.size),
        ];
        let size = self.bytes();
        let free = rustix::fs::statvfs(&self.args.folder)
            .map_err(|errno| self.file_error(&self.args.folder, errno.into()))?;
        // The upload is beside the file it replaces until it is whole; so is the baseline's.
        if free.f_bavail * free.f_frsize < 2 * size + (64 << 20) {
            let why = format!("{} has too little space", self.args.folder.display());
            return Ok(names
                .iter()
                .map(|name| {
                    Phase::missing(name, Unit::BytesPerSecond, Some(TARGET_FILE), why.clone())
                })
                .collect());
        }
        let agent = self.agent().await?;
        let folder = self.scratch()?;
        let path = folder.path().join("file");
        let target = format!("/files?path={}", path.display());
        let piece = piece();
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let (mut bare_up, mut bare_down) = (Vec::new(), Vec::new());
        let mut connection = Connection::open(agent.address).await?;
        for _ in 0..self.args.rounds {
            let pieces = (0..self.args.size).map({
                let piece = piece.clone();
                move |_| Ok(Frame::data(piece.clone()))
            });
            let body = StreamBody::new(stream::iter(pieces)).boxed();
            let length = size.to_string();
            let headers = [
                ("content-type", "application/octet-stream"),
                ("content-length", length.as_str()),
            ];
            let began = Instant::now();
            let answer = connection
                .send(Method::POST, &target, &headers, body)
                .await?;
            let answer = answer.into_body().collect().await;
            answer.map_err(CallError::from)?;
            up.push(size as f64 / began.elapsed().as_secs_f64());
            let bare = baseline::upload(size, piece.clone(), folder.path().join("bare"));
            bare_up.push(bare.await.map_err(BenchError::Baseline)?);
            let bare = folder.path().join("bare");
            std::fs::remove_file(&bare).map_err(|source| self.file_error(&bare, source))?;
        }
        is_written(&path, &piece, size).map_err(|source| self.file_error(&path, source))?;
        for _ in 0..self.args.rounds {
            let began = Instant::now();
            let answer = connection.send(Method::GET, &target, &[], full("")).await?;
            let mut body = answer.into_body();
            let mut at = 0;
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(CallError::from)?;
                if let Some(data) = frame.data_ref() {
                    if !continues(&piece, at, data) {
                        return Err(BenchError::Wrong(format!(
                            "a download differs from what was uploaded after byte {at}"
                        )));
                    }
                    at += data.len() as u64;
                }
            }
            down.push(size as f64 / began.elapsed().as_secs_f64());
            if at != size {
                return Err(BenchError::Wrong(format!(
                    "a download of {size} bytes ended after {at}"
                )));
            }
            let bare = baseline::download(size, piece.clone(), path.clone());
            bare_down.push(bare.await.map_err(BenchError::Baseline)?);
        }
        agent.stop().await?;
        let bare = "  the same, only a socket and a file";
        let [upload, download] = names;
        let unit = Unit::BytesPerSecond;
        Ok(vec![
            Phase::new(upload, unit, up, Some(TARGET_FILE)),
            Phase::new(bare, unit, bare_up, None),
            Phase::new(download, unit, down, Some(TARGET_FILE)),
            Phase::new(bare, unit, bare_down, None),
        ])
    }

    /// One directory of many entries.
    async fn listing(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let folder = self.scratch()?;
        for n in 0..self.args.entries {
            let path = folder.path().join(format!("entry-{n}"));
            std::fs::File::create(&path).map_err(|source| self.file_error(&path, source))?;
        }
        let request = ListDirRequest {
            path: folder.path().display().to_string(),
            depth: 1,
            ..Default::default()
        };
        let mut phases = Vec::new();
        for codec in CODECS {
            let mut connection = Connection::open(agent.address).await?;
            let mut times = Vec::new();
            for _ in 0..self.args.rounds {
                let began = Instant::now();
                let answer = connection
                    .call(codec, "/filesystem.Filesystem/ListDir", &request)
                    .await?;
                times.push(ms(began));
                // Each has its path in it.
                let marker = format!("{}/entry-", request.path);
                let found = count(&answer, marker.as_bytes());
                if found != self.args.entries as usize {
                    return Err(BenchError::Wrong(format!(
                        "a listing of {} entries has {found}",
                        self.args.entries
                    )));
                }
            }
            phases.push(Phase::new(
                format!(
                    "listing of {} entries ({})",
                    self.args.entries,
                    codec.name()
                ),
                Unit::Milliseconds,
                times,
                Some(TARGET_LISTING),
            ));
        }
        agent.stop().await?;
        Ok(phases)
    }

    /// Memory with many programs that wait, each with a stream of its own.
    async fn streams(&self) -> Result<Vec<Phase>, BenchError> {
        let name = format!("memory with {} idle streams", self.args.streams);
        if !raise_open_files(u64::from(self.args.streams) + 100) {
            let why = "needs a higher limit of open files (ulimit -Hn)".to_owned();
            return Ok(vec![Phase::missing(
                &name,
                Unit::Bytes,
                Some(TARGET_STREAMS),
                why,
            )]);
        }
        let agent = self.agent().await?;
        // They read what nobody writes, and end with the agent that holds the other end.
        let request = command("/bin/cat", &[], true);
        let mut open = Vec::new();
        for n in 0..self.args.streams {
            let codec = CODECS[n as usize % CODECS.len()];
            let mut connection = Connection::open(agent.address).await?;
            let mut events = connection.stream(codec, START, &request).await?;
            let mut started = false;
            while !started {
                events
                    .next(|told| started |= matches!(told, Told::Started(_)))
                    .await?;
            }
            open.push((connection, events));
        }
        tokio::time::sleep(SETTLE).await;
        let resident = agent.resident()? as f64;
        agent.stop().await?;
        Ok(vec![Phase::new(
            name,
            Unit::Bytes,
            vec![resident],
            Some(TARGET_STREAMS),
        )])
    }

    /// What many programs, one after the other, leave behind.
    async fn programs(&self) -> Result<Vec<Phase>, BenchError> {
        let agent = self.agent().await?;
        let mut connections = Vec::new();
        for codec in CODECS {
            connections.push((codec, Connection::open(agent.address).await?));
        }
        let half = WARM + self.args.programs / 2;
        let (mut before, mut between) = (0, 0);
        for n in 0..WARM + self.args.programs {
            if n == WARM {
                tokio::time::sleep(SETTLE).await;
                before = agent.resident()?;
            }
            if n == half {
                tokio::time::sleep(SETTLE).await;
                between = agent.resident()?;
            }
            let turn = n as usize % connections.len();
            let (codec, connection) = &mut connections[turn];
            run_true(connection, *codec).await?;
        }
        tokio::time::sleep(SETTLE).await;
        let after = agent.resident()?;
        agent.stop().await?;
        let n = self.args.programs;
        Ok(vec![
            Phase::new(
                format!("memory before {n} programs"),
                Unit::Bytes,
                vec![before as f64],
                None,
            ),
            Phase::new(
                format!("growth by {n} programs"),
                Unit::Bytes,
                vec![after.saturating_sub(before) as f64],
                Some(TARGET_GROWTH),
            ),
            Phase::new(
                format!("  of it by the last {}", n - n / 2),
                Unit::Bytes,
                vec![after.saturating_sub(between) as f64],
                Some(TARGET_FLAT),
            ),
        ])
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

const CODECS: [Codec; 2] = [Codec::Json, Codec::Binary];
const START: &str = "/process.Process/Start";

fn command(cmd: &str, args: &[&str], stdin: bool) -> StartRequest {
    StartRequest {
        process: MessageField::some(ProcessConfig {
            cmd: cmd.to_owned(),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Default::default()
        }),
        stdin: Some(stdin),
        ..Default::default()
    }
}

/// One key pressed in the terminal of process `pid`.
fn key(pid: u32) -> SendInputRequest {
    SendInputRequest {
        process: MessageField::some(ProcessSelector {
            selector: Some(process_selector::Selector::Pid(pid)),
            ..Default::default()
        }),
        input: MessageField::some(ProcessInput {
            input: Some(process_input::Input::Pty(b"x".to_vec())),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn run_true(connection: &mut Connection, codec: Codec) -> Result<(), BenchError> {
    let request = command("/bin/true", &[], false);
    let events = connection.stream(codec, START, &request).await?;
    match events.finish(|_| {}).await? {
        0 => Ok(()),
        code => Err(BenchError::Wrong(format!("`/bin/true` ended with {code}"))),
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Lets this process, and what it starts, have `wanted` files open; whether that is possible.
fn raise_open_files(wanted: u64) -> bool {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= wanted);
    if enough(limit.current) {
        return true;
    }
    let raised = Rlimit {
        current: Some(wanted),
        maximum: limit.maximum,
    };
    enough(limit.maximum) && rustix::process::setrlimit(Resource::Nofile, raised).is_ok()
}
