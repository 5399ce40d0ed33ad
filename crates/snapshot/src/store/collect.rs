//! Who needs what, deleting, and collecting what nobody needs.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::FlockOperation;

use super::draft::NEEDS;
use super::open::read_manifest;
use super::{DELETED, OBJECTS, PINS, SNAPSHOTS, STAGING, Store};
use crate::manifest::{ObjectFile, PartName};
use crate::{BaseId, Need, Result, SnapshotError, SnapshotId};

/// What happens to a snapshot that something still needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// It is not deleted while a snapshot was made from it or anyone has pinned it.
    Refuse,
    /// It is gone from the list at once. What pins need of it stays until they are gone; what
    /// snapshots made from it need stays because they name it themselves.
    Defer,
}

/// Who needs what, from the manifests on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// Objects, and the snapshots that consist of them.
    pub objects: BTreeMap<ObjectFile, BTreeSet<SnapshotId>>,
    /// Bases, which others keep, and the snapshots laid over them.
    pub bases: BTreeMap<BaseId, BTreeSet<SnapshotId>>,
    /// Images by their digests, and the snapshots whose disks are laid over them.
    pub images: BTreeMap<String, BTreeSet<SnapshotId>>,
}

/// What [`Store::collect`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Collected {
    /// Deleted snapshots that nobody has pinned any more.
    pub snapshots: usize,
    /// Objects that no snapshot consists of.
    pub objects: usize,
    /// Bytes of those objects.
    pub bytes: u64,
    /// Unfinished snapshots of dead writers.
    pub drafts: usize,
}

impl Store {
    /// Whether the snapshot is there, deleted but pinned ones included.
    pub(super) fn is_there(&self, id: SnapshotId) -> bool {
        let name = id.to_string();
        [SNAPSHOTS, DELETED]
            .iter()
            .any(|folder| self.folder(folder).join(&name).is_dir())
    }

    /// Keeps a snapshot, and all it consists of, until `owner` unpins it: for a machine that
    /// runs on it. Lasts when this returns; pinning twice is pinning once. `owner` is a name
    /// of 1 to 64 of `a-z`, `0-9`, `-`, `_`.
    pub fn pin(&self, id: SnapshotId, owner: &str) -> Result<()> {
        let path = self.pin_path(id, owner)?;
        let _lock = self.lock(FlockOperation::LockShared)?;
        if path.exists() {
            return Ok(());
        }
        if !self.folder(SNAPSHOTS).join(id.to_string()).is_dir() {
            return Err(SnapshotError::NotFound { id });
        }
        self.disk().create(&path)?;
        self.disk().sync_folder(&self.folder(PINS))
    }

    /// Ends a pin. It is no error if there is none.
    pub fn unpin(&self, id: SnapshotId, owner: &str) -> Result<()> {
        let path = self.pin_path(id, owner)?;
        let _lock = self.lock(FlockOperation::LockShared)?;
        if !path.exists() {
            return Ok(());
        }
        self.disk().remove_file(&path)?;
        self.disk().sync_folder(&self.folder(PINS))
    }

    fn pin_path(&self, id: SnapshotId, owner: &str) -> Result<PathBuf> {
        PartName::new(owner)?;
        Ok(self.folder(PINS).join(format!("{id}.{owner}")))
    }

    /// All pins: which snapshot, and for whom.
    pub fn pins(&self) -> Result<Vec<(SnapshotId, String)>> {
        let names = self.names_in(&self.folder(PINS))?;
        let parse = |name: &String| {
            let (id, owner) = name.split_once('.')?;
            Some((id.parse().ok()?, owner.to_owned()))
        };
        Ok(names.iter().filter_map(parse).collect())
    }

    /// Who needs which objects, bases and images. Fails if any manifest cannot be read: a
    /// count that may be too low is none.
    pub fn references(&self) -> Result<References> {
        let mut found = References::default();
        for folder in [SNAPSHOTS, DELETED] {
            for id in self.ids_in(folder)? {
                let manifest = read_manifest(&self.folder(folder).join(id.to_string()), id)?;
                for object in manifest.objects() {
                    found.objects.entry(object).or_default().insert(id);
                }
                let base = manifest.machine.and_then(|machine| machine.memory.base);
                if let Some(base) = base {
                    found.bases.entry(base).or_default().insert(id);
                }
                let image = manifest.description.origin.image;
                found.images.entry(image).or_default().insert(id);
            }
        }
        Ok(found)
    }

    /// Who needs the snapshot: those made from it, pins, and drafts under way.
    pub fn needed_by(&self, id: SnapshotId) -> Result<Vec<Need>> {
        let mut by = BTreeSet::new();
        for other in self.ids_in(SNAPSHOTS)?.into_iter().filter(|it| *it != id) {
            let folder = self.folder(SNAPSHOTS).join(other.to_string());
            if read_manifest(&folder, other)?.parents.contains(&id) {
                by.insert(Need::Child(other));
            }
        }
        let pins = self.pins()?.into_iter().filter(|(pinned, _)| *pinned == id);
        by.extend(pins.map(|(_, owner)| Need::Pin(owner)));
        if self.drafts()?.needed.contains(&id) {
            by.insert(Need::Pin("a snapshot that is being written".into()));
        }
        Ok(by.into_iter().collect())
    }

    /// Deletes a snapshot's name; [`Store::collect`] then frees what nothing else needs. A
    /// damaged snapshot can be deleted too. Blocking.
    pub fn delete(&self, id: SnapshotId, how: Deletion) -> Result<()> {
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let folder = self.folder(SNAPSHOTS).join(id.to_string());
        if !folder.is_dir() {
            return Err(SnapshotError::NotFound { id });
        }
        if how == Deletion::Refuse {
            let by = self.needed_by(id)?;
            if !by.is_empty() {
                return Err(SnapshotError::InUse { id, by });
            }
        }
        let deleted = self.folder(DELETED);
        let target = deleted.join(id.to_string());
        if target.exists() {
            // Deleted before, pinned, and made again with the very same content.
            self.remove_aside(&folder)?;
        } else {
            self.disk().rename(&folder, &target)?;
        }
        self.disk().sync_folder(&deleted)?;
        self.disk().sync_folder(&self.folder(SNAPSHOTS))
    }

    /// Removes deleted snapshots that nobody has pinned, objects that no snapshot consists of,
    /// and what dead writers left. If any manifest cannot be read, nothing is removed. Waits
    /// for commits under way, some milliseconds; blocking.
    pub fn collect(&self) -> Result<Collected> {
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let mut collected = Collected::default();
        let drafts = self.drafts()?;
        let pinned: HashSet<_> = self.pins()?.into_iter().map(|(id, _)| id).collect();
        for id in self.ids_in(DELETED)? {
            if !pinned.contains(&id) && !drafts.needed.contains(&id) {
                self.remove_aside(&self.folder(DELETED).join(id.to_string()))?;
                collected.snapshots += 1;
            }
        }
        if collected.snapshots > 0 {
            // Before their objects: else a crash could bring back a name without content.
            self.disk().sync_folder(&self.folder(DELETED))?;
        }
        let needed = self.references()?.objects;
        let objects = self.folder(OBJECTS);
        for name in self.names_in(&objects)? {
            let Some(object) = ObjectFile::from_file_name(&name) else {
                continue;
            };
            if needed.contains_key(&object) {
                continue;
            }
            let path = objects.join(&name);
            let bytes = path
                .symlink_metadata()
                .map_err(SnapshotError::io("look at", &path))?
                .len();
            self.disk().remove_file(&path)?;
            self.verified().remove(&object);
            collected.objects += 1;
            collected.bytes += bytes;
        }
        for folder in drafts.dead {
            self.disk().remove_folder(&folder)?;
            collected.drafts += 1;
        }
        Ok(collected)
    }

    /// Removes the folder of a snapshot by way of `staging`, so that a crash leaves no folder
    /// without a manifest in its place.
    fn remove_aside(&self, folder: &Path) -> Result<()> {
        let number = self.0.drafts.fetch_add(1, Ordering::Relaxed);
        let aside = self.unused_staging(number)?;
        self.disk().rename(folder, &aside)?;
        self.disk().remove_folder(&aside)
    }

    /// The drafts in `staging`: those of dead writers, and what living ones need.
    fn drafts(&self) -> Result<Drafts> {
        let staging = self.folder(STAGING);
        let mut drafts = Drafts::default();
        for name in self.names_in(&staging)? {
            let folder = staging.join(name);
            match is_unlocked(&folder)? {
                None => {}
                Some(true) => drafts.dead.push(folder),
                Some(false) => {
                    let names = match self.names_in(&folder) {
                        Ok(names) => names,
                        // Committed or given up since it was listed.
                        Err(_) if !folder.exists() => continue,
                        Err(error) => return Err(error),
                    };
                    let id = |name: &String| name.strip_prefix(NEEDS)?.parse::<SnapshotId>().ok();
                    drafts.needed.extend(names.iter().filter_map(id));
                }
            }
        }
        Ok(drafts)
    }
}

#[derive(Default)]
struct Drafts {
    dead: Vec<PathBuf>,
    needed: HashSet<SnapshotId>,
}

/// Whether no living process holds the lock of the draft in `folder`; `None` if it is gone.
fn is_unlocked(folder: &Path) -> Result<Option<bool>> {
    let open = match File::open(folder) {
        Ok(open) => open,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(SnapshotError::io("open", folder)(error)),
    };
    match rustix::fs::flock(&open, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(true)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(false)),
        Err(error) => Err(SnapshotError::io("lock", folder)(error.into())),
    }
}
