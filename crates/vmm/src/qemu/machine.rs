//! One QEMU that runs: a connection to it, and a watch on its end.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::{OnceCell, watch};

use super::launch;
use super::layers::AddedLayer;
use crate::machine::{ExitReason, MachinePids, MemoryUse, RunState, SavedState};
use crate::qmp::{Migration, Qmp, QmpError};
use crate::record::Monitor;
use crate::supervised::{DEATH_PATIENCE, Supervised};
use crate::{LoadSpec, Machine, SavedDelta, VmmError};

/// The longest that saving or loading a state may take without its memory.
const STATE_PATIENCE: Duration = Duration::from_secs(60);

/// The layer that a machine writes to.
#[derive(Debug, Clone, Copy)]
pub(super) struct TopLayer {
    /// Its number in the chain; the base has 0.
    pub(super) level: usize,
    /// The set of descriptors that is its file.
    pub(super) set: u64,
}

/// A machine in QEMU.
pub(super) struct QemuMachine {
    qmp: Qmp,
    process: Supervised,
    patience: Duration,
    /// QEMU may hold descriptors that it needs no more.
    transients: AtomicBool,
    /// The layer it was started with on top; `None` when an earlier agent started it.
    top_at_start: Option<TopLayer>,
    added_layer: tokio::sync::Mutex<Option<AddedLayer>>,
    /// Where its firmware is in its address space, once that was asked.
    firmware_at: OnceCell<u64>,
}

impl QemuMachine {
    /// Takes over a machine that was just started.
    pub(super) async fn connect(
        dir: PathBuf,
        pids: MachinePids,
        top: TopLayer,
        patience: Duration,
    ) -> Result<QemuMachine, VmmError> {
        let process = Supervised::started(dir, pids).await?;
        let connected = async {
            let stream = launch::connect(process.dir())
                .await
                .map_err(|error| QmpError::Socket(error.to_string()))?;
            Qmp::negotiate(stream, patience).await
        };
        match connected.await {
            Ok(qmp) => Ok(QemuMachine {
                qmp,
                process,
                patience,
                transients: AtomicBool::new(false),
                top_at_start: Some(top),
                added_layer: tokio::sync::Mutex::default(),
                firmware_at: OnceCell::new(),
            }),
            Err(source) => {
                let killed = process.shoot();
                let reason = process.ended_within(DEATH_PATIENCE).await;
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
        let Some(process) = Supervised::adopt(dir, Monitor::Qemu)? else {
            return Ok(None);
        };
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
        let machine = QemuMachine {
            qmp,
            process,
            patience,
            // The earlier agent may have died before it saw to that.
            transients: AtomicBool::new(true),
            top_at_start: None,
            added_layer: tokio::sync::Mutex::default(),
            firmware_at: OnceCell::new(),
        };
        if *machine.qmp.run_state().borrow() == RunState::Running {
            machine.close_transients().await;
        }
        Ok(Some(machine))
    }

    /// Marks the machine as somebody's: from here on dropping its handle leaves it alive.
    pub(super) fn claim(self) -> QemuMachine {
        self.process.claim();
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
                match self.process.ended_soon().await {
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

    pub(super) fn top_at_start(&self) -> Option<TopLayer> {
        self.top_at_start
    }

    /// The layer that was opened for the next switch.
    pub(super) async fn added_layer(&self) -> tokio::sync::MutexGuard<'_, Option<AddedLayer>> {
        self.added_layer.lock().await
    }

    pub(super) fn dir(&self) -> &Path {
        self.process.dir()
    }

    pub(super) fn known_firmware_address(&self) -> &OnceCell<u64> {
        &self.firmware_at
    }

    /// How it ended, if it is about to.
    pub(super) async fn ended_soon(&self) -> Option<ExitReason> {
        self.process.ended_soon().await
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
        let mut exited = self.process.exited();
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
    async fn load(&self, spec: LoadSpec) -> Result<(), VmmError> {
        self.become_saved(spec).await
    }

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

    async fn add_disk_layer(&self, top: &Path) -> Result<(), VmmError> {
        self.add_layer(top).await
    }

    async fn switch_disk_layer(&self, top: &Path) -> Result<(), VmmError> {
        self.put_layer(top).await
    }

    async fn forget_disk_layer(&self, top: &Path) {
        self.forget_layer(top).await;
    }

    async fn replace_layers(
        &self,
        replaced: usize,
        kept: usize,
        layers: &[PathBuf],
    ) -> Result<(), VmmError> {
        self.replace_below_top(replaced, kept, layers).await
    }

    /// A layer that was not switched to holds nothing, so it may as well be counted.
    fn written_layer(&self, layers: &[PathBuf]) -> Result<usize, VmmError> {
        match layers.len() {
            0 => Err(VmmError::Spec("its disk has no layer".into())),
            count => Ok(count - 1),
        }
    }

    fn run_state(&self) -> watch::Receiver<RunState> {
        self.qmp.run_state().subscribe()
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
