//! One Firecracker that runs: a client of it, and a watch on its end.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::Cloning;
use super::api::{Api, ApiError};
use super::drives::{DiskInJail, layer_in};
use super::files::{BOOT_NAME, blocking};
use super::launch::{
    API_SOCKET, DISK, DRIVE_ID, JAIL, MEMORY_FD, RUN, SAVED_FD, SNAPSHOT_PATIENCE, STATE_FD, VSOCK,
    in_jail,
};
use super::model::{
    Action, BalloonPatch, CreateSnapshot, DriveLimits, DrivePatch, InstanceInfo, InstanceState,
    VmState,
};
use crate::delta::{ChangedPages, DeltaError, FIRMWARE_BYTES, SaveTimes, SavedDelta, Source};
use crate::delta_file::{DELTA_NAME, DeltaFile, SavedPages};
use crate::machine::{ExitReason, MachinePids, MemoryUse, ProcessId, RunState, SavedState};
use crate::memory::MEMORY_NAME;
use crate::record::Monitor;
use crate::supervised::Supervised;
use crate::{DiskLimits, LoadSpec, Machine, MemoryFile, SealedMemory, VmmError};

/// The longest state accepted; that of a machine with one processor has some 20 KB.
const MAX_STATE: u64 = 64 << 20;

/// A machine in Firecracker.
pub struct FirecrackerMachine {
    api: Api,
    process: Supervised,
    origin: Origin,
    /// Where Firecracker writes states.
    state: File,
    disk: Arc<DiskInJail>,
    cloning: Cloning,
    run_state: watch::Sender<RunState>,
    /// It is set up, and its guest was never started.
    unstarted: AtomicBool,
    patience: Duration,
}

/// How a machine came to be, and with it where Firecracker writes memory that is saved.
pub(super) enum Origin {
    /// From a kernel; a save writes all memory into this file.
    Booted(Arc<MemoryFile>),
    /// From a saved machine; each save writes what has changed.
    Restored {
        /// Where it does.
        delta: DeltaFile,
        /// The memory it was restored from; `None` where a page server has it.
        memory: Option<Arc<SealedMemory>>,
    },
    /// From a kernel, and not to become a template: each save writes all memory into this
    /// file, whose holes are zeros.
    BootedPrivate(DeltaFile),
}

impl FirecrackerMachine {
    /// A machine that was just started; its processors do not run.
    pub(super) fn new(
        api: Api,
        process: Supervised,
        origin: Origin,
        state: File,
        disk: Arc<DiskInJail>,
        cloning: Cloning,
        patience: Duration,
    ) -> FirecrackerMachine {
        FirecrackerMachine {
            api,
            process,
            origin,
            state,
            disk,
            cloning,
            run_state: watch::Sender::new(RunState::Stopped),
            unstarted: AtomicBool::new(false),
            patience,
        }
    }

    /// Its guest is yet to be started, by the first [`Machine::resume`].
    pub(super) fn set_unstarted(&self) {
        self.unstarted.store(true, Ordering::Release);
    }

    /// Takes over the machine of an earlier agent; `None` when there is none or it is dead.
    pub(super) async fn adopt(
        dir: &Path,
        cloning: Cloning,
        patience: Duration,
    ) -> Result<Option<FirecrackerMachine>, VmmError> {
        let Some(process) = Supervised::adopt(dir, Monitor::Firecracker)? else {
            return Ok(None);
        };
        let vmm = process.pids().vmm;
        let lost = |source| VmmError::Process {
            what: "the memory files",
            pid: vmm.pid,
            source,
        };
        let state = inherited(vmm, STATE_FD).map_err(lost)?;
        let origin = find_origin(vmm).map_err(lost)?;
        let disk = {
            let (cloning, dir) = (cloning.clone(), dir.to_owned());
            blocking(move || DiskInJail::adopt(&cloning, &dir)).await?
        };
        let machine = FirecrackerMachine::new(
            Api::new(dir.join(JAIL).join(RUN), API_SOCKET),
            process,
            origin,
            state,
            Arc::new(disk),
            cloning,
            patience,
        );
        let info: InstanceInfo = machine.get("its adoption", "/").await?;
        match info.state {
            InstanceState::Running => machine.set_running(true),
            InstanceState::Paused => {}
            InstanceState::NotStarted => machine.set_unstarted(),
        }
        Ok(Some(machine))
    }

    /// Marks the machine as somebody's: from here on dropping its handle leaves it alive.
    pub(super) fn claim(self) -> FirecrackerMachine {
        self.process.claim();
        self
    }

    pub(super) fn api(&self) -> &Api {
        &self.api
    }

    pub(super) fn set_running(&self, runs: bool) {
        self.run_state.send_replace(match runs {
            true => RunState::Running,
            false => RunState::Stopped,
        });
    }

    /// The machine, or its end if a step of its start failed.
    pub(super) async fn or_end(
        self,
        step: Result<(), VmmError>,
    ) -> Result<FirecrackerMachine, VmmError> {
        let Err(error) = step else {
            return Ok(self);
        };
        // What is reported is why it could not start; a machine that also does not die is
        // found by its record.
        if let Err(error) = self.process.kill().await {
            tracing::warn!(%error, "a machine that could not be started was not ended");
        }
        Err(error)
    }

    /// Asks for something.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        doing: &'static str,
        path: &str,
    ) -> Result<T, VmmError> {
        let result = self.api.get(path, self.patience).await;
        self.explain(doing, result).await
    }

    /// Sets or does something.
    pub(super) async fn put(
        &self,
        doing: &'static str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), VmmError> {
        let result = self.api.put(path, body, self.patience).await;
        self.explain(doing, result).await
    }

    /// Changes something.
    async fn patch(
        &self,
        doing: &'static str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<(), VmmError> {
        let result = self.api.patch(path, body, self.patience).await;
        self.explain(doing, result).await
    }

    /// An end of Firecracker is told as such.
    pub(super) async fn explain<T>(
        &self,
        doing: &'static str,
        result: Result<T, ApiError>,
    ) -> Result<T, VmmError> {
        match result {
            Ok(value) => Ok(value),
            Err(source @ (ApiError::Closed(_) | ApiError::Connect { .. })) => {
                match self.process.ended_soon().await {
                    Some(reason) => Err(VmmError::Ended { doing, reason }),
                    None => Err(VmmError::Api { doing, source }),
                }
            }
            Err(source) => Err(VmmError::Api { doing, source }),
        }
    }

    /// Has Firecracker write state and memory; the machine is stopped.
    async fn create_snapshot(&self, kind: &'static str) -> Result<(), VmmError> {
        let create = CreateSnapshot {
            snapshot_type: kind,
            snapshot_path: in_jail(STATE_FD),
            mem_file_path: in_jail(SAVED_FD),
        };
        let patience = SNAPSHOT_PATIENCE.max(self.patience);
        let result = self.api.put("/snapshot/create", &create, patience).await;
        match self.explain("saving its state", result).await {
            Err(VmmError::Api {
                source: ApiError::Refused { message, .. },
                ..
            }) => Err(VmmError::State {
                doing: "saved",
                why: message,
            }),
            other => other,
        }
    }

    /// The state that was just written.
    fn written_state(&self) -> Result<Vec<u8>, VmmError> {
        let failed = |why: String| VmmError::State {
            doing: "saved",
            why,
        };
        let read = || -> io::Result<Vec<u8>> {
            let bytes = self.state.metadata()?.len();
            if bytes == 0 || bytes > MAX_STATE {
                return Err(io::Error::other(format!("Firecracker wrote {bytes} bytes")));
            }
            let mut state = vec![0; bytes as usize];
            self.state.read_exact_at(&mut state, 0)?;
            Ok(state)
        };
        read().map_err(|error| failed(error.to_string()))
    }

    /// Asks the guest for `mib` MiB of its memory; it gives what it can. Only where the driver
    /// was told to give machines a balloon. Pages of it read as zeros when they come back.
    pub async fn set_balloon(&self, mib: u64) -> Result<(), VmmError> {
        let size = BalloonPatch { amount_mib: mib };
        self.patch("resizing its balloon", "/balloon", &size).await
    }

    /// The socket behind which the guest's vsock is, as Firecracker documents it (`CONNECT
    /// PORT`). Only where the driver was told to give machines one.
    pub fn vsock_path(&self) -> PathBuf {
        self.process.dir().join(JAIL).join(RUN).join(VSOCK)
    }
}

#[async_trait]
impl Machine for FirecrackerMachine {
    async fn load(&self, _spec: LoadSpec) -> Result<(), VmmError> {
        Err(super::no_standby("load a state into a machine that runs"))
    }

    async fn resume(&self) -> Result<(), VmmError> {
        if self.unstarted.load(Ordering::Acquire) {
            let action = Action {
                action_type: "InstanceStart",
            };
            self.put("starting the guest", "/actions", &action).await?;
            self.unstarted.store(false, Ordering::Release);
            self.set_running(true);
            return Ok(());
        }
        let resumed = VmState { state: "Resumed" };
        self.patch("starting its processors", "/vm", &resumed)
            .await?;
        self.set_running(true);
        Ok(())
    }

    async fn stop(&self) -> Result<(), VmmError> {
        if self.unstarted.load(Ordering::Acquire) {
            return Ok(());
        }
        let paused = VmState { state: "Paused" };
        self.patch("halting its processors", "/vm", &paused).await?;
        self.set_running(false);
        Ok(())
    }

    async fn save_state(&self, out: File) -> Result<SavedState, VmmError> {
        let began = Instant::now();
        let Origin::Booted(memory) = &self.origin else {
            return Err(VmmError::Unsupported {
                monitor: "Firecracker",
                what: "save a restored machine as a template",
                why: "its memory is not in a memory file of its own; use `save_delta`".into(),
            });
        };
        self.stop().await?;
        self.create_snapshot("Full").await?;
        let state = self.written_state()?;
        let bytes = state.len() as u64;
        let memory = memory.clone();
        blocking(move || {
            // Firecracker wrote out what the guest never touched, too.
            memory.drop_zeros()?;
            let written = io::Write::write_all(&mut &out, &state);
            written.map_err(|error| VmmError::State {
                doing: "saved",
                why: error.to_string(),
            })
        })
        .await?;
        Ok(SavedState {
            bytes,
            took: began.elapsed(),
        })
    }

    async fn save_delta(&self) -> Result<SavedDelta, VmmError> {
        let pid = self.process.pids().vmm.pid;
        let failed = |source| VmmError::Delta {
            doing: "read",
            source,
        };
        let (delta, memory, whole) = match &self.origin {
            Origin::Booted(_) => return Err(failed(DeltaError::NoTemplate { pid })),
            Origin::Restored { delta, memory } => (delta, memory, false),
            Origin::BootedPrivate(all) => (all, &None, true),
        };
        let began = Instant::now();
        self.stop().await?;
        let stop = began.elapsed();
        // A diff is merged by Firecracker into what earlier saves left there.
        self.create_snapshot(if whole { "Full" } else { "Diff" })
            .await?;
        let state = self.written_state()?;
        let saved = began.elapsed();
        let delta = delta
            .share()
            .and_then(|file| DeltaFile::from_file(file.into()))
            .map_err(|source| VmmError::Process {
                what: "the changed memory",
                pid,
                source,
            })?;
        let memory = match memory {
            Some(memory) => Some(memory.another().map_err(|error| failed(error.into()))?),
            None => None,
        };
        let ranges = match whole {
            true => delta.all(),
            false => delta.ranges().map_err(failed)?,
        };
        let pages = SavedPages::new(delta, memory, ranges.clone());
        Ok(SavedDelta {
            state,
            firmware: Box::new([0; FIRMWARE_BYTES]),
            pages: ChangedPages::new(Source::File(pages), self.run_state(), ranges),
            times: SaveTimes {
                stop,
                state: saved - stop,
                firmware: Duration::ZERO,
                scan: began.elapsed() - saved,
            },
        })
    }

    async fn switch_disk_layer(&self, top: &Path) -> Result<(), VmmError> {
        let was = *self.run_state.borrow();
        // The guest must not write between the copy and the switch.
        self.stop().await?;
        let switched = self.put_layer(top).await;
        if was == RunState::Running {
            self.resume().await?;
        }
        switched
    }

    async fn replace_layers(
        &self,
        _replaced: usize,
        _kept: usize,
        _layers: &[PathBuf],
    ) -> Result<(), VmmError> {
        let why = "each of Firecracker's layers is a whole disk, and lies on none that is merged";
        Err(VmmError::Spec(why.into()))
    }

    fn written_layer(&self, layers: &[PathBuf]) -> Result<usize, VmmError> {
        let vmm = self.process.pids().vmm;
        let written = match self.disk.written_by_kernel() {
            Ok(Some(layer)) => Ok(HashSet::from([layer])),
            Ok(None) => open_files(vmm),
            Err(error) => Err(error),
        };
        let written = written.map_err(|source| VmmError::Process {
            what: "the open files",
            pid: vmm.pid,
            source,
        })?;
        find_layer(layers, |identity| written.contains(&identity))
    }

    fn run_state(&self) -> watch::Receiver<RunState> {
        self.run_state.subscribe()
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.process.exited()
    }

    async fn kill(&self) -> Result<ExitReason, VmmError> {
        self.process.kill().await
    }

    fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, VmmError> {
        self.process.console_tail(bytes)
    }

    fn pids(&self) -> MachinePids {
        self.process.pids()
    }

    async fn memory_use(&self) -> Result<MemoryUse, VmmError> {
        self.process.memory_use()
    }
}

impl FirecrackerMachine {
    /// Fills the layer with the disk as it is, and has Firecracker open it.
    async fn put_layer(&self, top: &Path) -> Result<(), VmmError> {
        let (disk, cloning, layer) = (self.disk.clone(), self.cloning.clone(), top.to_owned());
        let Some(before) = blocking(move || disk.switch(&cloning, &layer)).await? else {
            return Ok(());
        };
        let opened = self.open_disk().await;
        // One that is not opened is not written to: the old one is found by its name again.
        before.end(opened.is_ok())?;
        opened.map_err(|error| match error {
            VmmError::Api { source, .. } => VmmError::DiskLayer {
                path: top.to_owned(),
                why: format!("{source}; the disk is as it was"),
            },
            other => other,
        })
    }

    /// Limits what the guest reads and writes per second, of its own and apart from what the host
    /// does with its disk.
    pub(super) async fn limit_disk(&self, limits: DiskLimits) -> Result<(), VmmError> {
        let limits = DriveLimits {
            drive_id: DRIVE_ID,
            rate_limiter: limits.into(),
        };
        let path = format!("/drives/{DRIVE_ID}");
        self.patch("limiting its disk", &path, &limits).await
    }

    /// Has Firecracker open the disk that is in its jail now.
    async fn open_disk(&self) -> Result<(), VmmError> {
        let drive = DrivePatch {
            drive_id: DRIVE_ID,
            path_on_host: &format!("/{DISK}"),
        };
        let path = format!("/drives/{DRIVE_ID}");
        self.patch("opening its new disk", &path, &drive).await
    }
}

/// Device and number of the files that a process has open.
fn open_files(process: ProcessId) -> io::Result<HashSet<(u64, u64)>> {
    let mut open = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{}/fd", process.pid))? {
        // One that was closed meanwhile is not open.
        if let Ok(file) = std::fs::metadata(entry?.path()) {
            open.insert((file.dev(), file.ino()));
        }
    }
    Ok(open)
}

/// The highest of these layers of which `written` holds, given device and number of its file.
fn find_layer(layers: &[PathBuf], written: impl Fn((u64, u64)) -> bool) -> Result<usize, VmmError> {
    for (index, layer) in layers.iter().enumerate().rev() {
        let file = std::fs::metadata(layer).map_err(|source| VmmError::File {
            what: "cannot look at the disk",
            path: layer.clone(),
            source,
        })?;
        if written((file.dev(), file.ino())) {
            return Ok(index);
        }
    }
    Err(VmmError::Spec(format!(
        "none of {} layers is its disk",
        layers.len()
    )))
}

/// What [`Machine::written_layer`] would tell of a machine in folder `dir` that has ended,
/// whatever monitor ran it.
pub fn left_layer(dir: &Path, layers: &[PathBuf]) -> Result<usize, VmmError> {
    match layer_in(dir) {
        Ok(top) => find_layer(layers, |identity| identity == top),
        // QEMU's, where a layer that was not switched to holds nothing.
        Err((_, error)) if error.kind() == io::ErrorKind::NotFound && !layers.is_empty() => {
            Ok(layers.len() - 1)
        }
        Err((path, source)) => Err(VmmError::File {
            what: "cannot look at the disk",
            path,
            source,
        }),
    }
}

/// A memory file of a running monitor.
fn inherited(process: ProcessId, fd: i32) -> io::Result<File> {
    // A sealed one can be opened for writing as well.
    File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/fd/{fd}", process.pid))
}

/// How a machine came to be, from its monitor's descriptors.
fn find_origin(vmm: ProcessId) -> io::Result<Origin> {
    let name = |fd: i32| -> io::Result<String> {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", vmm.pid))?;
        Ok(link.to_string_lossy().into_owned())
    };
    let is = |name: &str, wanted: &str| {
        name.strip_prefix("/memfd:")
            .is_some_and(|name| name.split(' ').next() == Some(wanted))
    };
    let saved = name(SAVED_FD)?;
    if is(&saved, MEMORY_NAME) {
        let memory = MemoryFile::from_file(inherited(vmm, SAVED_FD)?)?;
        return Ok(Origin::Booted(Arc::new(memory)));
    }
    if !is(&saved, DELTA_NAME) {
        return Err(io::Error::other(format!(
            "descriptor {SAVED_FD} is {saved:?}"
        )));
    }
    let delta = DeltaFile::from_file(inherited(vmm, SAVED_FD)?)?;
    let loaded = name(MEMORY_FD)?;
    if is(&loaded, BOOT_NAME) {
        return Ok(Origin::BootedPrivate(delta));
    }
    let memory = match is(&loaded, MEMORY_NAME) {
        true => Some(Arc::new(SealedMemory::from_file(inherited(
            vmm, MEMORY_FD,
        )?)?)),
        false => None,
    };
    Ok(Origin::Restored { delta, memory })
}
