//! The traits a driver implements, and what goes in and comes out of them.

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use wrenn_types::Shape;

use crate::{Delta, LayerFormat, MemoryFile, SavedDelta, SealedMemory, VmmError, VmmInfo};

/// Length of the identity page given to each machine through `fw_cfg`. Fixed, since a
/// restored guest keeps the length it saw at boot.
pub const IDENTITY_BYTES: usize = 4096;

/// A virtual machine monitor: makes machines, and finds those of an earlier agent again.
#[async_trait]
pub trait Vmm: Send + Sync {
    /// What runs the machines and why.
    fn info(&self) -> &VmmInfo;

    /// Boots a machine cold; it is running when this returns. Its memory is shared with
    /// `spec.memory`, so that it can become a template.
    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Machine>, VmmError>;

    /// Boots a machine cold whose memory [`Machine::save_delta`] can tell as a change of
    /// memory that others share, as that of a restored one: QEMU boots it over that memory,
    /// which it only reads (a kernel takes memory as it finds it, as after the reset button).
    /// Stopped before its first instruction when this returns.
    async fn boot_private(
        &self,
        machine: MachineSpec,
        memory: Arc<SealedMemory>,
    ) -> Result<Arc<dyn Machine>, VmmError>;

    /// Loads a saved machine; it is stopped when this returns, and [`Machine::resume`]
    /// starts it.
    async fn restore(&self, spec: RestoreSpec) -> Result<Arc<dyn Machine>, VmmError>;

    /// Loads a machine that [`Machine::save_delta`] saved: `spec.memory` is the memory of the
    /// template it came from and `spec.state` the state then. Stopped when this returns.
    async fn restore_delta(
        &self,
        spec: RestoreSpec,
        delta: Delta,
    ) -> Result<Arc<dyn Machine>, VmmError>;

    /// Starts the monitor of a machine over `memory` before it is known which state that is
    /// restored with. It stands by for [`Machine::load`], and cannot run before. Only where
    /// [`VmmInfo::stands_by`].
    async fn stand_by(
        &self,
        machine: MachineSpec,
        memory: Arc<SealedMemory>,
    ) -> Result<Arc<dyn Machine>, VmmError>;

    /// Loads a saved machine whose memory comes from a page server (userfaultfd). Stopped when
    /// this returns. [`Machine::save_delta`] then tells what changed since this restore.
    async fn restore_served(&self, spec: ServedSpec) -> Result<Arc<dyn Machine>, VmmError>;

    /// Makes an empty layer for a disk of `disk_bytes` at `path`, which must not exist: the
    /// top of a machine to start, or of [`Machine::switch_disk_layer`].
    fn create_layer(&self, path: &Path, disk_bytes: u64) -> Result<(), VmmError>;

    /// Takes over the machine that an earlier agent left running in folder `dir`; `None`
    /// when there is none, or it is dead.
    async fn adopt(&self, dir: &Path) -> Result<Option<Arc<dyn Machine>>, VmmError>;
}

/// One machine. Dropping the handle does not end it.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Loads a state into a machine that stands by, once; it is stopped when this returns. One
    /// that could not be loaded is of no more use: [`Machine::kill`] it.
    async fn load(&self, spec: LoadSpec) -> Result<(), VmmError>;

    /// Lets the processors run.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Halts the processors; devices are quiet when this returns.
    async fn stop(&self) -> Result<(), VmmError>;

    /// Stops the machine if it runs and writes all of its state but the memory to `out`.
    /// It cannot be resumed afterwards: [`Machine::kill`] it and seal its memory.
    async fn save_state(&self, out: File) -> Result<SavedState, VmmError>;

    /// Stops a restored machine if it runs, and saves all that it has changed since the
    /// template. It stays stopped: read the pages, then [`Machine::resume`] or
    /// [`Machine::kill`] it. It can be saved any number of times, and goes on unchanged if
    /// saving fails.
    async fn save_delta(&self) -> Result<SavedDelta, VmmError>;

    /// Gets the empty layer `top` ready for [`Machine::switch_disk_layer`], which is quicker then:
    /// for whoever stops the machine for the switch. Nothing changes for the guest. A machine has
    /// one such layer at most. Of a layer that is not used after all, see
    /// [`Machine::forget_disk_layer`].
    ///
    /// # Errors
    /// Those of the switch, as far as they can be met before it.
    async fn add_disk_layer(&self, _top: &Path) -> Result<(), VmmError> {
        Ok(())
    }

    /// Lets go of a layer that was added and not switched to. Of any other it does nothing.
    async fn forget_disk_layer(&self, _top: &Path) {}

    /// Puts the empty layer `top` (see [`Vmm::create_layer`]) on the disk, so that the
    /// layer written so far never changes again and others may build on it. It works on a
    /// running machine, and belongs between [`Machine::save_delta`] and
    /// [`Machine::resume`] when disk and memory shall be of one moment.
    ///
    /// All of the old layer has been handed to the host's kernel when this returns; that it
    /// reaches the platter is left to the caller's `fsync` of its file. If this fails before
    /// the switch the disk is as before.
    async fn switch_disk_layer(&self, top: &Path) -> Result<(), VmmError>;

    /// Has the disk go on from other layers that hold the same: `layers`, lowest first, instead of
    /// the `replaced` layers below its top; of the `kept` layers below those the lowest is the
    /// base. It works on a running machine, whose guest does not notice.
    ///
    /// # Errors
    /// The disk has another number of layers, a file cannot be opened, or this is a monitor whose
    /// disks are not layered. The disk is as before then.
    async fn replace_layers(
        &self,
        replaced: usize,
        kept: usize,
        layers: &[PathBuf],
    ) -> Result<(), VmmError>;

    /// Which of these layers, files of the machine with the lowest first, it writes to. Those
    /// above were prepared for a switch that was not done, and are no part of the disk.
    fn written_layer(&self, layers: &[PathBuf]) -> Result<usize, VmmError>;

    /// Whether the processors run, as last reported by the monitor.
    fn run_state(&self) -> watch::Receiver<RunState>;

    /// How the machine ended; `None` while it lives. Changes the moment it dies.
    fn exited(&self) -> watch::Receiver<Option<ExitReason>>;

    /// Ends the machine and returns once it is gone. Idempotent: a machine that has ended
    /// tells its reason again.
    async fn kill(&self) -> Result<ExitReason, VmmError>;

    /// The last `bytes` bytes that the guest wrote to its console, also after its death.
    fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, VmmError>;

    /// The processes that make up the machine.
    fn pids(&self) -> MachinePids;

    /// Memory on the host that this machine shares with no other.
    async fn memory_use(&self) -> Result<MemoryUse, VmmError>;

    /// The error for a machine that showed no sign of life within `waited`, with the end of
    /// its console. The caller, who knows what readiness is, kills and tries again.
    fn stalled(&self, waited: Duration) -> VmmError {
        let tail = match self.console_tail(2048) {
            Ok(tail) => String::from_utf8_lossy(&tail).into_owned(),
            Err(error) => format!("(console not readable: {error})"),
        };
        VmmError::BootStalled {
            waited,
            console: tail,
        }
    }
}

/// What every machine needs.
#[derive(Debug)]
pub struct MachineSpec {
    /// The machine's folder: exists, mode 0700, owned by the agent.
    pub dir: PathBuf,
    /// User the monitor runs as.
    pub uid: u32,
    /// Group the monitor runs as.
    pub gid: u32,
    /// Processors and memory.
    pub shape: Shape,
    /// What is booted. A restore only reads the command line.
    pub boot: BootFiles,
    /// The root disk, `/dev/vda` in the guest.
    pub disk: DiskChain,
    /// What the monitor lets the guest do with it.
    pub disk_limits: DiskLimits,
    /// The tap of `eth0`, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`; `None` for a
    /// machine without a network. Firecracker opens taps itself, by name: the driver reads name
    /// and network namespace from this descriptor, closes it (it must be the only one), and runs
    /// Firecracker in that namespace. The tap must be one that stays (`TUNSETPERSIST`).
    pub tap: Option<OwnedFd>,
    /// Hardware address of `eth0`.
    pub mac: [u8; 6],
    /// What the guest reads under `fw_cfg` name `opt/wrenn/restore` in QEMU. In Firecracker it
    /// is the whole document of the metadata service (MMDS, version 2) at 169.254.87.1, so it must
    /// be JSON padded with zeros, and a machine without a network has none.
    pub identity: Box<[u8; IDENTITY_BYTES]>,
    /// Descriptors for the keeper's companions (the slot's DNS relay).
    pub companions: Vec<OwnedFd>,
}

/// What a machine may use of the disk; nothing said: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Bytes per second that it may read, and as many that it may write (Firecracker: together).
    pub bytes_per_sec: Option<u64>,
    /// Reads per second, and as many writes (Firecracker: together).
    pub operations_per_sec: Option<u64>,
}

impl DiskLimits {
    /// Whether nothing is limited.
    pub fn is_none(self) -> bool {
        self == DiskLimits::default()
    }
}

impl MachineSpec {
    /// Whether a memory of `bytes` bytes is that of the shape.
    pub(crate) fn check_memory(&self, bytes: u64) -> Result<(), VmmError> {
        let asked = self.shape.memory.bytes();
        if asked == bytes {
            return Ok(());
        }
        Err(VmmError::Spec(format!(
            "its shape has {asked} bytes of memory and its memory file {bytes}"
        )))
    }
}

/// The guest's kernel.
#[derive(Debug, Clone)]
pub struct BootFiles {
    /// A bzImage for QEMU; for Firecracker the ELF file inside one (`vmlinux`).
    pub kernel: PathBuf,
    /// A cpio archive, compressed or not.
    pub initramfs: PathBuf,
    /// The kernel's command line. Under TCG it must hold `tsc_early_khz=` with
    /// [`crate::Fingerprint::tsc_khz`], or one cold boot in three hangs.
    pub cmdline: String,
}

/// The root disk: immutable layers and one that is written.
///
/// With QEMU the layers are qcow2 files, each with what differs from those below. With
/// Firecracker only the highest matters: it is a whole raw image (its unchanged parts shared with
/// the one below where the file system can do that), or has all that differs from the highest
/// raw image below it.
#[derive(Debug, Clone)]
pub struct DiskChain {
    /// Raw image at the bottom, never written.
    pub base: PathBuf,
    /// Layers on it, lowest first, never written.
    pub layers: Vec<DiskLayer>,
    /// Layer on top that takes all writes; see [`Vmm::create_layer`].
    pub top: PathBuf,
}

/// A layer of a disk that is never written again.
#[derive(Debug, Clone)]
pub struct DiskLayer {
    /// Its file.
    pub path: PathBuf,
    /// How it is written.
    pub format: LayerFormat,
}

impl DiskLayer {
    /// The layer in a file.
    pub fn new(format: LayerFormat, path: impl Into<PathBuf>) -> DiskLayer {
        DiskLayer {
            path: path.into(),
            format,
        }
    }
}

/// A machine to boot.
#[derive(Debug)]
pub struct BootSpec {
    /// The machine.
    pub machine: MachineSpec,
    /// Its memory, of exactly the shape's size.
    pub memory: Arc<MemoryFile>,
}

/// A machine to restore.
#[derive(Debug)]
pub struct RestoreSpec {
    /// The machine; shape, disk size, presence of a tap and hardware address as at the save.
    pub machine: MachineSpec,
    /// The memory at the save, mapped privately.
    pub memory: Arc<SealedMemory>,
    /// The state that [`Machine::save_state`] wrote, open for reading at its start; with
    /// [`Vmm::restore_delta`] that of [`Machine::save_delta`], as from
    /// [`crate::state_file`].
    pub state: File,
}

/// What a machine that stands by becomes.
pub struct LoadSpec {
    /// Disk layers, lowest first, between those that it was started with and its top, to which
    /// nothing was written.
    pub layers: Vec<PathBuf>,
    /// The memory that it was started over.
    pub memory: Arc<SealedMemory>,
    /// As [`RestoreSpec::state`].
    pub state: File,
    /// What its memory has changed since the template; `None` for the template itself.
    pub delta: Option<Delta>,
}

/// A machine to restore from a page server.
#[derive(Debug)]
pub struct ServedSpec {
    /// The machine; as in [`RestoreSpec::machine`].
    pub machine: MachineSpec,
    /// The page server's socket, on which it waits for the userfaultfd descriptor of just this
    /// machine. The machine's user must be able to connect to it (connect(2) asks for the right
    /// to write); it sees it as a socket of its own, whatever folders lie above it.
    pub socket: PathBuf,
    /// The page server's process, see pidfd_open(2). The machine's keeper ends the machine when
    /// that process ends first: a page that nobody serves would be waited for for ever.
    pub server: OwnedFd,
    /// The state at the save, open for reading at its start.
    pub state: File,
}

/// What [`Machine::save_state`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedState {
    /// Length of the state in bytes.
    pub bytes: u64,
    /// How long it took, the stop included.
    pub took: Duration,
}

/// Whether the guest's processors run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// They run.
    Running,
    /// They are halted.
    Stopped,
}

/// A process, told apart from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProcessId {
    /// Number of the process.
    pub pid: u32,
    /// Clock ticks after the host's boot; field 22 of `/proc/PID/stat`, proc(5).
    pub start_time: u64,
}

/// The processes of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MachinePids {
    /// Its keeper.
    pub keeper: ProcessId,
    /// The monitor.
    pub vmm: ProcessId,
}

/// Memory that belongs to one machine alone, in bytes (`Private_*` of `smaps_rollup`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Of the monitor, guest pages that were written included.
    pub vmm: u64,
    /// Of the keeper.
    pub keeper: u64,
}

impl MemoryUse {
    /// Both together.
    pub fn total(self) -> u64 {
        self.vmm + self.keeper
    }
}

/// How a machine's monitor ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ExitCause {
    /// By itself, with this status. 0 when the guest powered off, rebooted or panicked.
    Status(i32),
    /// By a signal; 9 after [`Machine::kill`], 31 when it broke its system call filter.
    Signal(i32),
    /// Nobody saw it: the keeper was killed too, or the host went down.
    Unseen,
}

/// How and when a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ExitReason {
    /// How.
    pub cause: ExitCause,
    /// When, in milliseconds since 1970; when it was noticed, if nobody saw it.
    pub at_unix_ms: u64,
    /// The end of what the monitor wrote to its standard error.
    pub stderr: String,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            ExitCause::Status(0) => f.write_str("the guest powered off")?,
            ExitCause::Status(code) => write!(f, "the monitor exited with status {code}")?,
            ExitCause::Signal(signal) => write!(f, "the monitor was ended by signal {signal}")?,
            ExitCause::Unseen => f.write_str("the machine ended while nobody watched")?,
        }
        match self.stderr.trim() {
            "" => Ok(()),
            stderr => write!(f, ": {stderr}"),
        }
    }
}
