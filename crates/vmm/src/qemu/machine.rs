//! One QEMU that runs: a connection to it, and a watch on its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::launch;
use super::record::{CONSOLE, Record, read_exit};
use crate::keeper::unix_ms;
use crate::machine::{
    ExitCause, ExitReason, MachinePids, MemoryUse, ProcessId, RunState, SavedState,
};
use crate::process::{Watched, boot_id, private_bytes};
use crate::qmp::{Migration, Qmp, QmpError};
use crate::{Machine, SavedDelta, VmmError};

/// How long a process may take to vanish after SIGKILL: its memory is taken down first.
const DEATH_PATIENCE: Duration = Duration::from_secs(20);

/// How long the keeper may take to write down an end that was seen.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);

/// How long after QEMU closed its socket its end must show.
const CLOSED_PATIENCE: Duration = Duration::from_secs(5);

/// The longest that saving or loading a state may take without its memory.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

/// A machine in QEMU.
pub(super) struct QemuMachine {
    dir: PathBuf,
    pids: MachinePids,
    qmp: Qmp,
    processes: Arc<Processes>,
    exited: watch::Receiver<Option<ExitReason>>,
    _watcher: Watcher,
    patience: Duration,
    /// QEMU may hold descriptors that it needs no more.
    transients: AtomicBool,
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

impl QemuMachine {
    /// Takes over a machine that was just started.
    pub(super) async fn connect(
        dir: PathBuf,
        pids: MachinePids,
        patience: Duration,
    ) -> Result<QemuMachine, VmmError> {
        let Some(processes) = hold(pids)? else {
            return Err(VmmError::Ended {
                doing: "starting",
                reason: reason_in(&dir, pids, RECORD_PATIENCE).await,
            });
        };
        let (sender, exited) = watch::channel(None);
        let processes = Arc::new(processes);
        let watcher = Watcher(tokio::spawn(watch_end(
            dir.clone(),
            processes.clone(),
            sender,
        )));
        let connected = async {
            let stream = launch::connect(&dir)
                .await
                .map_err(|error| QmpError::Socket(error.to_string()))?;
            Qmp::negotiate(stream, patience).await
        };
        match connected.await {
            Ok(qmp) => Ok(QemuMachine {
                dir,
                pids,
                qmp,
                processes,
                exited,
                _watcher: watcher,
                patience,
                transients: AtomicBool::new(false),
            }),
            Err(source) => {
                let killed = processes.vmm.kill();
                let reason = seen_end(exited, DEATH_PATIENCE).await;
                match (source, reason) {
                    (QmpError::Closed | QmpError::Socket(_), Some(reason)) => {
                        Err(VmmError::Ended {
                            doing: "starting",
                            reason,
                        })
                    }
                    (source, _) => {
                        if let Err(error) = killed {
                            tracing::warn!(%error, pid = pids.vmm.pid, "QEMU was not ended");
                        }
                        Err(VmmError::Qmp {
                            doing: "its first command",
                            source,
                        })
                    }
                }
            }
        }
    }

    /// Takes over the machine of an earlier agent; `None` when there is none or it is dead.
    pub(super) async fn adopt(
        dir: &Path,
        patience: Duration,
    ) -> Result<Option<QemuMachine>, VmmError> {
        let Some(record) = Record::read(dir)? else {
            return Ok(None);
        };
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
        let (sender, exited) = watch::channel(None);
        let processes = Arc::new(processes);
        let failed = |source| VmmError::Qmp {
            doing: "its adoption",
            source,
        };
        let stream = launch::connect(dir)
            .await
            .map_err(|error| failed(QmpError::Socket(error.to_string())))?;
        let qmp = Qmp::negotiate(stream, patience).await.map_err(failed)?;
        let status = qmp
            .command("query-status", json!({}), patience)
            .await
            .map_err(failed)?;
        if status.get("running") == Some(&Value::Bool(true)) {
            qmp.run_state().send_replace(RunState::Running);
        }
        let watcher = tokio::spawn(watch_end(dir.to_owned(), processes.clone(), sender));
        let watcher = Watcher(watcher);
        let machine = QemuMachine {
            dir: dir.to_owned(),
            pids: record.pids,
            qmp,
            processes,
            exited,
            _watcher: watcher,
            patience,
            // The earlier agent may have died before it saw to that.
            transients: AtomicBool::new(true),
        };
        if *machine.qmp.run_state().borrow() == RunState::Running {
            machine.close_transients().await;
        }
        Ok(Some(machine))
    }

    /// Marks the machine as somebody's: from here on dropping its handle leaves it alive.
    pub(super) fn claim(self) -> QemuMachine {
        self.processes.claimed.store(true, Ordering::Release);
        self
    }

    /// Runs a QMP command; an end of QEMU meanwhile is told as such.
    pub(super) async fn command(
        &self,
        doing: &'static str,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, VmmError> {
        let result = self.qmp.command(command, arguments, self.patience).await;
        self.explain(doing, result).await
    }

    /// Runs a QMP command that takes a descriptor.
    pub(super) async fn command_with_fd(
        &self,
        doing: &'static str,
        command: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
    ) -> Result<Value, VmmError> {
        let asked = self
            .qmp
            .command_with_fd(command, arguments, fd, self.patience);
        let result = asked.await;
        self.explain(doing, result).await
    }

    /// Notes whether QEMU may hold descriptors that it needs no more; tells what was noted.
    pub(super) fn leave_transients(&self, some: bool) -> bool {
        self.transients.swap(some, Ordering::AcqRel)
    }

    /// Gives QEMU a descriptor.
    pub(super) async fn give(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), VmmError> {
        let result = self.qmp.give(name, fd, self.patience).await;
        self.explain("taking a descriptor", result).await
    }

    async fn explain<T>(
        &self,
        doing: &'static str,
        result: Result<T, QmpError>,
    ) -> Result<T, VmmError> {
        match result {
            Ok(value) => Ok(value),
            Err(source @ (QmpError::Closed | QmpError::Socket(_))) => {
                match seen_end(self.exited.clone(), CLOSED_PATIENCE).await {
                    Some(reason) => Err(VmmError::Ended { doing, reason }),
                    None => Err(VmmError::Qmp { doing, source }),
                }
            }
            Err(source) => Err(VmmError::Qmp { doing, source }),
        }
    }

    /// States without the memory, which is in its file, and told by event when done.
    pub(super) async fn choose_state_format(&self) -> Result<(), VmmError> {
        let capabilities = json!({ "capabilities": [
            { "capability": "x-ignore-shared", "state": true },
            { "capability": "events", "state": true },
        ]});
        self.command(
            "choosing the form of its state",
            "migrate-set-capabilities",
            capabilities,
        )
        .await
        .map(drop)
    }

    /// How it ended, if it is about to.
    pub(super) async fn ended_soon(&self) -> Option<ExitReason> {
        seen_end(self.exited.clone(), CLOSED_PATIENCE).await
    }

    pub(super) fn expect_migration(&self) -> watch::Receiver<Migration> {
        self.qmp.expect_migration()
    }

    /// Waits until a migration has ended.
    pub(super) async fn await_migration(
        &self,
        mut status: watch::Receiver<Migration>,
    ) -> Result<Migration, VmmError> {
        let doing = "moving its state";
        let mut exited = self.exited.clone();
        let waited = tokio::time::timeout(STATE_PATIENCE.max(self.patience), async {
            tokio::select! {
                ended = status.wait_for(|status| *status != Migration::Pending) => {
                    ended.map(|status| *status).ok()
                }
                _ = exited.wait_for(Option::is_some) => None,
            }
        })
        .await;
        match waited {
            Ok(Some(status)) => Ok(status),
            Ok(None) => self.explain(doing, Err(QmpError::Closed)).await,
            Err(_) => Err(VmmError::Qmp {
                doing,
                source: QmpError::TimedOut {
                    command: "migrate",
                    millis: STATE_PATIENCE.as_millis(),
                },
            }),
        }
    }

    /// QEMU's words on why the last migration failed.
    async fn migration_error(&self) -> String {
        let asked = self
            .command("telling what failed", "query-migrate", json!({}))
            .await;
        match asked {
            Ok(status) => match status.get("error-desc").and_then(Value::as_str) {
                Some(words) => words.to_owned(),
                None => status.to_string(),
            },
            Err(error) => error.to_string(),
        }
    }

    /// Waits for a state that QEMU's events tell of after the command's answer.
    async fn await_run_state(&self, wanted: RunState) {
        let mut state = self.qmp.run_state().subscribe();
        // Only what observers see depends on it: the command itself has been carried out.
        let _ = tokio::time::timeout(
            Duration::from_secs(1),
            state.wait_for(|state| *state == wanted),
        )
        .await;
    }
}

#[async_trait]
impl Machine for QemuMachine {
    async fn resume(&self) -> Result<(), VmmError> {
        self.command("starting its processors", "cont", json!({}))
            .await?;
        self.await_run_state(RunState::Running).await;
        self.close_transients().await;
        Ok(())
    }

    async fn stop(&self) -> Result<(), VmmError> {
        let was = *self.qmp.run_state().borrow();
        self.command("halting its processors", "stop", json!({}))
            .await?;
        if was == RunState::Running {
            self.await_run_state(RunState::Stopped).await;
        }
        Ok(())
    }

    async fn save_state(&self, out: File) -> Result<SavedState, VmmError> {
        let began = Instant::now();
        self.choose_state_format().await?;
        self.stop().await?;
        self.give("state", out.as_fd()).await?;
        let done = self.expect_migration();
        self.command("saving its state", "migrate", json!({ "uri": "fd:state" }))
            .await?;
        let failed = |why| VmmError::State {
            doing: "saved",
            why,
        };
        if self.await_migration(done).await? != Migration::Completed {
            return Err(failed(self.migration_error().await));
        }
        let bytes = out
            .metadata()
            .map_err(|error| failed(error.to_string()))?
            .len();
        Ok(SavedState {
            bytes,
            took: began.elapsed(),
        })
    }

    async fn save_delta(&self) -> Result<SavedDelta, VmmError> {
        self.save_changes().await
    }

    async fn switch_disk_layer(&self, top: &Path) -> Result<(), VmmError> {
        self.put_layer(top).await
    }

    fn run_state(&self) -> watch::Receiver<RunState> {
        self.qmp.run_state().subscribe()
    }

    fn exited(&self) -> watch::Receiver<Option<ExitReason>> {
        self.exited.clone()
    }

    async fn kill(&self) -> Result<ExitReason, VmmError> {
        if let Some(reason) = self.exited.borrow().clone() {
            return Ok(reason);
        }
        self.processes
            .vmm
            .kill()
            .map_err(|source| VmmError::Process {
                what: "the death",
                pid: self.pids.vmm.pid,
                source,
            })?;
        seen_end(self.exited.clone(), DEATH_PATIENCE)
            .await
            .ok_or(VmmError::Undead {
                pid: self.pids.vmm.pid,
                waited: DEATH_PATIENCE,
            })
    }

    fn console_tail(&self, bytes: usize) -> Result<Vec<u8>, VmmError> {
        let path = self.dir.join(CONSOLE);
        let read = || -> io::Result<Vec<u8>> {
            let file = File::open(&path)?;
            let length = file.metadata()?.len();
            let start = length.saturating_sub(bytes as u64);
            let mut tail = vec![0; (length - start) as usize];
            // The log may be cut meanwhile: what is there then is shorter.
            let mut filled = 0;
            while filled < tail.len() {
                match file.read_at(&mut tail[filled..], start + filled as u64)? {
                    0 => break,
                    count => filled += count,
                }
            }
            tail.truncate(filled);
            Ok(tail)
        };
        read().map_err(|source| VmmError::File {
            what: "cannot read the console",
            path: path.clone(),
            source,
        })
    }

    fn pids(&self) -> MachinePids {
        self.pids
    }

    async fn memory_use(&self) -> Result<MemoryUse, VmmError> {
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

/// Holds a machine's processes; `None` when QEMU has ended.
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

/// Waits for QEMU's end and publishes how it came.
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

async fn seen_end(
    mut exited: watch::Receiver<Option<ExitReason>>,
    patience: Duration,
) -> Option<ExitReason> {
    let waited = tokio::time::timeout(patience, exited.wait_for(Option::is_some)).await;
    match waited {
        Ok(Ok(reason)) => reason.clone(),
        _ => None,
    }
}
