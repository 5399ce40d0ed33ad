//! Opening a snapshot: what is checked before anything of it is used.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    Checked, DELETED, DEVICE_STATE, INDEX, Identity, MANIFEST, SNAPSHOTS, Store, read_small,
};
use crate::generation::{Generation, Verified};
use crate::manifest::{self, LayerDigest, MemoryPart, ObjectFile, Part, PartName};
use crate::sparse::{SparseHasher, read_data};
use crate::{
    Digest, DiskLayer, Fault, GenerationRef, Manifest, Memory, ObjectId, PAGE, PageMap, Result,
    SnapshotError, SnapshotId,
};

/// An open snapshot. Manifest, index, device state and parts, and the tables of all
/// generations were verified; pages are when they are first read, disk layers when they are
/// opened. It stays readable even if it is deleted meanwhile.
#[derive(Debug)]
pub struct Snapshot {
    id: SnapshotId,
    manifest: Manifest,
    memory: Option<Memory>,
    device_state: Vec<u8>,
    parts: Vec<(PartName, Vec<u8>)>,
    store: Store,
}

/// A disk layer whose content was verified.
#[derive(Debug)]
pub struct DiskFile {
    /// Open for reading.
    pub file: File,
    /// Where it is, for messages and for tools that want a path.
    pub path: PathBuf,
    /// What it is.
    pub layer: DiskLayer,
}

impl Store {
    /// Opens a snapshot; see [`Snapshot`] for what that verifies. Blocking.
    pub fn snapshot(&self, id: SnapshotId) -> Result<Snapshot> {
        let folder = self.folder(SNAPSHOTS).join(id.to_string());
        match folder.is_dir() {
            true => self.open_in(&folder, id),
            false => Err(SnapshotError::NotFound { id }),
        }
    }

    /// Opens a snapshot that `owner` has pinned, even if it was deleted since.
    pub fn pinned_snapshot(&self, id: SnapshotId, owner: &str) -> Result<Snapshot> {
        let deleted = self.folder(DELETED).join(id.to_string());
        match self.pins()?.contains(&(id, owner.to_owned())) && deleted.is_dir() {
            true => self.open_in(&deleted, id),
            false => self.snapshot(id),
        }
    }

    pub(super) fn open_in(&self, folder: &Path, id: SnapshotId) -> Result<Snapshot> {
        let manifest = read_manifest(folder, id)?;
        let (mut memory, mut device_state, mut parts) = (None, Vec::new(), Vec::new());
        if let Some(machine) = &manifest.machine {
            memory = Some(self.open_memory(folder, &manifest, &machine.memory)?);
            device_state = read_part(&folder.join(DEVICE_STATE), machine.device_state)?;
            for (name, part) in &machine.parts {
                let content = read_part(&folder.join(name.file_name()), *part)?;
                parts.push((name.clone(), content));
            }
        }
        for layer in &manifest.disk {
            // Its content is read when it is opened; that it is there should show now.
            let path = self.object_path(ObjectFile::Disk(layer.id));
            let found = path
                .metadata()
                .map_err(SnapshotError::needed("look at", &path))?;
            check_length(&path, found.len(), layer.bytes)?;
        }
        Ok(Snapshot {
            id,
            manifest,
            memory,
            device_state,
            parts,
            store: self.clone(),
        })
    }

    fn open_memory(&self, folder: &Path, manifest: &Manifest, part: &MemoryPart) -> Result<Memory> {
        let map = read_index(folder, manifest, part)?;
        let mut generations = Vec::with_capacity(map.generations().len());
        for generation in map.generations() {
            generations.push(Arc::new(self.open_generation(*generation)?));
        }
        for (open, part) in generations.iter().zip(&part.generations) {
            let path = self.object_path(ObjectFile::Generation(part.id));
            check_length(&path, open.file_bytes(), part.bytes)?;
        }
        Ok(Memory::new(map, generations))
    }

    fn open_generation(&self, generation: GenerationRef) -> Result<Generation> {
        let object = ObjectFile::Generation(generation.id);
        let path = self.object_path(object);
        let file = File::open(&path).map_err(SnapshotError::needed("open", &path))?;
        let metadata = file
            .metadata()
            .map_err(SnapshotError::io("look at", &path))?;
        Generation::open(Box::new(file), &path, generation, |chunks| {
            self.checked_chunks(object, Identity::from(&metadata), chunks)
        })
    }

    /// As a snapshot's opening does, but believing nothing that was found before.
    pub(super) fn open_generation_anew(&self, generation: GenerationRef) -> Result<Generation> {
        let path = self.object_path(ObjectFile::Generation(generation.id));
        let file = File::open(&path).map_err(SnapshotError::needed("open", &path))?;
        Generation::open(Box::new(file), &path, generation, |chunks| {
            Arc::new(Verified::none_of(chunks))
        })
    }

    /// What was verified of an object's file; nothing if the file has changed since.
    fn checked_chunks(
        &self,
        object: ObjectFile,
        identity: Identity,
        chunks: usize,
    ) -> Arc<Verified> {
        let mut all = self.verified();
        match all.get(&object) {
            Some(known) if known.identity == identity => known.chunks.clone(),
            Some(_) | None => {
                let chunks = Arc::new(Verified::none_of(chunks));
                let fresh = Checked {
                    identity,
                    chunks: chunks.clone(),
                };
                all.insert(object, fresh);
                chunks
            }
        }
    }

    /// Opens a disk layer, reading all of it unless this very file was verified before.
    fn open_layer(&self, layer: &DiskLayer) -> Result<DiskFile> {
        let object = ObjectFile::Disk(layer.id);
        let path = self.object_path(object);
        let file = File::open(&path).map_err(SnapshotError::needed("open", &path))?;
        let metadata = file
            .metadata()
            .map_err(SnapshotError::io("look at", &path))?;
        let identity = Identity::from(&metadata);
        let known = self.verified().get(&object).map(|known| known.identity);
        if known != Some(identity) {
            verify_layer(&file, &path, layer)?;
            let chunks = Arc::new(Verified::none_of(0));
            self.verified().insert(object, Checked { identity, chunks });
        }
        Ok(DiskFile {
            file,
            path,
            layer: layer.clone(),
        })
    }
}

/// Reads and verifies the manifest in `folder`.
pub(super) fn read_manifest(folder: &Path, id: SnapshotId) -> Result<Manifest> {
    let path = folder.join(MANIFEST);
    let bytes = read_small(&path, manifest::MAX_BYTES)?;
    Manifest::parse(&bytes, id).map_err(|fault| fault.in_file(&path))
}

/// Reads and verifies the index in `folder`, also against the manifest.
pub(super) fn read_index(folder: &Path, manifest: &Manifest, part: &MemoryPart) -> Result<PageMap> {
    let path = folder.join(INDEX);
    let bytes = read_part(&path, part.index)?;
    let map = PageMap::parse(&bytes).map_err(|fault| fault.in_file(&path))?;
    let of_index = map.generations().iter().map(|generation| generation.id);
    let of_manifest = part.generations.iter().map(|generation| generation.id);
    let pages = manifest.description.shape.memory.bytes() / crate::PAGE as u64;
    if map.pages() != pages
        || map.base() != part.base
        || map.counts() != part.pages
        || !of_index.eq(of_manifest)
    {
        return Err(Fault::at(0, "the index is not about the manifest's memory").in_file(&path));
    }
    Ok(map)
}

/// Reads and verifies a small file.
pub(super) fn read_part(path: &Path, part: Part) -> Result<Vec<u8>> {
    let found = path
        .metadata()
        .map_err(SnapshotError::needed("look at", path))?;
    check_length(path, found.len(), part.bytes)?;
    let bytes = read_small(path, part.bytes)?;
    if Part::of(&bytes) != part {
        return Err(Fault::at(0, "the content does not match its digest").in_file(path));
    }
    Ok(bytes)
}

/// Compares a disk layer's content with its name.
pub(super) fn verify_layer(file: &File, path: &Path, layer: &DiskLayer) -> Result<()> {
    let (found, bytes) = match layer.digest {
        LayerDigest::Sparse => {
            let mut hasher = SparseHasher::new();
            let bytes = read_data(file, path, |at, piece| {
                hasher.update(at, piece);
                Ok(())
            })?;
            (hasher.finish(bytes), bytes)
        }
        LayerDigest::Plain => plain_digest(file, path)?,
    };
    check_length(path, bytes, layer.bytes)?;
    match ObjectId(found) == layer.id {
        true => Ok(()),
        false => {
            let found = Digest(found);
            Err(Fault::at(0, format!("the content's digest is {found}")).in_file(path))
        }
    }
}

/// The digest of all bytes of a file, and how many they are.
fn plain_digest(file: &File, path: &Path) -> Result<([u8; 32], u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut hashed = 0;
    let zeros = [0; PAGE];
    let skip_to = |hasher: &mut blake3::Hasher, from: u64, to: u64| {
        let mut left = to - from;
        while left > 0 {
            let some = left.min(PAGE as u64);
            hasher.update(&zeros[..some as usize]);
            left -= some;
        }
    };
    let bytes = read_data(file, path, |at, piece| {
        skip_to(&mut hasher, hashed, at);
        hasher.update(piece);
        hashed = at + piece.len() as u64;
        Ok(())
    })?;
    skip_to(&mut hasher, hashed, bytes);
    Ok((*hasher.finalize().as_bytes(), bytes))
}

fn check_length(path: &Path, found: u64, expected: u64) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => {
            let problem = format!("the file has {found} bytes, not {expected}");
            Err(Fault::at(found.min(expected), problem).in_file(path))
        }
    }
}

impl Snapshot {
    /// Its name.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Guest memory; `None` if only the disk was saved.
    pub fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// State of processors and devices; empty if only the disk was saved.
    pub fn device_state(&self) -> &[u8] {
        &self.device_state
    }

    /// The additional parts, sorted by name.
    pub fn parts(&self) -> &[(PartName, Vec<u8>)] {
        &self.parts
    }

    /// The layers of the disk, the lowest first, each verified. Reads those that were not
    /// verified before as a whole. Blocking.
    pub fn disk_layers(&self) -> Result<Vec<DiskFile>> {
        self.disk_layers_from(0)
    }

    /// The same without so many of the lowest.
    pub(super) fn disk_layers_from(&self, first: usize) -> Result<Vec<DiskFile>> {
        let layers = self.manifest.disk.iter().skip(first);
        layers.map(|layer| self.store.open_layer(layer)).collect()
    }
}
