//! What the page server does per second, beside the least that could do it (`bare.c`, built
//! with `cc` here), with the same guest, in turns, so that whatever else runs hits all alike.
//!
//! `cargo bench --workspace --bench page_server [-- ROUNDS] [faults | batches]`
#![allow(clippy::unwrap_used)]
#![expect(
    clippy::print_stdout,
    reason = "a table on the terminal is its purpose"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use common::*;
use wrenn_memory::{Policy, State, WorkingSet};

const MIB: u32 = 512;
const FAULTS: usize = 8192;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|first| first == "--guest") {
        return guest::main(&arguments[2..]);
    }
    let rounds = arguments.iter().skip(1).find_map(|word| word.parse().ok());
    let asked = |part: &str| arguments.iter().any(|word| word == part);
    let memories = Memories::make();
    let rounds = rounds.unwrap_or(7);
    conditions(rounds);
    if !asked("batches") {
        measure_faults(&memories, rounds);
    }
    if !asked("faults") {
        measure_batches(&memories, rounds);
    }
    ExitCode::SUCCESS
}

/// All measured values of each line of the table, in the order they were first measured.
#[derive(Default)]
struct Table(Vec<(String, Vec<f64>)>);

impl Table {
    fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name.to_owned(), vec![value])),
        }
    }

    fn median(&self, name: &str) -> f64 {
        let mut values = self
            .0
            .iter()
            .find(|(known, _)| known == name)
            .unwrap()
            .1
            .clone();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    fn print(&self, unit: &str, against: &str) {
        for (name, values) in &self.0 {
            let median = self.median(name);
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            println!(
                "  {name:<52} {median:8.2} {unit}  ({least:.2} to {most:.2})  {:4.0} % of bare C",
                100.0 * median / self.median(against)
            );
        }
    }
}

/// All of the memory is data: in a template, or in one generation.
struct Memories {
    base: Rig,
    generation: Rig,
    flat: PathBuf,
    bare: PathBuf,
}

impl Memories {
    fn make() -> Memories {
        let pages = u64::from(MIB) << 8;
        // Pages that are zero would be cheaper, so there are none.
        let full: Writes = (0..pages).map(|at| (at, Some(page(at)))).collect();
        let generation = Rig::new(MIB, None, &[full], false);
        let mut base = Rig::new(MIB, None, &[], false);
        base.expected.clone_from(&generation.expected);
        let all: Vec<u64> = (0..pages).collect();
        base.base = Some(sealed(base.expected.len(), &all, &base.expected));
        let flat = base.expected_file();
        let bare = base.path("bare");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/bare.c");
        let built = Command::new("cc")
            .args(["-O2", "-Wall", "-o"])
            .arg(&bare)
            .arg(source)
            .status()
            .unwrap();
        assert!(built.success());
        Memories {
            base,
            generation,
            flat,
            bare,
        }
    }

    fn served(&self) -> [(&'static str, &Rig); 2] {
        [("base", &self.base), ("generation", &self.generation)]
    }

    /// The bare handler, and what it prints.
    fn bare(&self, how: &str) -> (Child, PathBuf) {
        let socket = self.base.path("bare.sock");
        let _ = std::fs::remove_file(&socket);
        let child = Command::new(&self.bare)
            .arg(&socket)
            .arg(&self.flat)
            .arg(how)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("it listens", || {
            let unix = std::fs::read_to_string("/proc/net/unix").unwrap();
            // Flag 00010000: it accepts connections.
            unix.lines()
                .any(|line| line.ends_with(socket.to_str().unwrap()) && line.contains("00010000"))
        });
        (child, socket)
    }
}

/// Thousand faults per second: of pages whose chunk nobody has read yet, and of others.
fn fault_rates(guest: &mut Guest, seed: u64) -> (f64, f64) {
    let mut rate = |which| {
        let nanos = guest.ask(&format!("touch-random {seed} {FAULTS} {which}"));
        FAULTS as f64 / nanos.parse::<f64>().unwrap() * 1e6
    };
    (rate("first"), rate("others"))
}

fn measure_faults(memories: &Memories, rounds: usize) {
    let pages = memories.base.pages();
    let mut table = Table::default();
    for round in 0..rounds as u64 {
        let (mut child, socket) = memories.bare("faults");
        let mut guest = Guest::start(&socket, pages, 1);
        let (first, others) = fault_rates(&mut guest, round);
        table.add("bare C", others);
        table.add("bare C, one page of each 64 KiB", first);
        guest.end();
        assert!(child.wait().unwrap().success());

        for (name, rig) in memories.served() {
            let server = rig.serve(Policy::default());
            // As long as a monitor takes to start.
            std::thread::sleep(Duration::from_millis(100));
            let mut guest = Guest::start(&server.config.socket, pages, 1);
            let (first, others) = fault_rates(&mut guest, round);
            table.add(&format!("{name}, verified before"), others);
            table.add(&format!("{name}, each page the first of its chunk"), first);
            guest.end();
            server.end().unwrap();
        }
    }
    println!("One fault at a time, random pages, {FAULTS} each (thousand per second):");
    table.print("k/s", "bare C");
}

fn measure_batches(memories: &Memories, rounds: usize) {
    let pages = memories.base.pages();
    let gib = f64::from(MIB) / 1024.0;
    let mut table = Table::default();
    for round in 0..rounds as u64 {
        for (how, name) in [
            ("1048576", "bare C, 1 MiB a call"),
            ("65536", "bare C, 64 KiB a call"),
        ] {
            let (mut child, socket) = memories.bare(how);
            let guest = Guest::start(&socket, pages, 1);
            let mut line = String::new();
            BufReader::new(child.stdout.take().unwrap())
                .read_line(&mut line)
                .unwrap();
            table.add(name, gib / line.trim().parse::<f64>().unwrap() * 1e9);
            guest.end();
            assert!(child.wait().unwrap().success());
        }
        for (name, rig) in memories.served() {
            let path = rig.path("working-set");
            for (what, run, part) in [
                ("background, everything", pages, 1),
                ("working set, half of it, runs of 64 KiB", 16, 2),
                ("working set, every other page", 1, 2),
            ] {
                let policy = match part {
                    1 => Policy {
                        background: true,
                        ..Policy::default()
                    },
                    _ => {
                        working_set(pages, run, round, &path);
                        Policy {
                            working_set: Some(path.clone()),
                            ..Policy::default()
                        }
                    }
                };
                let took = bring(rig, policy, pages / part);
                table.add(
                    &format!("{name}, {what}"),
                    gib / part as f64 / took.as_secs_f64(),
                );
            }
        }
    }
    println!("Brought before they are asked for, {MIB} MiB of memory:");
    table.print("GiB/s", "bare C, 1 MiB a call");
}

/// Every second run of so many pages, in random order.
fn working_set(pages: u64, run: u64, seed: u64, path: &Path) {
    let mut runs: Vec<u64> = (0..pages).step_by(2 * run as usize).collect();
    Random(seed).shuffle(&mut runs);
    let order = runs.iter().flat_map(|first| *first..first + run);
    WorkingSet::new(pages, order).save(path).unwrap();
}

/// How long it takes until these pages are there, from the handshake on, to a millisecond.
fn bring(rig: &Rig, policy: Policy, wanted: u64) -> Duration {
    let server = rig.serve(policy);
    let guest = Guest::start_how(&server.config.socket, rig.pages(), 1, "well");
    assert_eq!(guest.answer().as_deref(), Some("ready"));
    let began = Instant::now();
    let took = loop {
        let status = server.status();
        if status.state == State::Idle {
            assert_eq!(status.counts.prefetched + status.counts.background, wanted);
            break began.elapsed();
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    guest.end();
    server.end().unwrap();
    took
}

fn conditions(rounds: usize) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find(|line| line.starts_with("model name"));
    println!(
        "{}; {} processors; Linux {}; load {}; medians of {rounds} rounds (least to most)",
        model
            .and_then(|line| line.split_once(": "))
            .map_or("?", |(_, name)| name),
        std::thread::available_parallelism().map_or(0, usize::from),
        read("/proc/sys/kernel/osrelease").trim(),
        read("/proc/loadavg").trim(),
    );
    println!("Each server is new: it has verified nothing before, and its files are in memory.");
}
