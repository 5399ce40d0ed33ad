//! What the tests of the store share: small snapshots with known content.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use wrenn_snapshot::*;
use wrenn_types::{MemoryMib, Shape, Vcpus};

/// Pages of the test machines' memory, 1 MiB: the smallest shape there is.
pub const PAGES: u64 = 256;
pub const BASE: BaseId = BaseId([0xba; 32]);

pub fn description(created: u64) -> Description {
    Description {
        created_unix_ms: created,
        shape: Shape {
            vcpus: Vcpus(1),
            memory: MemoryMib(((PAGES * PAGE as u64) >> 20) as u32),
        },
        origin: Origin {
            template: Some("sha256-template".into()),
            image: "sha256-image".into(),
            kernel: "sha256-kernel".into(),
            envd_version: "0.6.2".into(),
        },
        vmm: Vmm {
            driver: "qemu".into(),
            version: "7.2".into(),
            fingerprint: serde_json::json!({"cpu": "max"}),
        },
        labels: BTreeMap::new(),
    }
}

/// A page's content that depends on `seed`; never all zero.
pub fn page(seed: u64) -> [u8; PAGE] {
    let mut content = [0; PAGE];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in content.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    content
}

/// Content that zstd can shrink.
pub fn soft_page(seed: u64) -> [u8; PAGE] {
    let mut content = [(seed % 255) as u8 + 1; PAGE];
    content[..8].copy_from_slice(&seed.to_le_bytes());
    content
}

/// The base: every third page is zero.
pub fn base_content() -> Vec<u8> {
    (0..PAGES)
        .flat_map(|number| match number % 3 {
            0 => [0; PAGE],
            _ => page(1000 + number),
        })
        .collect()
}

/// What a machine did to a page since the last snapshot; `None`: cleared.
pub type Writes = BTreeMap<u64, Option<[u8; PAGE]>>;

/// Saves `memory` + `writes`; `layer` becomes the content of a new disk layer.
pub fn save(
    store: &Store,
    parent: Option<&Snapshot>,
    base: Option<&dyn Base>,
    writes: &Writes,
    layer: Option<&Path>,
    created: u64,
    compression: Compression,
) -> Result<(Snapshot, WriteCounts)> {
    let untouched = Memory::untouched(PAGES, base.map(|base| base.id()));
    let mut draft = store.draft(parent.as_slice())?;
    let before = parent.and_then(Snapshot::memory).unwrap_or(&untouched);
    let mut memory = draft.memory(before, base, compression)?;
    for (number, content) in writes {
        memory.write(*number, &content.unwrap_or([0; PAGE]))?;
    }
    let counts = draft.finish_memory(memory)?;
    draft.device_state(format!("device state {created}").as_bytes())?;
    draft.part(PartName::new("firmware")?, &page(created)[..200])?;
    for inherited in parent.iter().flat_map(|parent| &parent.manifest().disk) {
        draft.inherited_layer(inherited);
    }
    if let Some(layer) = layer {
        draft.disk_layer(layer, "qcow2", Import::Copy)?;
    }
    Ok((draft.commit(description(created))?, counts))
}

/// A way to merge layers that are text: one after the other.
pub fn join(
    layers: &[&File],
    into: &Path,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> std::io::Result<()> {
    let mut joined = Vec::new();
    for mut layer in layers.iter().copied() {
        layer.read_to_end(&mut joined)?;
        if !go_on(joined.len() as u64) {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
    }
    std::fs::write(into, joined)
}

/// The whole content of a snapshot's memory.
pub fn content(snapshot: &Snapshot, base: Option<&dyn Base>) -> Result<Vec<u8>> {
    let memory = snapshot.memory().expect("the tests save memory");
    let mut all = vec![0; PAGES as usize * PAGE];
    memory.reader(base)?.read(0, &mut all)?;
    Ok(all)
}

/// All files below `folder`, by their path in it.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_owned();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Replaces a file's content, with a new file, so that open readers keep theirs.
pub fn replace(path: &Path, content: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, content).unwrap();
}

/// An empty store in a temporary folder: in memory where that can be had, because these tests
/// change and sync thousands of files, and never ask whether a disk keeps its promises.
pub fn store() -> (tempfile::TempDir, Store) {
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    let store = Store::open(&folder.path().join("store")).unwrap();
    (folder, store)
}
