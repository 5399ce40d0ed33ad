//! The store: a folder of snapshots and of the immutable objects they share.
//!
//! ```text
//! snapshots/{id}/manifest        what it is; its digest is the id
//!                memory.index    where each page is
//!                device.state    processors and devices
//!                part.{name}     what else has to be put back
//! objects/{id}.memory            a generation, shared by all that descend from it
//!         {id}.disk              a layer of a disk, likewise
//! deleted/{id}/                  deleted, but pinned: gone once nothing needs it
//! pins/{id}.{owner}              an empty file: `owner` needs that snapshot
//! staging/{unique}/              a snapshot being written; locked while its writer lives
//! lock                           commit and pin share it, collecting garbage excludes them
//! ```
//!
//! All names are relative to the store's folder, which may be moved or copied.

mod collect;
mod disk;
mod draft;
mod fsck;
mod merge;
mod open;

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;

pub use collect::{Collected, Deletion, References};
pub use disk::{Faults, NoFaults, Step};
pub use draft::{Draft, DraftMemory, Import};
pub use fsck::Report;
pub use merge::{LayerMerger, MergePolicy};
pub use open::{DiskFile, Snapshot};

use crate::generation::Verified;
use crate::manifest::ObjectFile;
use crate::{Result, SnapshotError, SnapshotId};
use disk::Disk;

const SNAPSHOTS: &str = "snapshots";
const OBJECTS: &str = "objects";
const DELETED: &str = "deleted";
const PINS: &str = "pins";
const STAGING: &str = "staging";
const LOCK: &str = "lock";

const MANIFEST: &str = "manifest";
const INDEX: &str = "memory.index";
const DEVICE_STATE: &str = "device.state";

/// A folder of snapshots. Cheap to clone; all clones share what was verified.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    disk: Disk,
    verified: Mutex<HashMap<ObjectFile, Checked>>,
    /// Makes names in `staging` unique within this process.
    drafts: AtomicU64,
}

/// What is known about an object's file.
struct Checked {
    identity: Identity,
    chunks: Arc<Verified>,
}

impl std::fmt::Debug for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Checked").field(&self.identity).finish()
    }
}

/// What tells whether a file is the one that was checked, unchanged: the kernel sets the
/// change time at every write, and nobody can set it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl From<&Metadata> for Identity {
    fn from(metadata: &Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Held while the store's names change. Released when dropped.
struct Lock(#[expect(dead_code, reason = "an open descriptor holds the lock")] File);

impl Store {
    /// Opens the store in the folder `root`, making it if there is none. Blocking.
    pub fn open(root: &Path) -> Result<Store> {
        Store::open_with(root, Arc::new(NoFaults))
    }

    /// As [`Store::open`]; `faults` is told before every change of the disk.
    pub fn open_with(root: &Path, faults: Arc<dyn Faults>) -> Result<Store> {
        for folder in [SNAPSHOTS, OBJECTS, DELETED, PINS, STAGING] {
            let path = root.join(folder);
            std::fs::create_dir_all(&path).map_err(SnapshotError::io("create", &path))?;
        }
        Ok(Store(Arc::new(Inner {
            root: root.to_owned(),
            disk: Disk { faults },
            verified: Mutex::default(),
            drafts: AtomicU64::new(0),
        })))
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.0.root
    }

    /// All snapshots that are not deleted, in no order. A damaged one is listed too.
    pub fn list(&self) -> Result<Vec<SnapshotId>> {
        self.ids_in(SNAPSHOTS)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.0.root.join(name)
    }

    fn object_path(&self, object: ObjectFile) -> PathBuf {
        self.folder(OBJECTS).join(object.file_name())
    }

    fn disk(&self) -> &Disk {
        &self.0.disk
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<ObjectFile, Checked>> {
        // Every state of the map is a valid one.
        self.0
            .verified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Names in one of the store's folders.
    fn names_in(&self, folder: &Path) -> Result<Vec<String>> {
        let failed = || SnapshotError::io("list", folder);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            // Only strange names change here, and those match nothing anyway.
            names.push(name.to_string_lossy().into_owned());
        }
        Ok(names)
    }

    fn ids_in(&self, folder: &str) -> Result<Vec<SnapshotId>> {
        let names = self.names_in(&self.folder(folder))?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Waits for the store's lock. Blocking; it is only ever held for some milliseconds.
    fn lock(&self, how: FlockOperation) -> Result<Lock> {
        let path = self.folder(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(SnapshotError::io("open", &path))?;
        rustix::fs::flock(&file, how)
            .map_err(|error| SnapshotError::io("lock", &path)(error.into()))?;
        Ok(Lock(file))
    }
}

/// Reads a file that must have no more than `most` bytes.
fn read_small(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(SnapshotError::needed("open", path))?;
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::needed("read", path))?;
    if bytes.len() as u64 > most {
        let problem = format!("the file has more than {most} bytes");
        return Err(crate::Fault::at(most, problem).in_file(path));
    }
    Ok(bytes)
}
