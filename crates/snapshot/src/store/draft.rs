//! Writing a snapshot: all of it aside first, then one rename.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rustix::fs::FlockOperation;

use super::{
    DEVICE_STATE, DiskFile, INDEX, LayerMerger, MANIFEST, OBJECTS, SNAPSHOTS, STAGING, Snapshot,
    Store,
};
use crate::generation::{Compression, Finished, Sink};
use crate::manifest::{
    Description, DiskLayer, GenerationPart, LayerDigest, MAX_PART_BYTES, MachinePart, Manifest,
    MemoryPart, ObjectFile, Part, PartName,
};
use crate::memory::Memory;
use crate::page::{Base, PAGE, PageRange, is_zero};
use crate::sparse::{SparseHasher, read_data};
use crate::writer::{MemoryWriter, WriteCounts};
use crate::{Digest, ObjectId, PageMap, Result, SnapshotError, SnapshotId};

/// Folder inside the draft's that becomes the snapshot's.
const SNAPSHOT: &str = "snapshot";
/// The generation being written.
const GENERATION: &str = "generation";
/// Prefix of the empty files that say which snapshots a draft needs.
pub(super) const NEEDS: &str = "needs-";

/// How a disk layer gets into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Import {
    /// By content: a reflink where the file system has them, else a copy without its holes.
    /// Whoever could write to the original cannot write to the store's.
    Copy,
    /// As a second name of the same file: at once, but only for a file that nobody can write
    /// to any more, through any name or descriptor. In the same file system.
    Link,
}

/// A snapshot being written. Dropped without [`Draft::commit`], it leaves nothing behind; if
/// the process dies, [`Store::collect`] removes what is left.
///
/// The bytes are taken by `memory`, `device_state`, `part` and `disk_layer`: after those the
/// machine may go on. `commit` makes them last.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    folder: PathBuf,
    /// Holds the lock that says this draft's writer lives.
    _alive: File,
    parents: Vec<SnapshotId>,
    merged_from: Option<SnapshotId>,
    /// Objects the snapshots that this draft needs consist of.
    inherited: HashSet<ObjectFile>,
    machine: Option<MemoryPart>,
    device_state: Option<Part>,
    parts: BTreeMap<PartName, Part>,
    disk: Vec<DiskLayer>,
    /// New objects and the staged files that become them.
    objects: Vec<(ObjectFile, PathBuf)>,
    unsynced: Vec<(File, PathBuf)>,
}

/// The memory of a draft being written; see [`Draft::memory`].
pub struct DraftMemory<'a>(MemoryWriter<'a, StagedFile>);

impl DraftMemory<'_> {
    /// The content of the pages from `first` on: whole pages that may have changed, in
    /// ascending order. Those equal to the parent's are dropped, those all zero recorded as
    /// zero, the others stored.
    pub fn write(&mut self, first: u64, bytes: &[u8]) -> Result<()> {
        self.0.write(first, bytes)
    }

    /// Pages that are known to be all zero, in the same ascending order.
    pub fn clear(&mut self, range: PageRange) -> Result<()> {
        self.0.clear(range)
    }
}

/// A new file that is only made when there is something to write.
pub(super) struct StagedFile {
    store: Store,
    path: PathBuf,
    file: Option<File>,
}

impl StagedFile {
    fn file(&mut self) -> Result<&mut File> {
        match self.file {
            Some(ref mut file) => Ok(file),
            None => {
                let file = self.store.disk().create(&self.path)?;
                Ok(self.file.insert(file))
            }
        }
    }
}

impl Sink for StagedFile {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let (store, path) = (self.store.clone(), self.path.clone());
        store.disk().append(self.file()?, &path, bytes)
    }

    fn put_first(&mut self, bytes: &[u8]) -> Result<()> {
        let (store, path) = (self.store.clone(), self.path.clone());
        store.disk().write_at(self.file()?, &path, bytes, 0)
    }
}

impl Store {
    /// Begins a snapshot made from `parents`, which stay needed until it is committed.
    pub fn draft(&self, parents: &[&Snapshot]) -> Result<Draft> {
        let mut draft = self.empty_draft(parents)?;
        draft.parents = parents.iter().map(|parent| parent.id()).collect();
        Ok(draft)
    }

    /// A draft that may use the objects of `sources`.
    fn empty_draft(&self, sources: &[&Snapshot]) -> Result<Draft> {
        // While the lock is held no garbage is collected, neither the folder before it is
        // locked nor the sources before they are marked as needed.
        let lock = self.lock(FlockOperation::LockShared)?;
        let number = self.0.drafts.fetch_add(1, Ordering::Relaxed);
        let folder = self.unused_staging(number)?;
        self.disk().create_folder(&folder)?;
        let alive = File::open(&folder).map_err(SnapshotError::io("open", &folder))?;
        rustix::fs::flock(&alive, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| SnapshotError::io("lock", &folder)(error.into()))?;
        let draft = Draft {
            store: self.clone(),
            folder,
            _alive: alive,
            parents: Vec::new(),
            merged_from: None,
            inherited: sources
                .iter()
                .flat_map(|source| source.manifest().objects())
                .collect(),
            machine: None,
            device_state: None,
            parts: BTreeMap::new(),
            disk: Vec::new(),
            objects: Vec::new(),
            unsynced: Vec::new(),
        };
        for source in sources {
            if !self.is_there(source.id()) {
                return Err(SnapshotError::NotFound { id: source.id() });
            }
            let mark = draft.folder.join(format!("{NEEDS}{}", source.id()));
            self.disk().create(&mark)?;
        }
        self.disk().create_folder(&draft.folder.join(SNAPSHOT))?;
        drop(lock);
        Ok(draft)
    }

    /// A name in `staging` that is not taken; one may be left from a dead process that had
    /// our process id.
    pub(super) fn unused_staging(&self, number: u64) -> Result<PathBuf> {
        let process = std::process::id();
        let names = (0u32..).map(|attempt| format!("{process}-{number}-{attempt}"));
        let staging = self.folder(STAGING);
        names
            .map(|name| staging.join(name))
            .find(|path| !path.exists())
            .ok_or_else(|| SnapshotError::Incomplete("staging is full".into()))
    }

    /// A draft of a snapshot with the content of `source`, in other generations.
    pub(super) fn merge_draft(&self, source: &Snapshot) -> Result<Draft> {
        let mut draft = self.empty_draft(&[source])?;
        draft.parents.clone_from(&source.manifest().parents);
        draft.merged_from = Some(source.id());
        Ok(draft)
    }
}

impl Draft {
    /// Begins the memory: what changed since `parent` (of a parent snapshot, or
    /// [`Memory::untouched`] over a template). `base` is needed where the parent's content is
    /// inherited from it.
    pub fn memory<'a>(
        &self,
        parent: &'a Memory,
        base: Option<&'a dyn Base>,
        compression: Compression,
    ) -> Result<DraftMemory<'a>> {
        MemoryWriter::new(parent, base, compression, self.generation_sink()).map(DraftMemory)
    }

    pub(super) fn generation_sink(&self) -> StagedFile {
        StagedFile {
            store: self.store.clone(),
            path: self.folder.join(GENERATION),
            file: None,
        }
    }

    /// Ends the memory that [`Draft::memory`] began.
    pub fn finish_memory(&mut self, memory: DraftMemory<'_>) -> Result<WriteCounts> {
        let (map, finished, counts, sink) = memory.0.finish()?;
        self.set_memory(&map, finished, sink)?;
        Ok(counts)
    }

    /// Takes a map over, and the generation in `sink` that it was made with.
    pub(super) fn set_memory(
        &mut self,
        map: &PageMap,
        finished: Option<Finished>,
        sink: StagedFile,
    ) -> Result<()> {
        let mut sizes: BTreeMap<ObjectId, u64> = BTreeMap::new();
        if let (Some(finished), Some(file)) = (finished, sink.file) {
            let object = ObjectFile::Generation(finished.generation.id);
            sizes.insert(finished.generation.id, finished.file_bytes);
            self.objects.push((object, sink.path.clone()));
            self.unsynced.push((file, sink.path));
        }
        let mut generations = Vec::with_capacity(map.generations().len());
        for generation in map.generations() {
            let bytes = match sizes.get(&generation.id) {
                Some(bytes) => *bytes,
                None => {
                    let path = self
                        .store
                        .object_path(ObjectFile::Generation(generation.id));
                    path.metadata()
                        .map_err(SnapshotError::needed("look at", &path))?
                        .len()
                }
            };
            generations.push(GenerationPart {
                id: generation.id,
                bytes,
            });
        }
        let index = self.write_file(INDEX, &map.to_bytes())?;
        self.machine = Some(MemoryPart {
            base: map.base(),
            index,
            generations,
            pages: map.counts(),
        });
        Ok(())
    }

    /// State of processors and devices, at most 64 MiB.
    pub fn device_state(&mut self, state: &[u8]) -> Result<()> {
        self.device_state = Some(self.write_file(DEVICE_STATE, state)?);
        Ok(())
    }

    /// Something else that has to be put back, at most 64 MiB.
    pub fn part(&mut self, name: PartName, content: &[u8]) -> Result<()> {
        let part = self.write_file(&name.file_name(), content)?;
        self.parts.insert(name, part);
        Ok(())
    }

    /// Lays a layer on top of the disk: the file at `path`, which nobody writes to any more.
    /// Reads all of it but its holes.
    pub fn disk_layer(&mut self, path: &Path, format: &str, import: Import) -> Result<()> {
        let staged = self.folder.join(format!("layer-{}", self.objects.len()));
        let mut hasher = SparseHasher::new();
        let original = File::open(path).map_err(SnapshotError::io("open", path))?;
        let bytes = match import {
            Import::Link => {
                self.store.disk().link(path, &staged)?;
                self.unsynced.push((original, staged.clone()));
                let linked = File::open(&staged).map_err(SnapshotError::io("open", &staged))?;
                read_data(&linked, &staged, |at, piece| {
                    hasher.update(at, piece);
                    Ok(())
                })?
            }
            Import::Copy => {
                let copy = self.store.disk().create(&staged)?;
                let shared = rustix::fs::ioctl_ficlone(&copy, &original).is_ok();
                let bytes = read_data(&original, path, |at, piece| {
                    hasher.update(at, piece);
                    match shared || is_zero(piece) {
                        true => Ok(()),
                        false => self.store.disk().write_at(&copy, &staged, piece, at),
                    }
                })?;
                copy.set_len(bytes)
                    .map_err(SnapshotError::io("size", &staged))?;
                self.unsynced.push((copy, staged.clone()));
                bytes
            }
        };
        let id = ObjectId(hasher.finish(bytes));
        self.objects.push((ObjectFile::Disk(id), staged));
        self.disk.push(DiskLayer {
            id,
            bytes,
            format: format.to_owned(),
            digest: LayerDigest::Sparse,
        });
        Ok(())
    }

    /// Lays on top of the disk what these layers of one format, the lowest first, say together.
    pub(super) fn merged_layer(
        &mut self,
        layers: &[DiskFile],
        merge: &LayerMerger<'_>,
        go_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let Some(lowest) = layers.first() else {
            return Ok(());
        };
        let merged = self.folder.join("merged");
        let files: Vec<&File> = layers.iter().map(|layer| &layer.file).collect();
        self.store.disk().will_create(&merged)?;
        merge(&files, &merged, go_on).map_err(|error| match error.kind() {
            std::io::ErrorKind::Interrupted => SnapshotError::Cancelled,
            _ => SnapshotError::io("merge layers into", &merged)(error),
        })?;
        self.disk_layer(&merged, &lowest.layer.format, Import::Link)
    }

    /// Lays a layer of a parent on top of the disk.
    pub fn inherited_layer(&mut self, layer: &DiskLayer) {
        self.disk.push(layer.clone());
    }

    fn write_file(&mut self, name: &str, content: &[u8]) -> Result<Part> {
        if content.len() as u64 > MAX_PART_BYTES && name != INDEX {
            let problem = format!("{name} has more than {MAX_PART_BYTES} bytes");
            return Err(SnapshotError::Incomplete(problem));
        }
        let path = self.folder.join(SNAPSHOT).join(name);
        let mut file = self.store.disk().create(&path)?;
        self.store.disk().append(&mut file, &path, content)?;
        self.unsynced.push((file, path));
        Ok(Part {
            bytes: content.len() as u64,
            blake3: Digest::of(content),
        })
    }

    /// Makes the snapshot last and visible, and opens it. Until the one rename that this ends
    /// with there is no new snapshot; after it, it is whole. Blocking: syncs all it wrote.
    pub fn commit(mut self, description: Description) -> Result<Snapshot> {
        let manifest = self.manifest(description)?;
        let (bytes, id) = manifest.to_bytes()?;
        self.write_file(MANIFEST, &bytes)?;
        let disk = self.store.disk().clone();
        disk.sync(&self.unsynced)?;
        disk.sync_folder(&self.folder.join(SNAPSHOT))?;

        // While the lock is held no garbage is collected: the new objects have no manifest
        // yet that needs them.
        let lock = self.store.lock(FlockOperation::LockShared)?;
        for (object, staged) in &self.objects {
            // An object of that name has the same content; should it be damaged, no more.
            disk.rename(staged, &self.store.object_path(*object))?;
        }
        if !self.objects.is_empty() {
            disk.sync_folder(&self.store.folder(OBJECTS))?;
        }
        let snapshots = self.store.folder(SNAPSHOTS);
        let target = snapshots.join(id.to_string());
        if !target.exists() {
            disk.rename(&self.folder.join(SNAPSHOT), &target)?;
        }
        disk.sync_folder(&snapshots)?;
        drop(lock);
        self.store.snapshot(id)
    }

    fn manifest(&mut self, description: Description) -> Result<Manifest> {
        let incomplete = |what: &str| Err(SnapshotError::Incomplete(what.into()));
        let parts = std::mem::take(&mut self.parts);
        let machine = match (self.machine.take(), self.device_state.take()) {
            (Some(memory), Some(device_state)) => Some(MachinePart {
                memory,
                device_state,
                parts,
            }),
            (None, None) if parts.is_empty() => None,
            _ => return incomplete("it has memory without device state, or the reverse"),
        };
        if let Some(machine) = &machine {
            let counts = machine.memory.pages;
            let pages = counts.inherited + counts.zero + counts.data;
            if pages * PAGE as u64 != description.shape.memory.bytes() {
                return incomplete("its memory has another size than its shape says");
            }
        }
        if machine.is_none() && self.disk.is_empty() {
            return incomplete("it has neither memory nor a disk");
        }
        let manifest = Manifest {
            description,
            parents: std::mem::take(&mut self.parents),
            merged_from: self.merged_from,
            machine,
            disk: std::mem::take(&mut self.disk),
        };
        let new: HashSet<_> = self.objects.iter().map(|(object, _)| *object).collect();
        let foreign = manifest
            .objects()
            .find(|object| !new.contains(object) && !self.inherited.contains(object));
        match foreign {
            // Nothing would keep it from being collected before the commit.
            Some(object) => Err(SnapshotError::Incomplete(format!(
                "it uses {}, which is of none of its parents",
                object.file_name()
            ))),
            None => Ok(manifest),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = self.store.disk().remove_folder(&self.folder) {
            tracing::warn!(
                folder = %self.folder.display(), %error,
                "cannot remove an unfinished snapshot; collecting garbage will"
            );
        }
    }
}
