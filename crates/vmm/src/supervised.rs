//! The processes of a machine, whatever monitor runs it: held, watched and ended.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::VmmError;
use crate::keeper::unix_ms;
use crate::machine::{ExitCause, ExitReason, MachinePids, MemoryUse, ProcessId};
use crate::process::{Watched, boot_id, identify, private_bytes};
use crate::record::{self, Monitor, Record, read_exit};

/// How long a process may take to vanish after SIGKILL: its memory is taken down first.
pub(crate) const DEATH_PATIENCE: Duration = Duration::from_secs(20);

/// How long the keeper may take to write down an end that was seen.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);

/// How long after a monitor closed its socket its end must show.
const CLOSED_PATIENCE: Duration = Duration::from_secs(5);

/// A machine's processes under watch.
pub(crate) struct Supervised {
    dir: PathBuf,
    pids: MachinePids,
    processes: Arc<Processes>,
    exited: watch::Receiver<Option<ExitReason>>,
    _watcher: Watcher,
}

struct Processes {
    keeper: Option<Watched>,
    vmm: Watched,
    /// Somebody has been given the machine. One that is dropped before, because a step
    /// failed or its caller gave up, must not live on.
    claimed: AtomicBool,
}

impl Drop for Processes {
    fn drop(&mut self) {
        if !self.claimed.load(Ordering::Acquire)
            && let Err(error) = self.vmm.kill()
        {
            tracing::error!(%error, "a machine that nobody was given was not ended");
        }
    }
}

/// The task that waits for the machine's end; ends with its handle.
struct Watcher(JoinHandle<()>);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Supervised {
    /// Takes over processes that were just started. Until [`Supervised::claim`], dropping
    /// this ends them.
    pub(crate) async fn started(dir: PathBuf, pids: MachinePids) -> Result<Supervised, VmmError> {
        match hold(pids)? {
            Some(processes) => Ok(Supervised::watch(dir, pids, processes)),
            None => Err(VmmError::Ended {
                doing: "starting",
                reason: reason_in(&dir, pids, RECORD_PATIENCE).await,
            }),
        }
    }

    /// Takes over the processes that an earlier agent left in `dir`; `None` when there are
    /// none, or they are dead. Dropping this leaves them alive.
    pub(crate) fn adopt(dir: &Path, monitor: Monitor) -> Result<Option<Supervised>, VmmError> {
        let Some(record) = Record::read(dir)? else {
            return Ok(None);
        };
        if record.monitor != monitor {
            return Err(VmmError::Spec(format!(
                "{} runs the machine in {}, not {monitor}",
                record.monitor,
                dir.display()
            )));
        }
        let boot_id = boot_id().map_err(|source| VmmError::Probe {
            what: "its boot id",
            source,
        })?;
        if record.boot_id != boot_id {
            return Ok(None);
        }
        let Some(processes) = hold(record.pids)? else {
            return Ok(None);
        };
        processes.claimed.store(true, Ordering::Release);
        Ok(Some(Supervised::watch(
            dir.to_owned(),
            record.pids,
            processes,
        )))
    }

    fn watch(dir: PathBuf, pids: MachinePids, processes: Processes) -> Supervised {
        let (sender, exited) = watch::channel(None);
        let processes = Arc::new(processes);
        let watching = watch_end(dir.clone(), processes.clone(), sender);
        Supervised {
            dir,
            pids,
            processes,
            exited,
            _watcher: Watcher(tokio::spawn(watching)),
        }
    }

    /// Marks the machine as somebody's: from here on dropping the handle leaves it alive.
    pub(crate) fn claim(&self) {
        self.processes.claimed.store(true, Ordering::Release);
    }

    /// The machine's folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn pids(&self) -> MachinePids {
        self.pids
    }

    pub(crate) fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exited.clone()
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<ExitReason> {
        self.exited.borrow().clone()
    }

    /// How it ended, if it is about to.
    pub(crate) async fn ended_soon(&self) -> Option<ExitReason> {
        self.ended_within(CLOSED_PATIENCE).await
    }

    /// How it ended, if it does within `patience`.
    pub(crate) async fn ended_within(&self, patience: Duration) -> Option<ExitReason> {
        let mut exited = self.exited.clone();
        let waited = tokio::time::timeout(patience, exited.wait_for(Option::is_some)).await;
        match waited {
            Ok(Ok(reason)) => reason.clone(),
            _ => None,
        }
    }

    /// Sends SIGKILL to the monitor; the keeper follows it.
    pub(crate) fn shoot(&self) -> io::Result<()> {
        self.processes.vmm.kill()
    }

    /// See [`crate::Machine::kill`].
    pub(crate) async fn kill(&self) -> Result<ExitReason, VmmError> {
        if let Some(reason) = self.ended() {
            return Ok(reason);
        }
        self.shoot().map_err(|source| VmmError::Process {
            what: "the death",
            pid: self.pids.vmm.pid,
            source,
        })?;
        self.ended_within(DEATH_PATIENCE)
            .await
            .ok_or(VmmError::Undead {
                pid: self.pids.vmm.pid,
                waited: DEATH_PATIENCE,
            })
    }

    /// See [`crate::Machine::console_tail`].
    pub(crate) fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, VmmError> {
        record::console_tail(&self.dir, bytes)
    }

    /// See [`crate::Machine::memory_use`].
    pub(crate) fn memory_use(&self) -> Result<MemoryUse, VmmError> {
        let of = |process: ProcessId| {
            private_bytes(process.pid).map_err(|source| VmmError::Process {
                what: "the memory use",
                pid: process.pid,
                source,
            })
        };
        Ok(MemoryUse {
            vmm: of(self.pids.vmm)?,
            keeper: of(self.pids.keeper)?,
        })
    }
}

/// Whether the machine in this folder lives, whatever runs it.
pub fn lives_in(dir: &Path) -> Result<bool, VmmError> {
    let Some(record) = Record::read(dir)? else {
        return Ok(false);
    };
    let boot_id = boot_id().map_err(|source| VmmError::Probe {
        what: "its boot id",
        source,
    })?;
    let monitor = record.pids.vmm;
    // A process that is gone cannot be identified.
    let there = identify(monitor.pid).is_ok_and(|found| found == monitor);
    Ok(record.boot_id == boot_id && there)
}

/// Ends the machine in this folder, if it lives, whatever runs it.
pub async fn end_in(dir: &Path) -> Result<(), VmmError> {
    let Some(record) = Record::read(dir)? else {
        return Ok(());
    };
    match Supervised::adopt(dir, record.monitor)? {
        Some(machine) => machine.kill().await.map(drop),
        None => Ok(()),
    }
}

/// Holds a machine's processes; `None` when the monitor has ended.
fn hold(pids: MachinePids) -> Result<Option<Processes>, VmmError> {
    let open = |process: ProcessId| {
        Watched::open(process).map_err(|source| VmmError::Process {
            what: "the identity",
            pid: process.pid,
            source,
        })
    };
    let Some(vmm) = open(pids.vmm)? else {
        return Ok(None);
    };
    Ok(Some(Processes {
        keeper: open(pids.keeper)?,
        vmm,
        claimed: AtomicBool::new(false),
    }))
}

/// Waits for the monitor's end and publishes how it came.
async fn watch_end(
    dir: PathBuf,
    processes: Arc<Processes>,
    exited: watch::Sender<Option<ExitReason>>,
) {
    if let Err(error) = processes.vmm.ended().await {
        tracing::error!(%error, dir = %dir.display(), "a machine cannot be watched");
        return;
    }
    if let Some(keeper) = &processes.keeper {
        match tokio::time::timeout(RECORD_PATIENCE, keeper.ended()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a keeper cannot be watched"),
            Err(_) => tracing::warn!(dir = %dir.display(), "a keeper outlives its machine"),
        }
    }
    exited.send_replace(Some(recorded_end(&dir)));
}

/// What the keeper wrote, or that it wrote nothing.
fn recorded_end(dir: &Path) -> ExitReason {
    read_exit(dir).unwrap_or_else(|| ExitReason {
        cause: ExitCause::Unseen,
        at_unix_ms: unix_ms(),
        stderr: String::new(),
    })
}

/// The end of a machine that was dead before it could be held.
async fn reason_in(dir: &Path, pids: MachinePids, patience: Duration) -> ExitReason {
    if let Ok(Some(keeper)) = Watched::open(pids.keeper) {
        // If it does not end in time, what it has written so far must do.
        let _ = tokio::time::timeout(patience, keeper.ended()).await;
    }
    recorded_end(dir)
}
