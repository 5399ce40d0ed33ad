//! What the agent writes down about a paused sandbox: `paused/sb-….json`.
//!
//! While that file is there the sandbox is paused, whatever else there may be of it: a machine
//! that is found beside it was on its way out, or had not been given to anybody yet. It is
//! synced, for a paused sandbox survives a power loss.

use std::fs::File;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use wrenn_snapshot::SnapshotId;
use wrenn_types::{SandboxId, Shape};

use super::handle::About;
use super::journal::Journal;
use crate::machine::{Record, read_json, write_json};

const VERSION: u32 = 1;

/// A paused sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paused {
    version: u32,
    /// The snapshot it goes on from; the sandbox has it pinned.
    pub snapshot: SnapshotId,
    /// Digest of the template that its memory lies on.
    pub template_digest: String,
    /// Processors and memory.
    pub shape: Shape,
    /// Size of its disk in MiB.
    pub disk_mib: u64,
    /// The guest agent's version as E2B's clients read it.
    pub envd_version: String,
    /// How often its line of memory was restored.
    pub generation: u64,
    /// What it was when it ran.
    pub journal: Journal,
    /// Why it was paused, when that was not by request.
    pub reason: Option<String>,
}

impl Paused {
    /// A machine of this record that was saved as `snapshot`.
    pub fn of(
        record: &Record,
        journal: &Journal,
        snapshot: SnapshotId,
        reason: Option<String>,
    ) -> Paused {
        Paused {
            version: VERSION,
            snapshot,
            template_digest: record.template_digest.clone(),
            shape: record.shape,
            disk_mib: record.disk_mib,
            envd_version: record.envd_version.clone(),
            generation: record.generation,
            journal: journal.restored_from(snapshot),
            reason,
        }
    }

    /// What can be seen of it.
    pub fn about(&self) -> About {
        About {
            template_digest: self.template_digest.clone(),
            shape: self.shape,
            disk_mib: self.disk_mib,
            envd_version: self.envd_version.clone(),
            generation: self.generation,
            token: self.journal.token(),
            pause_at_end: self.journal.pause_at_end,
            pause_disk_only: self.journal.pause_disk_only,
            auto_resume: self.journal.auto_resume,
            snapshot: Some(self.snapshot),
            envs: self.journal.envs.clone(),
            network: self.journal.network.clone(),
        }
    }

    /// The same, to be paused again when its time is over.
    pub fn to_pause_again(&self) -> Paused {
        let mut paused = self.clone();
        paused.journal.pause_at_end = true;
        paused
    }

    /// Makes it last: from now on the sandbox is paused.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let name = file_name(self.journal.sandbox);
        write_json(dir, &name, self)?;
        File::open(dir.join(name))?.sync_all()?;
        File::open(dir)?.sync_all()
    }

    /// From now on the sandbox is not paused any more; no error when it was not.
    pub fn remove(dir: &Path, sandbox: SandboxId) -> io::Result<()> {
        match std::fs::remove_file(dir.join(file_name(sandbox))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Err(_) => Ok(()),
            Ok(()) => File::open(dir)?.sync_all(),
        }
    }

    /// All paused sandboxes, and for those that cannot be read which they are and why.
    pub fn read_all(dir: &Path) -> io::Result<Vec<Result<Paused, io::Error>>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // One that was being written when its agent died begins with a dot.
            if name.starts_with('.') || !name.ends_with(SUFFIX) {
                continue;
            }
            let paused = read_json::<Paused>(dir, &name).and_then(|paused| {
                let gone = || io::Error::other(format!("{name} went away"));
                match paused.ok_or_else(gone)? {
                    paused if paused.version == VERSION => Ok(paused),
                    other => Err(io::Error::other(format!(
                        "{name} has version {}, this agent reads {VERSION}",
                        other.version
                    ))),
                }
            });
            found.push(paused);
        }
        Ok(found)
    }
}

const SUFFIX: &str = ".json";

fn file_name(sandbox: SandboxId) -> String {
    format!("{sandbox}{SUFFIX}")
}
