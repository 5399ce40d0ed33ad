//! A new layer on the disk of a machine that lives on.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use super::args::{DISK_ID, Format, disk_name, disk_node};
use super::machine::QemuMachine;
use super::save::{TRANSIENT, understand};
use crate::machine::RunState;
use crate::qcow2::virtual_bytes;
use crate::{DiskLimits, Machine, VmmError};

/// A node of QEMU's block layer: an image, or the file beneath one.
#[derive(Debug, Deserialize)]
struct Node {
    #[serde(rename = "node-name")]
    name: String,
    #[serde(rename = "ro")]
    read_only: bool,
    image: ImageInfo,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ImageInfo {
    virtual_size: u64,
}

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

    /// See [`Machine::switch_disk_layer`].
    pub(super) async fn put_layer(&self, path: &Path) -> Result<(), VmmError> {
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
        let nodes = self.disk_nodes().await?;
        let old = top_level(&nodes).ok_or_else(|| failed("QEMU tells of no disk".into()))?;
        let (old_name, new_name) = (disk_name(old), disk_name(old + 1));
        // QEMU would go on with a disk of another size.
        let here = virtual_bytes(&spare)
            .map_err(|error| failed(format!("it cannot be read: {error}")))?
            .ok_or_else(|| failed("it is no qcow2 layer; the disk is as it was".into()))?;
        let wanted = nodes.iter().find(|node| node.name == old_name);
        if let Some(size) = wanted.map(|node| node.image.virtual_size)
            && size != here
        {
            return Err(failed(format!(
                "it is for a disk of {here} bytes, and this one has {size}; the disk is as it was"
            )));
        }
        let set = self.add_fd(writable.as_fd(), None, TRANSIENT).await?;
        self.add_fd(spare.as_fd(), Some(set), "spare").await?;
        let mut node = disk_node(&new_name, Format::Qcow2, set, true);
        // It builds on what it is put on, not on what its header may name.
        node["backing"] = json!(null);
        let doing = "adding a layer to its disk";
        let added = self.command(doing, "blockdev-add", node).await;
        let switched = match added {
            Ok(_) => {
                let arguments = json!({ "node": old_name, "overlay": new_name });
                let result = self.command(doing, "blockdev-snapshot", arguments).await;
                if result.is_err() {
                    self.undo("blockdev-del", json!({ "node-name": new_name }))
                        .await;
                }
                result
            }
            Err(error) => Err(error),
        };
        if let Err(error) = switched {
            self.undo("remove-fd", json!({ "fdset-id": set })).await;
            return Err(match error {
                VmmError::Qmp { source, .. } => failed(format!("{source}; the disk is as it was")),
                other => other,
            });
        }
        let nodes = self.disk_nodes().await?;
        if !nodes
            .iter()
            .any(|node| node.name == old_name && node.read_only)
        {
            return Err(failed(
                "it was switched, but QEMU still writes to the old layer: do not share that".into(),
            ));
        }
        if *Machine::run_state(self).borrow() == RunState::Running {
            self.close_transients().await;
        }
        Ok(())
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
        let doing = "putting layers below its disk's top";
        let mut below = disk_name(top.level - 1);
        for (number, path) in layers.iter().enumerate() {
            let file = File::open(path).map_err(|source| VmmError::File {
                what: "cannot open the disk",
                path: path.clone(),
                source,
            })?;
            let set = self.add_fd(file.as_fd(), None, "layer").await?;
            // No number as the others have: the top stays the highest.
            let name = format!("inserted{number}");
            let mut node = disk_node(&name, Format::Qcow2, set, false);
            node["backing"] = json!(below);
            self.command(doing, "blockdev-add", node).await?;
            below = name;
        }
        let mut node = disk_node(&disk_name(top.level), Format::Qcow2, top.set, true);
        node["backing"] = json!(below);
        self.command(doing, "blockdev-reopen", json!({ "options": [node] }))
            .await
            .map(drop)
    }

    async fn disk_nodes(&self) -> Result<Vec<Node>, VmmError> {
        let doing = "telling the layers of its disk";
        let answer = self
            .command(doing, "query-named-block-nodes", json!({ "flat": true }))
            .await?;
        understand(doing, answer)
    }

    /// Takes back a step of a switch that failed. What is reported is that failure: what
    /// stays behind is a node or descriptor that nothing uses.
    async fn undo(&self, command: &'static str, arguments: serde_json::Value) {
        if let Err(error) = self.command("undoing a switch", command, arguments).await {
            tracing::warn!(%error, command, "a disk layer that was not used stays open");
        }
    }
}

/// Level of the highest layer.
fn top_level(nodes: &[Node]) -> Option<usize> {
    let levels = nodes.iter().filter_map(|node| {
        let level = node.name.strip_prefix("disk")?;
        level.parse().ok()
    });
    levels.max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_is_the_highest_number_not_the_last_in_order() {
        let node = |name: &str| Node {
            name: name.into(),
            read_only: false,
            image: ImageInfo { virtual_size: 512 },
        };
        let nodes = ["disk9", "#block123", "disk10", "disk0", "diskette", "disk"].map(node);
        assert_eq!(top_level(&nodes), Some(10));
        assert_eq!(top_level(&nodes[1..2]), None);
    }
}
