//! Snapshots of this host's sandboxes: who needs which, and the way in and out of the store.
//!
//! ```text
//!   live machine ──save──▶ Draft ──commit──▶ Snapshot ──restore──▶ machine
//!                                               │
//!      pinned by: each sandbox that runs on it or is paused as it, and by "kept"
//! ```
//!
//! A snapshot lives as long as somebody has pinned it. The last to let go deletes it, and what
//! it consisted of is collected in the background. Pins of sandboxes that are gone, as after a
//! crash between two steps, are dropped when the agent starts.

mod pages;
mod save;

pub use pages::{SnapshotPages, TemplateBase};
pub use save::{Saver, Then, go_on, keep_written_layers, thaw};

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify};
use tokio::task::JoinHandle;
use wrenn_snapshot::{Deletion, PartName, Snapshot, SnapshotError, SnapshotId, Store};

use crate::guest::chain;

/// Who pins a snapshot that was asked for by name.
pub const KEPT: &str = "kept";
/// Labels of a snapshot.
pub const LABEL_SANDBOX: &str = "sandbox";
/// See [`LABEL_SANDBOX`].
pub const LABEL_TEMPLATE: &str = "template";
/// See [`LABEL_SANDBOX`].
pub const LABEL_NAME: &str = "name";
/// See [`LABEL_SANDBOX`].
pub const LABEL_DISK_MIB: &str = "disk_mib";

/// After something was deleted, what else is deleted within this time is collected with it.
const COLLECT_AFTER: Duration = Duration::from_millis(200);

/// What of a sandbox is saved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Processors, devices, memory and disk: its programs go on where they stood.
    #[default]
    Machine,
    /// The disk: what it becomes boots.
    Disk,
}

impl Scope {
    /// As requests say it.
    pub fn of(disk_only: bool) -> Scope {
        match disk_only {
            true => Scope::Disk,
            false => Scope::Machine,
        }
    }
}

/// Runs what blocks on a thread that may.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
) -> Result<T, SnapshotError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(join) => match join.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and nobody is there to be answered.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The name of the part that holds the firmware segment.
pub fn firmware_part() -> Result<PartName, SnapshotError> {
    PartName::new("firmware")
}

/// The snapshots of this host.
pub struct Snapshots {
    store: Store,
    /// Which of their pages are asked for first; made by page servers, named as they are.
    working_sets: PathBuf,
    /// Held while pins change: the last to let go must be the last.
    pins: Mutex<()>,
    deleted: Notify,
}

/// What an earlier agent left.
pub struct Inventory {
    pins: Vec<(SnapshotId, String)>,
    snapshots: Vec<SnapshotId>,
}

impl Snapshots {
    /// Opens the store in `dir`, making it if there is none.
    pub fn open(dir: &Path, working_sets: PathBuf) -> Result<Arc<Snapshots>, SnapshotError> {
        Ok(Arc::new(Snapshots {
            store: Store::open(dir)?,
            working_sets,
            pins: Mutex::default(),
            deleted: Notify::new(),
        }))
    }

    /// The store, for drafts.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Opens a snapshot; its metadata is verified.
    pub async fn load(&self, id: SnapshotId) -> Result<Arc<Snapshot>, SnapshotError> {
        let store = self.store.clone();
        blocking(move || store.snapshot(id).map(Arc::new)).await
    }

    /// Keeps a snapshot for `owner`; again is harmless.
    pub async fn pin(&self, id: SnapshotId, owner: &str) -> Result<(), SnapshotError> {
        let _turn = self.pins.lock().await;
        let (store, owner) = (self.store.clone(), owner.to_owned());
        blocking(move || store.pin(id, &owner)).await
    }

    /// Lets go of a snapshot for `owner`; if nobody else has pinned it, it is deleted. `false`
    /// when `owner` had not pinned it.
    pub async fn release(&self, id: SnapshotId, owner: &str) -> Result<bool, SnapshotError> {
        let _turn = self.pins.lock().await;
        let (store, owner) = (self.store.clone(), owner.to_owned());
        let released = blocking(move || {
            let pins = store.pins()?;
            if !pins.contains(&(id, owner.clone())) {
                return Ok(None);
            }
            store.unpin(id, &owner)?;
            let others = pins.iter().any(|(it, by)| *it == id && *by != owner);
            if !others {
                delete(&store, id)?;
            }
            Ok(Some(!others))
        });
        let released = released.await?;
        if released == Some(true) {
            self.deleted.notify_one();
        }
        Ok(released.is_some())
    }

    /// As [`Snapshots::release`], where a failure only means that it is tried again when the
    /// agent starts.
    pub async fn let_go(&self, id: SnapshotId, owner: &str) {
        if let Err(error) = self.release(id, owner).await {
            tracing::warn!(snapshot = %id, owner, error = %chain(&error), "a snapshot that is not needed stays until the next start");
        }
    }

    /// The snapshots that were asked for by name, oldest first. A damaged one is passed over
    /// and said.
    pub async fn kept(&self) -> Result<Vec<Snapshot>, SnapshotError> {
        let store = self.store.clone();
        let mut kept = blocking(move || {
            let pins = store.pins()?;
            let ids = pins.into_iter().filter(|(_, owner)| owner == KEPT);
            let open = |(id, _): (SnapshotId, String)| match store.snapshot(id) {
                Ok(snapshot) => Some(snapshot),
                Err(error) => {
                    tracing::error!(snapshot = %id, error = %chain(&error), "passed over");
                    None
                }
            };
            Ok(ids.filter_map(open).collect::<Vec<_>>())
        })
        .await?;
        kept.sort_by_key(|snapshot| snapshot.manifest().description.created_unix_ms);
        Ok(kept)
    }

    /// Whether somebody asked for it by name.
    pub async fn is_kept(&self, id: SnapshotId) -> Result<bool, SnapshotError> {
        let store = self.store.clone();
        blocking(move || Ok(store.pins()?.contains(&(id, KEPT.to_owned())))).await
    }

    /// What there is.
    pub async fn inventory(&self) -> Result<Inventory, SnapshotError> {
        let _turn = self.pins.lock().await;
        let store = self.store.clone();
        let look = move || {
            Ok(Inventory {
                pins: store.pins()?,
                snapshots: store.list()?,
            })
        };
        blocking(look).await
    }

    /// Drops the pins that an earlier agent left, all but kept ones and those in `needed`, and
    /// deletes what then nobody has pinned. What came after the inventory is left alone:
    /// sandboxes that were adopted may be saved already.
    pub async fn sweep(
        &self,
        left: Inventory,
        needed: HashSet<(SnapshotId, String)>,
    ) -> Result<usize, SnapshotError> {
        let _turn = self.pins.lock().await;
        let store = self.store.clone();
        let swept = blocking(move || {
            for pin in left.pins {
                if pin.1 != KEPT && !needed.contains(&pin) {
                    store.unpin(pin.0, &pin.1)?;
                }
            }
            let pinned: HashSet<_> = store.pins()?.into_iter().map(|(id, _)| id).collect();
            let mut swept = 0;
            for id in left.snapshots {
                if !pinned.contains(&id) {
                    delete(&store, id)?;
                    swept += 1;
                }
            }
            Ok(swept)
        });
        let swept = swept.await?;
        self.deleted.notify_one();
        Ok(swept)
    }

    /// Collects what was deleted, until the agent ends.
    pub fn keep_collected(self: &Arc<Self>) -> JoinHandle<()> {
        let snapshots = self.clone();
        tokio::spawn(async move {
            loop {
                snapshots.deleted.notified().await;
                tokio::time::sleep(COLLECT_AFTER).await;
                match snapshots.collect().await {
                    Ok(()) => {}
                    Err(error) => {
                        tracing::error!(error = %chain(&error), "deleted snapshots still take their space");
                    }
                }
            }
        })
    }

    /// Collects what was deleted.
    pub async fn collect(&self) -> Result<(), SnapshotError> {
        let (store, working_sets) = (self.store.clone(), self.working_sets.clone());
        blocking(move || {
            let collected = store.collect()?;
            tracing::debug!(?collected, "snapshots collected");
            let there = store.list()?.into_iter().map(|id| id.to_string()).collect();
            if let Err(error) = forget_working_sets(&working_sets, &there) {
                // They are small, and tried again with the next snapshot.
                tracing::warn!(folder = %working_sets.display(), %error, "working sets of deleted snapshots stay");
            }
            Ok(())
        })
        .await
    }
}

/// Removes the working sets of snapshots that are not `there`.
fn forget_working_sets(dir: &Path, there: &HashSet<String>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if !there.contains(&*entry.file_name().to_string_lossy()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Deletes a name; it is no error when it is gone.
fn delete(store: &Store, id: SnapshotId) -> Result<(), SnapshotError> {
    match store.delete(id, Deletion::Defer) {
        Err(SnapshotError::NotFound { .. }) => Ok(()),
        other => other,
    }
}
