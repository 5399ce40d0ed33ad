//! G27 under load: 200 programs write random bytes at full speed to several readers each, some
//! of them stuck, some coming back again and again; every byte is accounted for by checksum,
//! and the agent's memory stays bounded all the while.
//!
//! What a program wrote is known from a copy that the agent never sees. With
//! `WRENN_TEST_LONG` the same goes round many times.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use connectrpc::client::CallOptions;
use sha2::{Digest, Sha256};
use support::{Client, Envd, pid, sh, stdin};
use wrenn_wire::process as wire;
use wrenn_wire::process::__buffa::oneof::process_event::{Event, data_event::Output};

const PROGRAMS: usize = 200;
/// Bytes of each, and a little more for each, so that no two are alike.
const SIZE: u64 = 2 << 20;
/// Logs of 200 programs at their fullest (256 KiB and a chunk each), buffers of 700
/// connections, and what the agent needs itself. All output together is twice as much.
const MEMORY: u64 = 220 << 20;
/// Nothing takes longer, also on a busy machine; alone it is a tenth of this.
const PATIENCE: Duration = Duration::from_secs(240);

/// What a reader has read without a gap: where it began, how long it is, and its checksum.
struct Stretch {
    from: u64,
    length: u64,
    hash: Sha256,
}

/// Everything that one reader was told.
#[derive(Default)]
struct Account {
    stretches: Vec<Stretch>,
    missed: u64,
    /// Offset of the next byte.
    at: u64,
    pid: u32,
    code: Option<i32>,
    /// Read on this connection.
    here: u64,
}

impl Account {
    fn take(&mut self, event: Event) {
        match event {
            Event::Start(start) => self.pid = start.pid,
            Event::Data(data) => {
                let Some(Output::Stdout(bytes)) = data.output else {
                    panic!("nothing else is written");
                };
                let connected = self
                    .stretches
                    .last()
                    .is_some_and(|last| last.from + last.length == self.at);
                if !connected {
                    self.stretches.push(Stretch {
                        from: self.at,
                        length: 0,
                        hash: Sha256::new(),
                    });
                }
                let last = self.stretches.last_mut().unwrap();
                last.hash.update(&bytes);
                last.length += bytes.len() as u64;
                self.at += bytes.len() as u64;
                self.here += bytes.len() as u64;
            }
            Event::Keepalive(keepalive) => {
                self.missed += keepalive.missed;
                self.at += keepalive.missed;
            }
            Event::End(end) => self.code = Some(end.exit_code),
        }
    }

    /// Everything was told, or told to be missed, and what was told is what was written.
    fn agrees_with(&self, written: &[u8], who: &str) {
        assert_eq!(self.code, Some(0), "{who}");
        assert_eq!(
            self.at,
            written.len() as u64,
            "{who}: not all is accounted for"
        );
        let told: u64 = self.stretches.iter().map(|stretch| stretch.length).sum();
        assert_eq!(told + self.missed, self.at, "{who}");
        for stretch in &self.stretches {
            let from = stretch.from as usize;
            let part = &written[from..from + stretch.length as usize];
            assert_eq!(
                stretch.hash.clone().finalize(),
                Sha256::digest(part),
                "{who}: other bytes from {from} on"
            );
        }
    }
}

/// Reads into an account until a condition holds or the stream ends.
macro_rules! read {
    ($stream:expr, $account:expr, $until:expr) => {{
        let until = $until;
        while !until(&$account) {
            let Some(message) = $stream.message().await.unwrap() else {
                assert!($stream.error().is_none(), "{:?}", $stream.error());
                break;
            };
            let message = message.to_owned_message();
            $account.take(message.event.into_option().unwrap().event.unwrap());
        }
    }};
}

fn options(offset: u64, lossless: bool) -> CallOptions {
    let options = CallOptions::default()
        .with_header("wrenn-from-offset", &*offset.to_string())
        .with_header("wrenn-mark-gaps", "1");
    if lossless {
        options.with_header("wrenn-output", "lossless")
    } else {
        options
    }
}

fn of(id: u32) -> wire::ConnectRequest {
    wire::ConnectRequest {
        process: pid(id),
        ..Default::default()
    }
}

/// A reader beside the one that started the program. It is there when this ends, and reads
/// when what is returned is awaited: the log holds back for it from then on.
async fn beside(client: &Client, id: u32, lossless: bool) -> impl Future<Output = Account> {
    let mut stream = client
        .connect_with_options(of(id), options(0, lossless))
        .await
        .unwrap();
    async move {
        let mut account = Account::default();
        read!(stream, account, |_: &Account| false);
        account
    }
}

/// One that hangs up every so many bytes, and comes back to where it was. When the program has
/// ended meanwhile, what is no longer kept of it is told as missed.
async fn come_and_go(client: &Client, mut account: Account, every: u64) -> Account {
    let id = account.pid;
    while account.code.is_none() {
        account.here = 0;
        let mut stream = client
            .connect_with_options(of(id), options(account.at, true))
            .await
            .unwrap();
        read!(stream, account, |a: &Account| a.here >= every
            || a.code.is_some());
    }
    account
}

async fn torment(n: usize, clients: [Client; 2], folder: Arc<tempfile::TempDir>) {
    let [json, _] = &clients;
    let mine = &clients[n % 2];
    let file = folder.path().join(n.to_string());
    let size = SIZE + n as u64 * 1013;
    let script = format!(
        "read go; head -c {size} /dev/urandom | tee {}",
        file.display(),
    );
    let mut account = Account::default();
    let mut stream = mine
        .start_with_options(
            wire::StartRequest {
                stdin: None,
                ..sh(&script)
            },
            options(0, true),
        )
        .await
        .unwrap();
    read!(stream, account, |a: &Account| a.pid > 0);
    let id = account.pid;
    // It waits until all its readers are there: what is written before that is on its way to
    // the first one, however slowly that reads, and no longer kept for the others.
    let go = async {
        mine.send_input(stdin(id, b"\n")).await.unwrap();
    };
    let mut readers = vec![];
    match n % 4 {
        // Two that miss nothing.
        0 => {
            let other = beside(json, id, true).await;
            go.await;
            let all = async {
                read!(stream, account, |_: &Account| false);
            };
            let (other, ()) = tokio::join!(other, all);
            assert_eq!((other.missed, account.missed), (0, 0), "program {n}");
            readers.push(other);
        }
        // One that misses nothing, one that may, and one that is stuck: on a connection of its
        // own, or the window of a shared one would be full of what it does not read.
        1 => {
            let stuck = json
                .connect_with_options(of(id), options(0, false))
                .await
                .unwrap();
            let other = beside(json, id, false).await;
            go.await;
            let all = async {
                read!(stream, account, |_: &Account| false);
            };
            let (other, ()) = tokio::join!(other, all);
            assert_eq!(account.missed, 0, "program {n}");
            readers.push(other);
            drop(stuck);
        }
        // One that comes and goes beside one that misses nothing.
        2 => {
            let other = beside(json, id, true).await;
            go.await;
            let restless = async {
                read!(stream, account, |a: &Account| a.at > 100_000
                    || a.code.is_some());
                drop(stream);
                come_and_go(mine, account, 150_000 + n as u64).await
            };
            let (other, restless) = tokio::join!(other, restless);
            account = restless;
            assert_eq!(other.missed, 0, "program {n}");
            readers.push(other);
        }
        // One that comes and goes, and nobody else: what it misses meanwhile is told.
        _ => {
            go.await;
            read!(stream, account, |a: &Account| a.at > 300_000
                || a.code.is_some());
            drop(stream);
            account = come_and_go(json, account, 400_000).await;
        }
    }
    readers.push(account);
    let written = tokio::fs::read(&file).await.unwrap();
    assert_eq!(written.len() as u64, size);
    for (reader, account) in readers.iter().enumerate() {
        account.agrees_with(&written, &format!("program {n}, reader {reader}"));
    }
    tokio::fs::remove_file(&file).await.unwrap();
}

/// Bytes; `None` once it has ended.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g27_two_hundred_programs_at_full_speed_lose_nothing() {
    let rounds = if std::env::var_os("WRENN_TEST_LONG").is_some() {
        20
    } else {
        1
    };
    let envd = Envd::start();
    let shm = Path::new("/dev/shm");
    let within = if shm.is_dir() {
        shm.into()
    } else {
        std::env::temp_dir()
    };
    let folder = Arc::new(tempfile::tempdir_in(within).unwrap());
    let most = Arc::new(AtomicU64::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let (most, done, pid) = (Arc::clone(&most), Arc::clone(&done), envd.pid());
        move || {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(resident(pid).unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    let began = Instant::now();
    let mut after_each = Vec::new();
    for round in 0..rounds {
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..PROGRAMS {
            tasks.spawn(torment(n, envd.clients(), Arc::clone(&folder)));
        }
        let all = async {
            while let Some(done) = tasks.join_next().await {
                done.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, all)
            .await
            .unwrap_or_else(|_| panic!("round {round} is not over after {PATIENCE:?}"));
        after_each.push(resident(envd.pid()).unwrap());
    }
    done.store(true, Ordering::Relaxed);
    watch.join().unwrap();
    let most = most.load(Ordering::Relaxed);
    println!(
        "{rounds} rounds of {PROGRAMS} programs in {:?}; the agent had {} MiB at most, {:?} MiB after each",
        began.elapsed(),
        most >> 20,
        after_each
            .iter()
            .map(|bytes| bytes >> 20)
            .collect::<Vec<_>>()
    );
    assert!(most < MEMORY, "{} MiB", most >> 20);
    assert_eq!(envd.children(), "", "a program was not reaped");
}
