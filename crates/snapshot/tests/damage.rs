//! G16, G20: damage is found and named before anyone reads it; nothing depends on where the
//! store is.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::*;
use wrenn_snapshot::*;

/// A store with two snapshots, the second a child of the first, of raw and compressed
/// generations, with disk layers. Small enough to damage every byte of it.
struct Sample {
    _folder: tempfile::TempDir,
    root: PathBuf,
    template: Vec<u8>,
    files: BTreeMap<PathBuf, Vec<u8>>,
    /// Content and device state of each snapshot.
    expected: BTreeMap<SnapshotId, (Vec<u8>, Vec<u8>)>,
}

fn sample() -> Sample {
    let (folder, store) = store();
    let template = base_content();
    let base = BaseBytes {
        id: BASE,
        bytes: &template,
    };
    let layer = folder.path().join("layer");
    let mut expected = BTreeMap::new();
    let mut parent: Option<Snapshot> = None;
    for number in 0..2u64 {
        let (compression, writes) = match number {
            0 => (
                Compression::None,
                Writes::from([(1, Some(page(1))), (9, None)]),
            ),
            _ => (
                Compression::Zstd(3),
                (20..23).map(|at| (at, Some(soft_page(at)))).collect(),
            ),
        };
        std::fs::write(&layer, format!("disk layer {number}")).unwrap();
        let (made, _) = save(
            &store,
            parent.as_ref(),
            Some(&base),
            &writes,
            Some(&layer),
            number,
            compression,
        )
        .unwrap();
        let memory = content(&made, Some(&base)).unwrap();
        expected.insert(made.id(), (memory, made.device_state().to_vec()));
        parent = Some(made);
    }
    let root = store.root().to_owned();
    Sample {
        files: files(&root),
        _folder: folder,
        root,
        template,
        expected,
    }
}

impl Sample {
    /// Reads all of both snapshots as a restore would. Errors are collected; what was read
    /// without an error must be what was written.
    fn read_all(&self) -> Vec<SnapshotError> {
        // A store of its own: nothing was verified before.
        let store = Store::open(&self.root).unwrap();
        let mut errors = Vec::new();
        for (id, (memory, state)) in &self.expected {
            let read = || -> Result<()> {
                let snapshot = store.snapshot(*id)?;
                assert_eq!(snapshot.device_state(), state);
                let firmware = page(snapshot.manifest().description.created_unix_ms);
                assert_eq!(snapshot.parts()[0].1, firmware[..200]);
                for (number, layer) in snapshot.disk_layers()?.into_iter().enumerate() {
                    let content = std::fs::read_to_string(layer.path).unwrap();
                    assert_eq!(content, format!("disk layer {number}"));
                }
                let mut delta = snapshot.memory().unwrap().delta();
                while let Some(run) = delta.next_run()? {
                    let (range, zeros);
                    let found = match run {
                        Content::Data(pages, bytes) => {
                            range = pages;
                            bytes
                        }
                        Content::Zero(pages) => {
                            range = pages;
                            zeros = vec![0; range.count as usize * PAGE];
                            &zeros
                        }
                    };
                    let at = range.first as usize * PAGE..range.end() as usize * PAGE;
                    assert!(*found == memory[at]);
                }
                Ok(())
            };
            errors.extend(read().err());
        }
        errors
    }

    /// Something must be found, by reading and by fsck, and the error must name the file.
    fn must_be_found(&self, damaged: &Path, what: &str) {
        let fsck = Store::open(&self.root).unwrap().fsck().unwrap();
        for (how, errors) in [("read", self.read_all()), ("fsck", fsck.damage)] {
            let name = damaged.to_str().unwrap();
            let names_it = |error: &SnapshotError| error.to_string().contains(name);
            assert!(
                errors.iter().any(names_it),
                "{how}: {what} of {name} was not found: {errors:?}"
            );
        }
    }

    fn base(&self) -> BaseBytes<'_> {
        BaseBytes {
            id: BASE,
            bytes: &self.template,
        }
    }
}

#[test]
fn g16_every_flipped_byte_is_found_and_named() {
    let sample = sample();
    assert!(sample.read_all().is_empty());
    for (name, content) in &sample.files {
        let path = sample.root.join(name);
        if name == Path::new("lock") {
            assert!(content.is_empty());
            continue;
        }
        assert!(!content.is_empty(), "{name:?}");
        let mut damaged = content.clone();
        // The header's page of padding is checked at each tenth byte, all else at every one.
        let padding = |at: usize| {
            name.extension().is_some_and(|kind| kind == "memory") && (112..4096).contains(&at)
        };
        for at in (0..content.len()).filter(|at| !padding(*at) || at % 10 == 0) {
            damaged[at] ^= 1 << (at % 8);
            replace(&path, &damaged);
            damaged[at] = content[at];
            // fsck at each byte too would take long.
            if at % 32 == 0 {
                sample.must_be_found(name, &format!("a flip of byte {at}"));
            } else {
                let errors = sample.read_all();
                assert!(
                    !errors.is_empty(),
                    "a flip of byte {at} of {name:?} was not found"
                );
            }
        }
        replace(&path, content);
    }
    assert!(sample.read_all().is_empty());
}

#[test]
fn g16_every_cut_and_every_extension_is_found_and_named() {
    let sample = sample();
    for (name, content) in &sample.files {
        if name == Path::new("lock") {
            continue;
        }
        let path = sample.root.join(name);
        // Every length of the small files; of those with pages, of all regions' borders.
        let step = if content.len() > 8192 { 61 } else { 1 };
        for length in (0..content.len()).step_by(step) {
            replace(&path, &content[..length]);
            if length % 32 == 0 {
                sample.must_be_found(name, &format!("a cut to {length} bytes"));
            } else {
                let errors = sample.read_all();
                assert!(
                    !errors.is_empty(),
                    "a cut of {name:?} to {length} was not found"
                );
            }
        }
        replace(&path, &[content.as_slice(), b"\0"].concat());
        sample.must_be_found(name, "an added byte");
        replace(&path, content);
    }
}

#[test]
fn g16_any_two_swapped_files_and_any_missing_file_are_found_and_named() {
    let sample = sample();
    let names: Vec<_> = sample
        .files
        .keys()
        .filter(|name| *name != Path::new("lock"))
        .collect();
    // Two of each kind: manifests, indexes, states, parts, generations, layers.
    assert_eq!(names.len(), 12);
    for (index, left) in names.iter().enumerate() {
        for right in &names[index + 1..] {
            let contents = (&sample.files[*left], &sample.files[*right]);
            assert_ne!(contents.0, contents.1);
            replace(&sample.root.join(left), contents.1);
            replace(&sample.root.join(right), contents.0);
            let errors = sample.read_all();
            assert!(!errors.is_empty(), "{left:?} and {right:?} swapped");
            let fsck = Store::open(&sample.root).unwrap().fsck().unwrap();
            assert!(!fsck.damage.is_empty());
            replace(&sample.root.join(left), contents.0);
            replace(&sample.root.join(right), contents.1);
        }
        std::fs::remove_file(sample.root.join(left)).unwrap();
        sample.must_be_found(left, "the absence");
        let errors = sample.read_all();
        let missing = |error: &SnapshotError| matches!(error, SnapshotError::Missing { .. });
        assert!(errors.iter().any(missing), "{errors:?}");
        std::fs::write(sample.root.join(left), &sample.files[*left]).unwrap();
    }
    // Whole snapshots under each other's names.
    let ids: Vec<_> = sample.expected.keys().map(ToString::to_string).collect();
    let path = |name: &str| sample.root.join("snapshots").join(name);
    std::fs::rename(path(&ids[0]), path("aside")).unwrap();
    std::fs::rename(path(&ids[1]), path(&ids[0])).unwrap();
    std::fs::rename(path("aside"), path(&ids[1])).unwrap();
    assert_eq!(sample.read_all().len(), 2);
}

#[test]
fn g16_damage_behind_a_verified_chunk_is_found_once_the_file_has_changed() {
    let sample = sample();
    let base = sample.base();
    let store = Store::open(&sample.root).unwrap();
    let read = |store: &Store| -> Result<()> {
        for id in sample.expected.keys() {
            let snapshot = store.snapshot(*id)?;
            snapshot.disk_layers()?;
            content(&snapshot, Some(&base))?;
        }
        Ok(())
    };
    read(&store).unwrap();
    for (name, content) in &sample.files {
        if !name.starts_with("objects") {
            continue;
        }
        let path = sample.root.join(name);
        let mut damaged = content.clone();
        let at = if content.len() > 5000 { 4200 } else { 3 };
        damaged[at.min(content.len() - 1)] ^= 0x10;
        // In place, the same inode and length: as a failing disk or a careless hand would.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &damaged, 0).unwrap();
        assert!(read(&store).is_err(), "{name:?}");
        std::os::unix::fs::FileExt::write_all_at(&file, content, 0).unwrap();
        read(&store).unwrap();
    }
}

#[test]
fn g20_a_store_works_under_another_path_and_names_none() {
    let sample = sample();
    for (name, content) in &sample.files {
        let path = sample.root.to_str().unwrap().as_bytes();
        let found = content.windows(path.len()).any(|window| window == path);
        assert!(!found, "{name:?} has the store's path in it");
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("another place");
    for (name, content) in &sample.files {
        let path = target.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    std::fs::remove_dir_all(&sample.root).unwrap();
    let moved = Sample {
        root: target,
        _folder: tempfile::tempdir().unwrap(),
        template: sample.template.clone(),
        files: BTreeMap::new(),
        expected: sample.expected.clone(),
    };
    let errors = moved.read_all();
    assert!(errors.is_empty(), "{errors:?}");
    assert!(
        Store::open(&moved.root)
            .unwrap()
            .fsck()
            .unwrap()
            .damage
            .is_empty()
    );
}
