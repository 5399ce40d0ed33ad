//! Which layers QEMU's disk consists of.
//!
//! From `x-debug-query-block-graph` (QEMU's `qapi/block-core.json`), the one answer whose length
//! and time grow with the number of layers and not with its square: `query-named-block-nodes` took
//! more than a second with a hundred.

use serde::Deserialize;

/// The answer.
#[derive(Debug, Deserialize)]
pub(super) struct Graph {
    nodes: Vec<Node>,
    edges: Vec<Edge>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    name: String,
}

/// That a node uses another.
#[derive(Debug, Deserialize)]
struct Edge {
    parent: u64,
    child: u64,
    /// As what: `root` of a device, `file` of an image, `backing` of a layer.
    name: String,
    /// What it may do there.
    perm: Vec<String>,
}

impl Graph {
    /// The layers of the guest's disk, that which it writes to first and each on the next.
    pub(super) fn chain(&self) -> Vec<&str> {
        let device = self.nodes.iter().find(|node| node.kind == "block-backend");
        let mut at = device.and_then(|device| self.used(device.id, "root"));
        let mut chain = Vec::new();
        while let Some(node) = at {
            chain.push(node.name.as_str());
            at = self.used(node.id, "backing");
        }
        chain
    }

    fn used(&self, by: u64, role: &str) -> Option<&Node> {
        let mut edges = self.edges.iter();
        let edge = edges.find(|edge| edge.parent == by && edge.name == role)?;
        self.nodes.iter().find(|node| node.id == edge.child)
    }

    /// Whether there is a node of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.nodes.iter().any(|node| node.name == name)
    }

    /// Level of the layer that the guest's disk writes to.
    pub(super) fn top(&self) -> Option<usize> {
        level_of(self.chain().first()?)
    }

    /// Levels of layers above that one, which the disk has nothing of.
    pub(super) fn unused(&self, top: usize) -> impl Iterator<Item = usize> {
        let levels = self.nodes.iter().filter_map(|node| level_of(&node.name));
        levels.filter(move |level| *level > top)
    }

    /// Whether QEMU may write to the file of this node; `None` of one that is not there.
    pub(super) fn writes(&self, name: &str) -> Option<bool> {
        let node = self.nodes.iter().find(|node| node.name == name)?;
        let mut edges = self.edges.iter();
        let file = edges.find(|edge| edge.parent == node.id && edge.name == "file")?;
        Some(file.perm.iter().any(|may| may == "write"))
    }
}

/// Level of the layer whose node has this name.
fn level_of(name: &str) -> Option<usize> {
    name.strip_prefix("disk")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qemu::args::disk_name;

    /// Two layers of a device, and one that was opened.
    fn graph() -> Graph {
        serde_json::from_value(json!({
            "nodes": [
                { "id": 1, "type": "block-backend", "name": "disk" },
                { "id": 2, "type": "block-driver", "name": "disk10" },
                { "id": 3, "type": "block-driver", "name": "#block1" },
                { "id": 4, "type": "block-driver", "name": "disk9" },
                { "id": 5, "type": "block-driver", "name": "#block2" },
                { "id": 6, "type": "block-driver", "name": "disk11" },
                { "id": 7, "type": "block-driver", "name": "#block3" },
            ],
            "edges": [
                { "parent": 1, "child": 2, "name": "root", "perm": ["write"], "shared-perm": [] },
                { "parent": 2, "child": 3, "name": "file", "perm": ["write", "resize"] },
                { "parent": 2, "child": 4, "name": "backing", "perm": ["consistent-read"] },
                { "parent": 4, "child": 5, "name": "file", "perm": ["consistent-read"] },
                { "parent": 6, "child": 7, "name": "file", "perm": ["write"] },
            ],
        }))
        .unwrap()
    }

    #[test]
    fn the_top_is_what_the_device_has_not_the_highest_number() {
        let mut graph = graph();
        assert_eq!(graph.chain(), ["disk10", "disk9"]);
        assert_eq!(graph.top(), Some(10));
        assert!(graph.has("disk11") && !graph.has("disk1"));
        assert_eq!(graph.unused(10).collect::<Vec<_>>(), [11]);
        assert_eq!(graph.writes("disk10"), Some(true));
        assert_eq!(graph.writes("disk9"), Some(false));
        assert_eq!(graph.writes("disk1"), None);
        graph.edges.remove(0);
        assert_eq!(graph.top(), None);
    }

    #[test]
    fn only_layers_have_a_level() {
        let names = [
            "disk9",
            "disk10",
            "#block123",
            "below0-1",
            "diskette",
            "disk",
        ];
        assert_eq!(
            names.map(level_of),
            [Some(9), Some(10), None, None, None, None]
        );
        assert_eq!(level_of(&disk_name(7)), Some(7));
    }
}
