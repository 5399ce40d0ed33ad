//! Verifying everything, believing nothing that was verified before.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use super::open::{read_index, read_manifest, read_part, verify_layer};
use super::{DELETED, DEVICE_STATE, INDEX, MANIFEST, OBJECTS, SNAPSHOTS, Store};
use crate::manifest::ObjectFile;
use crate::{DiskLayer, Fault, GenerationRef, Manifest, Result, SnapshotError, SnapshotId};

/// What [`Store::fsck`] found.
#[derive(Debug, Default)]
pub struct Report {
    /// Everything that is wrong, each naming its file and place.
    pub damage: Vec<SnapshotError>,
    /// Snapshots that were read, damaged ones included.
    pub snapshots: usize,
    /// Objects that were read, damaged ones included.
    pub objects: usize,
    /// Files that no snapshot consists of: [`Store::collect`] removes those that are objects.
    pub unused: Vec<PathBuf>,
}

impl Report {
    /// Takes the value, or notes what is wrong.
    fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.damage.push(error)).ok()
    }
}

/// What the snapshots say about the objects they consist of.
#[derive(Default)]
struct Wanted {
    generations: HashSet<GenerationRef>,
    layers: HashMap<ObjectFile, DiskLayer>,
    all: HashSet<ObjectFile>,
}

impl Store {
    /// Reads and verifies every byte of every snapshot and object. An error is only given if
    /// the store's folders cannot be listed; damage is in the report. Blocking, for as long as
    /// it takes to read everything.
    pub fn fsck(&self) -> Result<Report> {
        let mut report = Report::default();
        let mut wanted = Wanted::default();
        for folder in [SNAPSHOTS, DELETED] {
            for name in self.names_in(&self.folder(folder))? {
                let path = self.folder(folder).join(&name);
                match name.parse() {
                    Ok(id) => self.check_snapshot(&path, id, &mut report, &mut wanted),
                    Err(_) => report.unused.push(path),
                }
            }
        }
        for generation in &wanted.generations {
            report.objects += 1;
            let opened = self.open_generation_anew(*generation);
            if let Some(open) = report.keep(opened) {
                open.check_all(|error| report.damage.push(error));
            }
        }
        for (object, layer) in &wanted.layers {
            report.objects += 1;
            let path = self.object_path(*object);
            let checked = File::open(&path)
                .map_err(SnapshotError::needed("open", &path))
                .and_then(|file| verify_layer(&file, &path, layer));
            report.keep(checked);
        }
        for name in self.names_in(&self.folder(OBJECTS))? {
            let object = ObjectFile::from_file_name(&name);
            if !object.is_some_and(|object| wanted.all.contains(&object)) {
                report.unused.push(self.folder(OBJECTS).join(name));
            }
        }
        Ok(report)
    }

    fn check_snapshot(
        &self,
        folder: &Path,
        id: SnapshotId,
        report: &mut Report,
        wanted: &mut Wanted,
    ) {
        report.snapshots += 1;
        let manifest = read_manifest(folder, id);
        let Some(manifest) = report.keep(manifest) else {
            return;
        };
        wanted.all.extend(manifest.objects());
        for layer in &manifest.disk {
            let object = ObjectFile::Disk(layer.id);
            wanted.layers.insert(object, layer.clone());
        }
        if let Some(machine) = &manifest.machine {
            let index = read_index(folder, &manifest, &machine.memory);
            if let Some(map) = report.keep(index) {
                wanted.generations.extend(map.generations());
            }
            report.keep(read_part(&folder.join(DEVICE_STATE), machine.device_state));
            for (name, part) in &machine.parts {
                report.keep(read_part(&folder.join(name.file_name()), *part));
            }
            for generation in &machine.memory.generations {
                let path = self.object_path(ObjectFile::Generation(generation.id));
                let found = path
                    .metadata()
                    .map_err(SnapshotError::needed("look at", &path));
                if let Some(found) = report.keep(found)
                    && found.len() != generation.bytes
                {
                    let problem = format!(
                        "the file has {} bytes, not {}",
                        found.len(),
                        generation.bytes
                    );
                    let at = found.len().min(generation.bytes);
                    report.damage.push(Fault::at(at, problem).in_file(&path));
                }
            }
        }
        let listed = self.names_in(folder);
        for name in report.keep(listed).unwrap_or_default() {
            if !belongs(&manifest, &name) {
                report.unused.push(folder.join(name));
            }
        }
    }
}

/// Whether a file of that name is part of the snapshot.
fn belongs(manifest: &Manifest, name: &str) -> bool {
    let of_machine = manifest.machine.as_ref().is_some_and(|machine| {
        let mut parts = machine.parts.keys();
        name == INDEX || name == DEVICE_STATE || parts.any(|part| part.file_name() == name)
    });
    name == MANIFEST || of_machine
}
