//! What the tests share: memories to serve, servers, and guests that are real processes.
#![allow(dead_code, reason = "not every test uses all of it")]
#![allow(clippy::unwrap_used)]

pub mod guest;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use wrenn_memory::{BaseConfig, Config, Counts, Policy, Request, ServeError, State, Status};
use wrenn_snapshot::*;
use wrenn_types::{MemoryMib, Shape, Vcpus};

/// How long anything may take that takes milliseconds when nothing else runs.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const BASE: BaseId = BaseId([0xba; 32]);

/// Runs the tests, or what this program is when it is started by them.
pub fn run(tests: Vec<libtest_mimic::Trial>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("--guest") => guest::main(&arguments[2..]),
        Some("--server") => {
            let config = Config::read(std::io::stdin()).unwrap();
            match wrenn_memory::serve(&config, || {}) {
                Ok(_) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        _ => libtest_mimic::run(&libtest_mimic::Arguments::from_args(), tests).exit_code(),
    }
}

/// Makes `main` of a list of test functions.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        fn main() -> std::process::ExitCode {
            common::run(vec![$(
                libtest_mimic::Trial::test(stringify!($name), || {
                    $name();
                    Ok(())
                }),
            )*])
        }
    };
}

/// The same numbers for the same seed, everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}

/// A page's content that depends on `seed`; never all zero.
pub fn page(seed: u64) -> [u8; PAGE] {
    let mut content = [0; PAGE];
    let mut random = Random(seed);
    for word in content.chunks_exact_mut(8) {
        word.copy_from_slice(&(random.next() | 1).to_le_bytes());
    }
    content
}

/// What a machine did to pages between two snapshots; `None`: cleared.
pub type Writes = BTreeMap<u64, Option<[u8; PAGE]>>;

/// A memory in a store, and what it must read as.
pub struct Rig {
    pub folder: tempfile::TempDir,
    pub store: PathBuf,
    pub snapshot: Option<SnapshotId>,
    pub base: Option<File>,
    pub expected: Vec<u8>,
}

impl Rig {
    /// `mib` MiB laid in generations over a base: where `base` says so there is data, in some
    /// places that is all zero, elsewhere holes. No base without `base`.
    pub fn new(mib: u32, base: Option<&[u64]>, generations: &[Writes], zstd: bool) -> Rig {
        let bytes = (mib as usize) << 20;
        let pages = (bytes / PAGE) as u64;
        let shm = Path::new("/dev/shm");
        let folder = match shm.is_dir() {
            true => tempfile::tempdir_in(shm).unwrap(),
            false => tempfile::tempdir().unwrap(),
        };
        let mut expected = vec![0; bytes];
        let base = base.map(|data| {
            for at in data {
                // Every seventh is zero without being a hole.
                let content = match at % 7 {
                    3 => [0; PAGE],
                    _ => page(1_000_000 + at),
                };
                expected[*at as usize * PAGE..][..PAGE].copy_from_slice(&content);
            }
            sealed(bytes, data, &expected)
        });
        let root = folder.path().join("store");
        let store = Store::open(&root).unwrap();
        let base_id = base.as_ref().map(|_| BASE);
        let mut parent: Option<Snapshot> = None;
        let below = expected.clone();
        for (number, writes) in generations.iter().enumerate() {
            let bytes = BaseBytes {
                id: BASE,
                bytes: &below,
            };
            let base = base_id.map(|_| &bytes as &dyn Base);
            let untouched = Memory::untouched(pages, base_id);
            let before = parent.as_ref().and_then(Snapshot::memory);
            let mut draft = store.draft(parent.as_ref().as_slice()).unwrap();
            let compression = match zstd {
                true => Compression::Zstd(1),
                false => Compression::None,
            };
            let mut memory = draft
                .memory(before.unwrap_or(&untouched), base, compression)
                .unwrap();
            for (at, content) in writes {
                let content = content.unwrap_or([0; PAGE]);
                memory.write(*at, &content).unwrap();
                expected[*at as usize * PAGE..][..PAGE].copy_from_slice(&content);
            }
            draft.finish_memory(memory).unwrap();
            draft.device_state(b"devices").unwrap();
            let description = description(mib, number as u64);
            parent = Some(draft.commit(description).unwrap());
        }
        Rig {
            store: root,
            snapshot: parent.map(|snapshot| snapshot.id()),
            base,
            expected,
            folder,
        }
    }

    /// Of everything something: `mib` MiB, three generations over a base.
    pub fn mixed(mib: u32) -> Rig {
        let pages = u64::from(mib) << 8;
        let base: Vec<u64> = (0..pages)
            .filter(|at| at % 5 < 2 || at / 128 % 2 == 0)
            .collect();
        let mut random = Random(u64::from(mib));
        let generations: Vec<Writes> = (0..3)
            .map(|number| {
                let mut writes = Writes::new();
                for _ in 0..40 {
                    let first = random.next() % pages;
                    let kind = random.below(4);
                    for at in first..(first + random.next() % (pages / 60).max(2)).min(pages) {
                        let content = (kind > 0).then(|| page(at ^ (number + 1) << 40));
                        writes.insert(at, content);
                    }
                }
                writes
            })
            .collect();
        Rig::new(mib, Some(&base), &generations, false)
    }

    pub fn pages(&self) -> u64 {
        (self.expected.len() / PAGE) as u64
    }

    pub fn sum(&self) -> String {
        Digest::of(&self.expected).to_string()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The file of the newest generation.
    pub fn generation_file(&self) -> PathBuf {
        let store = Store::open(&self.store).unwrap();
        let snapshot = store.snapshot(self.snapshot.unwrap()).unwrap();
        let machine = snapshot.manifest().machine.as_ref().unwrap();
        let newest = machine.memory.generations.last().unwrap();
        let name = format!("{}.memory", newest.id);
        self.store.join("objects").join(name)
    }

    pub fn config(&self, policy: Policy) -> Config {
        Config {
            socket: self.path("uffd.sock"),
            uid: rustix::process::geteuid().as_raw(),
            control: self.path("control.sock"),
            status: self.path("status.json"),
            store: self.store.clone(),
            snapshot: self.snapshot,
            pinned_by: None,
            base: self.base.as_ref().map(|file| BaseConfig {
                path: format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into(),
                id: BASE,
            }),
            policy,
            connect_millis: 30_000,
            handshake_millis: 10_000,
        }
    }

    /// A file with what the memory must read as.
    pub fn expected_file(&self) -> PathBuf {
        let path = self.path("expected");
        std::fs::write(&path, &self.expected).unwrap();
        path
    }

    /// A server in a thread of this process.
    pub fn serve(&self, policy: Policy) -> Server {
        Server::start(self.config(policy))
    }
}

pub fn sealed(bytes: usize, data: &[u64], content: &[u8]) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("base", flags).unwrap());
    file.set_len(bytes as u64).unwrap();
    for at in data {
        let page = &content[*at as usize * PAGE..][..PAGE];
        file.write_all_at(page, at * PAGE as u64).unwrap();
    }
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn description(mib: u32, number: u64) -> Description {
    Description {
        created_unix_ms: number,
        shape: Shape {
            vcpus: Vcpus(1),
            memory: MemoryMib(mib),
        },
        origin: Origin {
            template: None,
            image: "sha256-image".into(),
            kernel: "sha256-kernel".into(),
            envd_version: "0".into(),
        },
        vmm: Vmm {
            driver: "firecracker".into(),
            version: "1.16".into(),
            fingerprint: serde_json::json!({}),
        },
        labels: BTreeMap::new(),
    }
}

/// A page server.
pub struct Server {
    pub config: Config,
    thread: Option<JoinHandle<Result<Counts, ServeError>>>,
    done: Receiver<()>,
}

impl Server {
    pub fn start(config: Config) -> Server {
        let (tell, done) = channel();
        let given = config.clone();
        let named = std::thread::Builder::new().name("page-server".into());
        let thread = named
            .spawn(move || {
                let result = wrenn_memory::serve(&given, || {});
                let _ = tell.send(());
                result
            })
            .unwrap();
        let server = Server {
            config,
            thread: Some(thread),
            done,
        };
        server.wait_for_socket();
        server
    }

    fn wait_for_socket(&self) {
        let socket = &self.config.socket;
        let thread = self.thread.as_ref().unwrap();
        eventually("the server listens", || {
            // It is there a moment before it listens.
            thread.is_finished() || ask(&self.config.control).is_some() && socket.exists()
        });
    }

    pub fn status(&self) -> Status {
        wrenn_memory::ask(&self.config.control, Request::Status, PATIENCE).unwrap()
    }

    pub fn request(&self, request: Request) -> Status {
        wrenn_memory::ask(&self.config.control, request, PATIENCE).unwrap()
    }

    pub fn wait_for(&self, state: State) -> Status {
        eventually(&format!("{state:?}"), || self.status().state == state);
        self.status()
    }

    /// How it ended, in bounded time.
    pub fn end(mut self) -> Result<Counts, ServeError> {
        match self.done.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Timeout) => panic!("the server does not end"),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
        }
        let result = self.thread.take().unwrap().join().unwrap();
        for socket in [&self.config.socket, &self.config.control] {
            assert!(!socket.exists(), "{socket:?} is left");
        }
        let told = status_file(&self.config.status);
        match &result {
            Ok(counts) => {
                assert_eq!((told.state, &told.counts), (State::Ended, counts));
            }
            Err(error) => {
                assert_eq!(told.state, State::Failed);
                assert_eq!(told.reason, Some(error.reason()));
            }
        }
        result
    }
}

pub fn status_file(path: &Path) -> Status {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The status, if there is a server.
pub fn ask(control: &Path) -> Option<Status> {
    wrenn_memory::ask(control, Request::Status, PATIENCE).ok()
}

pub fn eventually(what: &str, mut fine: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !fine() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A guest, see [`guest`]. Killed when it is dropped.
pub struct Guest {
    child: Child,
    commands: Option<ChildStdin>,
    answers: Receiver<String>,
}

impl Guest {
    pub fn start(socket: &Path, pages: u64, parts: usize) -> Guest {
        let guest = Guest::start_how(socket, pages, parts, "well");
        assert_eq!(guest.answer().as_deref(), Some("ready"));
        guest
    }

    /// One that hands over its memory in the way `how`.
    pub fn start_how(socket: &Path, pages: u64, parts: usize, how: &str) -> Guest {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("--guest")
            .arg(socket)
            .args([&pages.to_string(), &parts.to_string(), how])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (tell, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                if line.is_err() || tell.send(line.unwrap()).is_err() {
                    break;
                }
            }
        });
        Guest {
            commands: child.stdin.take(),
            child,
            answers,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn send(&mut self, command: &str) {
        writeln!(self.commands.as_mut().unwrap(), "{command}").unwrap();
    }

    /// The next answer; `None` if it has ended. Never waits for ever.
    pub fn answer(&self) -> Option<String> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the guest hangs"),
        }
    }

    pub fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer()
            .unwrap_or_else(|| panic!("the guest ended at {command:?}"))
    }

    /// Lets it end by itself.
    pub fn end(mut self) {
        drop(self.commands.take());
        assert!(self.child.wait().unwrap().success());
    }

    /// Waits for its end, and gives the signal if it was one.
    pub fn let_go(mut self) -> Option<i32> {
        drop(self.commands.take());
        self.killed_by()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The signal it was ended by.
    pub fn killed_by(mut self) -> Option<i32> {
        use std::os::unix::process::ExitStatusExt;
        eventually("the guest ends", || {
            self.child.try_wait().unwrap().is_some()
        });
        self.child.wait().unwrap().signal()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
