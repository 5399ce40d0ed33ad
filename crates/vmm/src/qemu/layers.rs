//! A new layer on the disk of a machine that lives on.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::args::{DISK_ID, Format, disk_name, disk_node, spare_of};
use super::graph::Graph;
use super::machine::{QemuMachine, TopLayer};
use super::save::{FdSet, TRANSIENT, understand};
use crate::machine::RunState;
use crate::qcow2::virtual_bytes;
use crate::{DiskLimits, Machine, VmmError};

/// A layer that QEMU has opened and the disk does not write to yet.
#[derive(Debug)]
pub(super) struct AddedLayer {
    path: PathBuf,
    /// Its number in the chain once it is the top.
    level: usize,
    /// The set of descriptors that is its file.
    set: u64,
}

/// The layer that the disk writes to.
struct TopFile {
    /// Opened for reading and writing.
    file: File,
    /// The set of descriptors that it is.
    set: u64,
}

/// What is under way when a layer is opened or switched to.
const ADDING: &str = "adding a layer to its disk";

impl QemuMachine {
    /// Limits what the guest reads and writes per second, of its own and apart from what the host
    /// does with its disk.
    pub(super) async fn limit_disk(&self, limits: DiskLimits) -> Result<(), VmmError> {
        let [bytes, operations] =
            [limits.bytes_per_sec, limits.operations_per_sec].map(Option::unwrap_or_default);
        // 0 is no limit.
        let throttle = json!({
            "id": DISK_ID,
            "bps": 0, "bps_rd": bytes, "bps_wr": bytes,
            "iops": 0, "iops_rd": operations, "iops_wr": operations,
        });
        let doing = "limiting its disk";
        self.command(doing, "block_set_io_throttle", throttle)
            .await
            .map(drop)
    }

    /// See [`Machine::add_disk_layer`].
    pub(super) async fn add_layer(&self, path: &Path) -> Result<(), VmmError> {
        let mut added = self.added_layer().await;
        // Of one before, opening this one lets go.
        *added = None;
        *added = Some(self.open_layer(path).await?);
        Ok(())
    }

    /// See [`Machine::forget_disk_layer`].
    pub(super) async fn forget_layer(&self, path: &Path) {
        let mut added = self.added_layer().await;
        if let Some(layer) = added.take_if(|it| it.path == path) {
            self.take_away(layer.level, layer.set).await;
        }
    }

    /// See [`Machine::switch_disk_layer`].
    pub(super) async fn put_layer(&self, path: &Path) -> Result<(), VmmError> {
        let mut added = self.added_layer().await;
        let layer = match added.take() {
            Some(layer) if layer.path == path => layer,
            _ => self.open_layer(path).await?,
        };
        let (old_name, new_name) = (disk_name(layer.level - 1), disk_name(layer.level));
        let arguments = json!({ "node": old_name, "overlay": new_name });
        let switched = self.command(ADDING, "blockdev-snapshot", arguments).await;
        if let Err(error) = switched {
            self.take_away(layer.level, layer.set).await;
            return Err(as_it_was(path, error));
        }
        if self.graph().await?.writes(&old_name) != Some(false) {
            return Err(VmmError::DiskLayer {
                path: path.to_owned(),
                why: "it was switched, but QEMU still writes to the old layer: do not share that"
                    .into(),
            });
        }
        self.put_transients_away().await;
        Ok(())
    }

    /// Has QEMU close what it needs no more, now if that is possible.
    async fn put_transients_away(&self) {
        if *Machine::run_state(self).borrow() == RunState::Running {
            self.close_transients().await;
        }
    }

    /// Has QEMU open a layer, and close any that it has opened and not switched to.
    async fn open_layer(&self, path: &Path) -> Result<AddedLayer, VmmError> {
        let open = |writable| {
            File::options()
                .read(true)
                .write(writable)
                .open(path)
                .map_err(|source| VmmError::File {
                    what: "cannot open the disk",
                    path: path.to_owned(),
                    source,
                })
        };
        let (writable, spare) = (open(true)?, open(false)?);
        let failed = |why: String| VmmError::DiskLayer {
            path: path.to_owned(),
            why,
        };
        let graph = self.graph().await?;
        let top = graph.top();
        let top = top.ok_or_else(|| failed("QEMU tells of no disk".into()))?;
        for level in graph.unused(top) {
            // As of an agent that did not live to switch to it.
            self.close_layer(&disk_name(level)).await;
        }
        // QEMU would go on with a disk of another size.
        let here = virtual_bytes(&spare)
            .map_err(|error| failed(format!("it cannot be read: {error}")))?
            .ok_or_else(|| failed("it is no qcow2 layer; the disk is as it was".into()))?;
        if let Some(below) = self.top_file(top).await? {
            let size = virtual_bytes(&below.file);
            let size = size.map_err(|error| failed(format!("the top cannot be read: {error}")))?;
            if let Some(size) = size.filter(|size| *size != here) {
                return Err(failed(format!(
                    "it is for a disk of {here} bytes, and this one has {size}; the disk is as it \
                     was"
                )));
            }
            self.reopen_for_writing(&below).await?;
        }
        let set = self.add_fd(writable.as_fd(), None, TRANSIENT).await?;
        let level = top + 1;
        let label = spare_of(&disk_name(level));
        self.add_fd(spare.as_fd(), Some(set), &label).await?;
        let mut node = disk_node(&disk_name(level), Format::Qcow2, set, true);
        // It builds on what it is put on, not on what its header may name.
        node["backing"] = json!(null);
        if let Err(error) = self.command(ADDING, "blockdev-add", node).await {
            self.undo("remove-fd", json!({ "fdset-id": set })).await;
            self.put_transients_away().await;
            return Err(as_it_was(path, error));
        }
        Ok(AddedLayer {
            path: path.to_owned(),
            level,
            set,
        })
    }

    /// Closes a layer that was opened and is no part of the disk.
    async fn take_away(&self, level: usize, set: u64) {
        let node = json!({ "node-name": disk_name(level) });
        self.undo("blockdev-del", node).await;
        self.undo("remove-fd", json!({ "fdset-id": set })).await;
        self.put_transients_away().await;
    }

    /// The same of one that may be an earlier agent's, so that its set must be found.
    async fn close_layer(&self, name: &str) {
        self.undo("blockdev-del", json!({ "node-name": name }))
            .await;
        match self.sets().await {
            Ok(sets) => {
                for set in sets.iter().filter(|set| set.is_of(name)) {
                    self.undo("remove-fd", json!({ "fdset-id": set.id() }))
                        .await;
                }
            }
            Err(error) => tracing::warn!(%error, name, "files of a closed disk layer stay open"),
        }
    }

    /// Gives QEMU another descriptor for writing to the top, which had one and has put it away:
    /// where layers below it were replaced, QEMU 7.2 opens it once more for the switch.
    async fn reopen_for_writing(&self, top: &TopFile) -> Result<(), VmmError> {
        self.add_fd(top.file.as_fd(), Some(top.set), TRANSIENT)
            .await
            .map(drop)
    }

    /// The file of the layer that the disk writes to; `None` if an earlier version opened it, which
    /// did not name it and did not replace layers.
    async fn top_file(&self, top: usize) -> Result<Option<TopFile>, VmmError> {
        let vmm = Machine::pids(self).vmm.pid;
        let sets = self.sets().await?;
        let set = sets.iter().find(|set| set.is_of(&disk_name(top)));
        let Some((set, fd)) = set.and_then(|set| Some((set.id(), set.spare()?))) else {
            return Ok(None);
        };
        let dir = self.dir();
        let found = own_file(dir, Path::new(&format!("/proc/{vmm}/fd/{fd}")));
        let found = found.map_err(|source| VmmError::File {
            what: "cannot open the disk in",
            path: dir.to_owned(),
            source,
        })?;
        Ok(found.map(|file| TopFile { file, set }))
    }

    async fn graph(&self) -> Result<Graph, VmmError> {
        let doing = "telling the layers of its disk";
        let answer = self
            .command(doing, "x-debug-query-block-graph", json!({}))
            .await?;
        understand(doing, answer)
    }

    /// Puts layers, lowest first, right below the top of a machine that stands by and has
    /// written nothing to it.
    pub(super) async fn put_below_top(&self, layers: &[PathBuf]) -> Result<(), VmmError> {
        let Some(highest) = layers.last() else {
            return Ok(());
        };
        let top = self.top_at_start().ok_or_else(|| VmmError::DiskLayer {
            path: highest.clone(),
            why: "this machine does not stand by any more".into(),
        })?;
        let below = disk_name(top.level - 1);
        self.put_between(&below, layers, top, 0).await
    }

    /// See [`Machine::replace_layers`].
    pub(super) async fn replace_below_top(
        &self,
        replaced: usize,
        kept: usize,
        layers: &[PathBuf],
    ) -> Result<(), VmmError> {
        let failed = |why: String| VmmError::DiskLayer {
            path: layers.last().cloned().unwrap_or_default(),
            why: format!("{why}; the disk is as it was"),
        };
        // Nothing is opened or switched to meanwhile.
        let _added = self.added_layer().await;
        let graph = self.graph().await?;
        let chain = graph.chain();
        if kept == 0 || chain.len() != 1 + replaced + kept {
            return Err(failed(format!(
                "the disk has {} layers, and {replaced} between its top and the lowest {kept} \
                 were to be replaced",
                chain.len()
            )));
        }
        let (old, below) = (&chain[1..=replaced], chain[1 + replaced]);
        let sets = self.sets().await?;
        let set = sets.iter().find(|set| set.is_of(chain[0]));
        let top = graph.top().zip(set.map(FdSet::id));
        let (level, set) = top.ok_or_else(|| {
            failed("its top was opened by an earlier version, which did not name it".into())
        })?;
        let round = (0..).find(|round| !graph.has(&put_name(*round, 0)));
        let round = round.unwrap_or_default();
        self.put_between(below, layers, TopLayer { level, set }, round)
            .await?;
        for name in old {
            // Those that were opened with the one on top of them are closed with it.
            if self.graph().await?.has(name) {
                self.undo("blockdev-del", json!({ "node-name": name }))
                    .await;
            }
        }
        for set in sets
            .iter()
            .filter(|set| old.iter().any(|name| set.is_of(name)))
        {
            self.undo("remove-fd", json!({ "fdset-id": set.id() }))
                .await;
        }
        Ok(())
    }

    /// Has the top lie on these layers, lowest first, and the lowest on the node `below`; `round`
    /// tells them from others that were put there.
    async fn put_between(
        &self,
        below: &str,
        layers: &[PathBuf],
        top: TopLayer,
        round: usize,
    ) -> Result<(), VmmError> {
        let doing = "putting layers below its disk's top";
        let open = |path: &PathBuf| {
            File::open(path).map_err(|source| VmmError::File {
                what: "cannot open the disk",
                path: path.clone(),
                source,
            })
        };
        let files = layers.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let (mut sets, mut added) = (Vec::with_capacity(files.len()), false);
        let put = async {
            let mut backing = json!(below);
            let mut highest = backing.clone();
            for (number, file) in files.iter().enumerate() {
                let name = put_name(round, number);
                let set = self.add_fd(file.as_fd(), None, &name).await?;
                sets.push(set);
                let mut node = disk_node(&name, Format::Qcow2, set, false);
                node["backing"] = backing;
                (backing, highest) = (node, json!(name));
            }
            if !files.is_empty() {
                // All at once: QEMU takes as long for one as for several.
                self.command(doing, "blockdev-add", backing).await?;
                added = true;
            }
            let mut node = disk_node(&disk_name(top.level), Format::Qcow2, top.set, true);
            node["backing"] = highest;
            self.command(doing, "blockdev-reopen", json!({ "options": [node] }))
                .await
        };
        let put = put.await;
        if put.is_err() {
            if added {
                let node = json!({ "node-name": put_name(round, sets.len() - 1) });
                self.undo("blockdev-del", node).await;
            }
            for set in sets {
                self.undo("remove-fd", json!({ "fdset-id": set })).await;
            }
        }
        put.map(drop)
    }

    /// Takes back a step of a switch that failed. What is reported is that failure: what
    /// stays behind is a node or descriptor that nothing uses.
    async fn undo(&self, command: &'static str, arguments: serde_json::Value) {
        if let Err(error) = self.command("undoing a switch", command, arguments).await {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, cause, command, "a disk layer that was not used stays open");
        }
    }
}

/// Opens, for reading and writing, the file among those of the machine itself (in its folder, or
/// beside that) that is the same as `named`. Of what QEMU names nothing else is opened: taken over
/// by its guest it could name a file that many machines share, and be given it for writing.
fn own_file(dir: &Path, named: &Path) -> io::Result<Option<File>> {
    let named = fs::metadata(named)?;
    let same =
        |it: &fs::Metadata| it.is_file() && (it.dev(), it.ino()) == (named.dev(), named.ino());
    for folder in [Some(dir), dir.parent()].into_iter().flatten() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            // One that is gone by now is not the disk.
            if !entry.metadata().is_ok_and(|it| same(&it)) {
                continue;
            }
            let mut options = File::options();
            options.read(true).write(true);
            // It may have become another since.
            let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            let file = file.open(entry.path())?;
            return Ok(same(&file.metadata()?).then_some(file));
        }
    }
    Ok(None)
}

/// Name of a layer that was put below the top. It has no level, as what is or was the top has.
fn put_name(round: usize, number: usize) -> String {
    format!("below{round}-{number}")
}

/// What of a switch failed that QEMU refused before it had done anything.
fn as_it_was(path: &Path, error: VmmError) -> VmmError {
    match error {
        VmmError::Qmp { source, .. } => VmmError::DiskLayer {
            path: path.to_owned(),
            why: format!("{source}; the disk is as it was"),
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g43_only_files_of_the_machine_itself_are_opened_for_it() {
        let all = tempfile::tempdir().unwrap();
        let (dir, shared) = (all.path().join("m-1/vm"), all.path().join("shared"));
        fs::create_dir_all(&dir).unwrap();
        let (inside, beside) = (dir.join("disk"), all.path().join("m-1/disk-2"));
        for file in [&inside, &beside, &shared] {
            fs::write(file, "layer").unwrap();
        }
        let link = all.path().join("link");
        std::os::unix::fs::symlink(&beside, &link).unwrap();
        let found = |named: &Path| own_file(&dir, named).unwrap();
        for named in [&inside, &beside, &link] {
            let file = found(named).unwrap().metadata().unwrap();
            assert_eq!(file.ino(), fs::metadata(named).unwrap().ino());
        }
        assert!(found(&shared).is_none());
        // A link that it has made in its folder leads nowhere.
        std::os::unix::fs::symlink(&shared, dir.join("mine")).unwrap();
        assert!(found(&shared).is_none());
        assert!(own_file(&dir, &dir.join("none")).is_err());
    }
}
