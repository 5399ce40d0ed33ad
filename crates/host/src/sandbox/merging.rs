//! Keeping the chain of generations and disk layers behind a sandbox short (G17).
//!
//! ```text
//!   saved or paused as S ──chain too long?──▶ S′ = S in fewer files, in the background
//!                                              │
//!          owner, between two requests: goes on from S′, lets go of S
//! ```
//!
//! What a sandbox goes on from has the same content before and after, so a machine that runs
//! does not notice, and what happens meanwhile decides: if the owner saves, resumes or ends
//! the sandbox first, the merge is given up or its outcome dropped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use wrenn_snapshot::{LayerMerger, MergePolicy, SnapshotError, SnapshotId};
use wrenn_types::SandboxId;
use wrenn_vmm::LayerFormat;

use super::SandboxError;
use super::journal::Journal;
use super::owner::{Common, Owner};
use super::paused::Paused;
use crate::guest::chain;
use crate::machine::{BELOW_SAVED, LiveMachine, MachineError};
use crate::snapshots::{Snapshots, blocking};

/// Merges write no more than this per second, for the machines' own sake.
const BYTES_PER_SEC: u64 = 256 << 20;

/// A merge under way, or none. Given up when it is dropped.
pub(super) struct Merging {
    task: Option<JoinHandle<Option<Merged>>>,
    stop: Arc<AtomicBool>,
}

/// What came of a merge: pinned until somebody else has, or it is dropped.
pub(super) struct Merged {
    /// What was merged.
    of: SnapshotId,
    /// Into what.
    into: SnapshotId,
    snapshots: Arc<Snapshots>,
    pin: String,
}

impl Drop for Merged {
    fn drop(&mut self) {
        let (snapshots, into, pin) = (
            self.snapshots.clone(),
            self.into,
            std::mem::take(&mut self.pin),
        );
        // Outside of a runtime the agent is ending, and the next one drops the pin.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { snapshots.let_go(into, &pin).await });
        }
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Merging {
    /// Merges, in the background, what is behind `snapshot` if that is too much.
    pub(super) fn of(
        common: &Arc<Common>,
        owner: SandboxId,
        snapshot: Option<SnapshotId>,
    ) -> Merging {
        let stop = Arc::new(AtomicBool::new(false));
        let task = snapshot.map(|snapshot| {
            let (common, stop) = (common.clone(), stop.clone());
            tokio::spawn(async move {
                // The semaphore is never closed.
                let _turn = common.merges.acquire().await;
                let pin = format!("merging-{owner}");
                match merge(&common.snapshots, snapshot, &pin, stop).await {
                    Ok(merged) => merged,
                    Err(SnapshotError::Cancelled | SnapshotError::NotFound { .. }) => None,
                    Err(error) => {
                        tracing::warn!(sandbox = %owner, %snapshot, error = %chain(&error), "a long chain of saves was not merged");
                        None
                    }
                }
            })
        });
        Merging { task, stop }
    }

    /// Waits for what comes of it; for ever if that is nothing.
    pub(super) async fn done(&mut self) -> Merged {
        if let Some(task) = &mut self.task {
            // One that panicked has merged nothing.
            let merged = task.await.ok().flatten();
            self.task = None;
            if let Some(merged) = merged {
                return merged;
            }
        }
        std::future::pending().await
    }
}

async fn merge(
    snapshots: &Arc<Snapshots>,
    of: SnapshotId,
    pin: &str,
    stop: Arc<AtomicBool>,
) -> Result<Option<Merged>, SnapshotError> {
    let store = snapshots.store().clone();
    let merged = blocking(move || {
        if stop.load(Ordering::Relaxed) {
            return Err(SnapshotError::Cancelled);
        }
        let policy = MergePolicy::default();
        if !store.wants_merge(&store.snapshot(of)?, policy) {
            return Ok(None);
        }
        let layers: &LayerMerger<'_> =
            &|layers, into: &Path, go_on| wrenn_vmm::merge_layers(layers, into, go_on);
        let mut pace = Pace::new();
        store.merge(of, policy, Some(layers), &mut |written| {
            pace.keep(written);
            !stop.load(Ordering::Relaxed)
        })
    });
    let Some(merged) = merged.await? else {
        return Ok(None);
    };
    snapshots.pin(merged.id(), pin).await?;
    Ok(Some(Merged {
        of,
        into: merged.id(),
        snapshots: snapshots.clone(),
        pin: pin.to_owned(),
    }))
}

/// Holds a writer back.
struct Pace {
    began: Instant,
    last: u64,
}

impl Pace {
    fn new() -> Pace {
        Pace {
            began: Instant::now(),
            last: 0,
        }
    }

    /// So much is written by now; fewer than before: of the next thing.
    fn keep(&mut self, written: u64) {
        if written < self.last {
            self.began = Instant::now();
        }
        self.last = written;
        let due = Duration::from_micros(written.saturating_mul(1_000_000) / BYTES_PER_SEC);
        let ahead = due.saturating_sub(self.began.elapsed());
        if ahead > Duration::from_millis(5) {
            std::thread::sleep(ahead);
        }
    }
}

impl Owner {
    /// A running sandbox goes on from the same in fewer files.
    pub(super) async fn take_merged(
        &self,
        merged: Merged,
        machine: &LiveMachine,
        journal: &mut Journal,
    ) {
        if journal.line.parent != Some(merged.of) || !self.pin_merged(&merged).await {
            return;
        }
        let mut next = journal.clone();
        next.line.parent = Some(merged.into);
        let left = match next.keep(&machine.folder) {
            Ok(()) => {
                *journal = next;
                if let Err(error) = self.lie_on_merged(&merged, machine, journal).await {
                    tracing::warn!(sandbox = %self.id, error = %chain(&error), "its disk stays on the layers that were merged until it is restored");
                }
                merged.of
            }
            Err(error) => {
                tracing::warn!(sandbox = %self.id, error = %chain(&error), "it stays with a long chain of saves");
                merged.into
            }
        };
        self.let_go(Some(left)).await;
    }

    /// Has the running machine's disk lie on the merged layers, too. It would become slower with
    /// each save, and hold on to the files of those that nobody needs.
    async fn lie_on_merged(
        &self,
        merged: &Merged,
        machine: &LiveMachine,
        journal: &Journal,
    ) -> Result<(), SandboxError> {
        // Where layers do not lie on each other there is nothing to do, and where saves have
        // failed there are layers in between that were not merged.
        if machine.vmm.info().layers != LayerFormat::Qcow2 || journal.line.layers.len() != 1 {
            return Ok(());
        }
        let store = self.common.snapshots.store().clone();
        let (of, into) = (merged.of, merged.into);
        let layers = blocking(move || {
            let (before, after) = (store.snapshot(of)?, store.snapshot(into)?);
            let replaced = before.manifest().disk.len();
            let same = before.manifest().disk == after.manifest().disk;
            Ok(match same {
                true => None,
                false => Some((replaced, after.disk_layers()?)),
            })
        });
        let Some((replaced, files)) = layers.await? else {
            return Ok(());
        };
        let files: Vec<_> = files.into_iter().map(|file| file.path).collect();
        let replacing = machine.vm.replace_layers(replaced, BELOW_SAVED, &files);
        replacing.await.map_err(MachineError::from)?;
        Ok(())
    }

    /// A paused sandbox is the same in fewer files.
    pub(super) async fn take_merged_paused(&self, merged: Merged, paused: &mut Paused) {
        if paused.snapshot != merged.of || !self.pin_merged(&merged).await {
            return;
        }
        let mut next = paused.clone();
        next.snapshot = merged.into;
        next.journal = paused.journal.restored_from(merged.into);
        let left = match next.write(&self.common.site.config.paused_dir()) {
            Ok(()) => {
                *paused = next;
                merged.of
            }
            // Which of the two is written now is not known, so both stay.
            Err(error) => {
                tracing::warn!(sandbox = %self.id, %error, "it may stay with a long chain of saves");
                return;
            }
        };
        self.let_go(Some(left)).await;
    }

    async fn pin_merged(&self, merged: &Merged) -> bool {
        let owner = self.id.to_string();
        match self.common.snapshots.pin(merged.into, &owner).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(sandbox = %self.id, error = %chain(&error), "it stays with a long chain of saves");
                false
            }
        }
    }
}
