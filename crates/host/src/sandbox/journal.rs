//! What the agent writes down about a sandbox before it acts, so that the next agent can
//! go on where this one stopped.
//!
//! `sandbox.json` lies in the machine's folder; a folder without one is a machine of the
//! pool that belongs to nobody. It is replaced by a rename and not synced: what it guards
//! against is the death of this process. A power loss ends every VM as well; of what it leaves
//! of a machine's folder, the disk is saved where it can be.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use wrenn_snapshot::SnapshotId;
use wrenn_types::{AccessToken, SandboxId};

use super::{CreateSandbox, NetworkRules, SandboxError};
use crate::lifetime::Lifetime;
use crate::machine::FIRST_LAYER;

const FILE: &str = "sandbox.json";
const VERSION: u32 = 1;

/// Where a machine's memory and disk go on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// The snapshot it was restored from or last saved as; `None`: its template. The sandbox
    /// has it pinned.
    pub parent: Option<SnapshotId>,
    /// Its disk's layers since then, files in the machine's folder, the lowest first. The last
    /// is written to, or will be after a switch that is under way; where that was not done, the
    /// machine tells ([`wrenn_vmm::Machine::written_layer`]).
    pub layers: Vec<String>,
    /// It was booted from the parent's disk: what memory the parent has is not its own.
    #[serde(default)]
    pub booted: bool,
}

impl Default for Line {
    fn default() -> Self {
        Line::from(None)
    }
}

impl From<Option<SnapshotId>> for Line {
    /// A machine that was just restored from `parent`.
    fn from(parent: Option<SnapshotId>) -> Self {
        Line {
            parent,
            layers: vec![FIRST_LAYER.to_owned()],
            booted: false,
        }
    }
}

impl Line {
    /// The layer that is written to.
    pub fn top(&self) -> &str {
        self.layers.last().map_or(FIRST_LAYER, String::as_str)
    }

    /// A name for a layer on top of them; no earlier one of the machine had it.
    pub fn next_layer(&self) -> String {
        let number = |layer: &str| -> Option<u64> {
            // Earlier versions named the format behind a dot.
            let number = layer.strip_prefix("disk-")?.split('.').next()?;
            number.parse().ok()
        };
        let last = self.layers.iter().filter_map(|layer| number(layer)).max();
        format!("disk-{}", last.unwrap_or(0) + 1)
    }

    /// The layers' files in the machine's folder.
    pub fn paths(&self, folder: &Path) -> Vec<PathBuf> {
        let layers = self.layers.iter();
        layers.map(|layer| folder.join(layer)).collect()
    }
}

/// The agent's memory of one sandbox. Holds its token: the folder is readable by root only.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    version: u32,
    /// Whose machine this is.
    pub sandbox: SandboxId,
    /// Name of its template as it was asked for.
    pub template: String,
    access_token: Option<String>,
    /// How long it may live.
    pub lifetime: Lifetime,
    /// When it was given to its user.
    pub started_at: SystemTime,
    /// Variables of every process in it.
    pub envs: BTreeMap<String, String>,
    /// What it may reach.
    #[serde(alias = "allow_internet")]
    pub network: NetworkRules,
    /// When its time is over it is paused, not ended.
    #[serde(default)]
    pub pause_at_end: bool,
    /// Only its disk is kept then.
    #[serde(default)]
    pub pause_disk_only: bool,
    /// While it is paused, traffic to its ports resumes it.
    #[serde(default)]
    pub auto_resume: bool,
    /// Where its machine goes on from.
    #[serde(default)]
    pub line: Line,
    /// Its guest agent knows whose it is. Until then it is nobody's, and of no use.
    #[serde(default = "handed")]
    pub handed: bool,
}

/// Of journals from before it was written down.
fn handed() -> bool {
    true
}

impl Journal {
    /// The entry of a sandbox that starts now.
    pub fn new(create: &CreateSandbox, token: Option<&AccessToken>) -> Self {
        Journal {
            version: VERSION,
            sandbox: create.id,
            template: create.template.clone(),
            access_token: token.map(|token| token.reveal().to_owned()),
            lifetime: create.lifetime,
            started_at: SystemTime::now(),
            envs: create.envs.clone(),
            network: create.network.clone(),
            pause_at_end: create.pause_at_end,
            pause_disk_only: create.pause_disk_only,
            auto_resume: create.auto_resume,
            line: Line::from(create.snapshot),
            handed: false,
        }
    }

    /// The token its guest agent demands.
    pub fn token(&self) -> Option<AccessToken> {
        self.access_token.clone().map(AccessToken::from_kept)
    }

    /// The same with another limit on its life.
    pub fn with_lifetime(&self, lifetime: Lifetime) -> Journal {
        Journal {
            lifetime,
            ..self.clone()
        }
    }

    /// The same with other rules about the network.
    pub fn with_network(&self, network: NetworkRules) -> Journal {
        Journal {
            network,
            ..self.clone()
        }
    }

    /// The same for a machine that was just restored from `snapshot`.
    pub fn restored_from(&self, snapshot: SnapshotId) -> Journal {
        Journal {
            line: Line::from(Some(snapshot)),
            ..self.clone()
        }
    }

    /// The same for a machine that was just booted from the disk of `snapshot`.
    pub fn booted_from(&self, snapshot: SnapshotId) -> Journal {
        let mut journal = self.restored_from(snapshot);
        journal.line.booted = true;
        journal
    }

    /// Replaces what is written in a machine's folder.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        crate::machine::write_json(folder, FILE, self)
    }

    /// As [`Journal::write`], with the sandbox in the error.
    pub fn keep(&self, folder: &Path) -> Result<(), SandboxError> {
        self.write(folder).map_err(|source| SandboxError::Journal {
            id: self.sandbox,
            source,
        })
    }

    /// What is written in a machine's folder; `None` for a machine of the pool.
    pub fn read(folder: &Path) -> io::Result<Option<Journal>> {
        let journal: Option<Journal> = crate::machine::read_json(folder, FILE)?;
        match journal {
            Some(journal) if journal.version != VERSION => Err(io::Error::other(format!(
                "{} has version {}, this agent reads {VERSION}",
                folder.join(FILE).display(),
                journal.version,
            ))),
            journal => Ok(journal),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Journal::read(dir.path()).unwrap().is_none());
        let token = AccessToken::generate().unwrap();
        let create = CreateSandbox {
            id: SandboxId::new(),
            template: "minimal".into(),
            snapshot: None,
            shape: None,
            envs: BTreeMap::from([("A".into(), "1".into())]),
            lifetime: Lifetime {
                idle: Some(std::time::Duration::from_secs(3)),
                end_at: None,
            },
            network: NetworkRules::default(),
            secure: true,
            pause_at_end: false,
            pause_disk_only: false,
            auto_resume: false,
        };
        let journal = Journal::new(&create, Some(&token));
        journal.write(dir.path()).unwrap();
        let back = Journal::read(dir.path()).unwrap().unwrap();
        assert_eq!(back.sandbox, journal.sandbox);
        assert_eq!(back.lifetime, journal.lifetime);
        assert!(back.token().unwrap().matches(token.reveal()));
        assert!(!format!("{:?}", back.token()).contains(token.reveal()));

        // An agent from before there were snapshots wrote no line.
        let path = dir.path().join(FILE);
        let mut old: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for new in [
            "line",
            "pause_at_end",
            "pause_disk_only",
            "auto_resume",
            "handed",
        ] {
            old.as_object_mut().unwrap().remove(new);
        }
        std::fs::write(&path, old.to_string()).unwrap();
        assert_eq!(
            Journal::read(dir.path()).unwrap().unwrap().line,
            journal.line
        );

        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        let error = Journal::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("sandbox.json"), "{error}");
    }

    #[test]
    fn layers_get_names_of_their_own() {
        let mut line = Line::default();
        assert_eq!(line.top(), FIRST_LAYER);
        for expected in ["disk-1", "disk-2"] {
            line.layers.push(line.next_layer());
            assert_eq!(line.top(), expected);
        }
        // Those below are gone into a snapshot; their names stay taken.
        line.layers.drain(..2);
        assert_eq!(line.next_layer(), "disk-3");
        line.layers = vec!["disk-7.qcow2".to_owned()];
        assert_eq!(line.next_layer(), "disk-8");
    }
}
