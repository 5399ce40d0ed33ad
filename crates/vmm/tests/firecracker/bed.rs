//! What all tests need: the driver, folders, specifications, and a look into a machine's
//! memory from outside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    BootFiles, BootSpec, CloneWay, DiskChain, DiskLayer, DiskLimits, FirecrackerConfig,
    FirecrackerVmm, IDENTITY_BYTES, Launcher, LayerFormat, Machine, MachinePids, MachineSpec,
    MemoryFile, RestoreSpec, RunState, SealedMemory, Vmm, probe,
};

use crate::guest;

pub const SHAPE: Shape = Shape {
    vcpus: Vcpus(1),
    memory: MemoryMib(64),
};

/// Size of the disk, of which the guest knows nothing.
pub const DISK_BYTES: u64 = 1 << 20;

/// A place for machines; what is in it goes with it.
pub struct Bed {
    pub vmm: FirecrackerVmm,
    dir: TempDir,
}

/// The program that tests start as keeper and as agent.
pub fn harness() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let built = this.parent().unwrap().parent().unwrap();
    built.join("examples/harness")
}

impl Bed {
    /// `None`, and a line that says so, where there is no Firecracker.
    pub fn new() -> Option<Bed> {
        // What its machines write is looked for in raw images.
        Bed::with(|config| config.cloning.way = CloneWay::Copy)
    }

    /// The same with a configuration of its own.
    pub fn with(change: impl FnOnce(&mut FirecrackerConfig)) -> Option<Bed> {
        if std::env::var_os("FIRECRACKER_BIN").is_none() {
            println!("skipped: FIRECRACKER_BIN is not set");
            return None;
        }
        if std::env::var_os("WRENN_TEST_LOG").is_some() {
            // Another test may have been first.
            let _ = tracing_subscriber::fmt()
                .with_max_level(tracing::Level::DEBUG)
                .with_writer(std::io::stderr)
                .try_init();
        }
        let dir = tempfile::tempdir().unwrap();
        let report = probe::host(None).unwrap();
        let launcher = Launcher {
            program: harness(),
            args: vec!["keeper".into()],
        };
        let why = "a test asks for it".into();
        let mut config =
            FirecrackerConfig::from_report(&report, why, launcher, dir.path()).unwrap();
        change(&mut config);
        fs::write(dir.path().join("kernel"), guest::working()).unwrap();
        fs::write(dir.path().join("resetting"), guest::resetting()).unwrap();
        fs::write(dir.path().join("initramfs"), [0; 4096]).unwrap();
        let disk = File::create(dir.path().join("base.img")).unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        disk.write_all_at(b"base", 0).unwrap();
        Some(Bed {
            vmm: FirecrackerVmm::new(config),
            dir,
        })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A machine's folder with its top layer in it.
    pub fn folder(&self, name: &str) -> PathBuf {
        let dir = self.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        self.vmm
            .create_layer(&dir.join("disk.raw"), DISK_BYTES)
            .unwrap();
        dir
    }

    /// The specification of a machine in `dir`.
    pub fn spec(&self, dir: &Path, uid: u32) -> MachineSpec {
        MachineSpec {
            dir: dir.to_owned(),
            uid,
            gid: uid,
            shape: SHAPE,
            boot: BootFiles {
                kernel: self.path().join("kernel"),
                initramfs: self.path().join("initramfs"),
                cmdline: "console=ttyS0".into(),
            },
            disk: DiskChain {
                base: self.path().join("base.img"),
                layers: Vec::new(),
                top: dir.join("disk.raw"),
            },
            tap: None,
            mac: [2, 0xfc, 0, 0, 0, 5],
            identity: Box::new([0; IDENTITY_BYTES]),
            disk_limits: DiskLimits::default(),
            companions: Vec::new(),
        }
    }

    /// Boots a machine in a folder of its own.
    pub async fn boot(&self, name: &str, uid: u32) -> (Arc<dyn Machine>, Arc<MemoryFile>) {
        let machine = self.spec(&self.folder(name), uid);
        let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
        let spec = BootSpec {
            machine,
            memory: memory.clone(),
        };
        let began = Instant::now();
        let machine = self.vmm.boot(spec).await.unwrap();
        println!("{name}: booted in {:?}", began.elapsed());
        (machine, memory)
    }

    /// Boots a machine until it has worked for `rounds` rounds, and freezes it.
    pub async fn template(&self, name: &str, uid: u32, rounds: u64) -> Template {
        let (machine, memory) = self.boot(name, uid).await;
        rounds_of(&machine, rounds).await;
        let state = self.path().join(format!("{name}.state"));
        let out = File::create_new(&state).unwrap();
        let saved = machine.save_state(out).await.unwrap();
        println!("{name}: saved {saved:?}");
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        assert_eq!(saved.bytes, fs::metadata(&state).unwrap().len());
        let frozen = View::of(machine.pids());
        let told = settled_round(&machine).await;
        let round = frozen.check(told);
        println!("{name}: told of round {told}, worked {round}");
        machine.kill().await.unwrap();
        let memory = Arc::new(memory.seal().unwrap());
        let mut sealed = vec![0; SHAPE.memory.bytes() as usize];
        memory.read_at(0, &mut sealed).unwrap();
        assert_eq!(frozen.differing(&View(sealed)), [0; 0], "what was saved");
        Template {
            memory,
            state,
            round,
            layer: self.path().join(name).join("disk.raw"),
            frozen,
        }
    }
}

/// A layer that is a whole image.
pub fn raw(path: impl Into<PathBuf>) -> DiskLayer {
    DiskLayer::new(LayerFormat::Raw, path)
}

/// A frozen machine.
pub struct Template {
    pub memory: Arc<SealedMemory>,
    pub state: PathBuf,
    pub layer: PathBuf,
    /// The rounds it has worked.
    pub round: u64,
    /// Its memory then.
    pub frozen: View,
}

impl Template {
    /// What restores a clone in a folder of its own.
    pub fn clone_spec(&self, bed: &Bed, name: &str, uid: u32) -> RestoreSpec {
        let mut machine = bed.spec(&bed.folder(name), uid);
        machine.disk.layers = vec![raw(&self.layer)];
        // A clone needs no kernel: it has one in its memory.
        machine.boot.kernel = "/nonexistent".into();
        machine.boot.initramfs = "/nonexistent".into();
        RestoreSpec {
            machine,
            memory: self.memory.clone(),
            state: File::open(&self.state).unwrap(),
        }
    }
}

fn console(machine: &Arc<dyn Machine>) -> String {
    String::from_utf8_lossy(&machine.console_tail(16 << 10).unwrap()).into_owned()
}

/// The first round that a machine tells, after a line that its save may have cut.
pub async fn first_round(machine: &Arc<dyn Machine>) -> u64 {
    rounds_of(machine, 1).await;
    let console = console(machine);
    let whole = console.lines().find(|line| line.len() == 9);
    u64::from_str_radix(whole.unwrap().strip_prefix('T').unwrap(), 16).unwrap()
}

/// Waits until the guest has worked `at_least` rounds, and returns the newest.
pub async fn rounds_of(machine: &Arc<dyn Machine>, at_least: u64) -> u64 {
    let began = Instant::now();
    loop {
        let console = console(machine);
        if let Some(round) = guest::newest_round(&console).filter(|round| *round >= at_least) {
            return round;
        }
        let ended = machine.exited().borrow().clone();
        assert!(
            ended.is_none() && began.elapsed() < Duration::from_secs(30),
            "{ended:?}, {console:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The newest round that a stopped machine has told, once all it told has arrived.
pub async fn settled_round(machine: &Arc<dyn Machine>) -> u64 {
    let mut before = console(machine);
    loop {
        tokio::time::sleep(Duration::from_millis(30)).await;
        let now = console(machine);
        if now == before {
            return guest::newest_round(&now).unwrap();
        }
        before = now;
    }
}

/// A machine's memory as Firecracker has it.
#[derive(PartialEq, Clone)]
pub struct View(pub Vec<u8>);

const PAGE: usize = 4096;

impl View {
    /// Of a stopped machine.
    pub fn of(pids: MachinePids) -> View {
        View::read(pids, None)
    }

    /// Of a stopped machine whose memory comes from a page server: what it has not asked for
    /// cannot be read from outside, and is what the page server has.
    pub fn of_served(pids: MachinePids, memory: &SealedMemory) -> View {
        View::read(pids, Some(memory))
    }

    fn read(pids: MachinePids, served: Option<&SealedMemory>) -> View {
        let pid = pids.vmm.pid;
        let bytes = SHAPE.memory.bytes();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let file = File::open(format!("/proc/{pid}/mem")).unwrap();
        let program = guest::program();
        // A private mapping, which the kernel may have joined with its neighbours. The guest's
        // program tells where in it the memory is.
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next().unwrap().split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            if fields.next() != Some("rw-p") || end - start < bytes {
                continue;
            }
            let mut mapped = vec![0; (end - start) as usize];
            let mut missing = Vec::new();
            for (index, page) in mapped.chunks_mut(PAGE).enumerate() {
                if let Err(error) = file.read_exact_at(page, start + (index * PAGE) as u64) {
                    assert!(served.is_some(), "{error}");
                    missing.push(index * PAGE);
                }
            }
            let pages = (guest::LOAD_AT as usize..mapped.len()).step_by(PAGE);
            let found = pages.clone().find(|at| mapped[*at..].starts_with(&program));
            if let Some(at) = found {
                let memory = at - guest::LOAD_AT as usize;
                for at in missing.into_iter().filter(|at| *at >= memory) {
                    let page = &mut mapped[at..at + PAGE];
                    served.unwrap().read_at((at - memory) as u64, page).unwrap();
                }
                return View(mapped[memory..][..bytes as usize].to_vec());
            }
        }
        panic!("no memory in {maps}");
    }

    /// Checks the guest's pages, of which it told `told` rounds, and returns the rounds that it
    /// has worked. It may have been stopped within a round.
    pub fn check(&self, told: u64) -> u64 {
        let work = &self.0[guest::WORK_AT as usize..][..guest::WORK_PAGES as usize * PAGE];
        let fits = |round: u64| {
            let expected = guest::expected(round);
            let busy = (round + 1) % guest::WORK_PAGES;
            let pages = work.chunks(PAGE).zip(expected.chunks(PAGE)).enumerate();
            pages
                .filter(|(index, _)| *index as u64 != busy)
                .all(|(_, (found, expected))| found == expected)
        };
        (told..told + 2)
            .find(|round| fits(*round))
            .unwrap_or_else(|| panic!("the memory is not that of round {told}"))
    }

    /// Numbers of the pages that differ.
    pub fn differing(&self, other: &View) -> Vec<usize> {
        assert_eq!(self.0.len(), other.0.len());
        let pages = self.0.chunks(PAGE).zip(other.0.chunks(PAGE)).enumerate();
        let differing = pages.filter(|(_, (ours, theirs))| ours != theirs);
        differing.map(|(page, _)| page).collect()
    }

    /// One page.
    pub fn page(&self, number: u64) -> &[u8] {
        &self.0[number as usize * PAGE..][..PAGE]
    }
}
