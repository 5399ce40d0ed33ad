//! What a page server is told when it is started.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use wrenn_snapshot::{BaseId, SnapshotId};

use crate::ServeError;

/// Longest configuration: paths, and some numbers.
const MAX_BYTES: u64 = 64 << 10;

/// One page server's orders: one VM, whose memory it serves until that VM is gone. They come
/// as JSON on a descriptor, so that nobody sees them in a list of processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// Where the monitor will connect; made here, for its user alone, and removed once the
    /// monitor has connected.
    pub socket: PathBuf,
    /// The monitor's user. Nobody else is listened to.
    pub uid: u32,
    /// Where [`crate::ask`] finds this server, whoever started it; made here, for this
    /// process's user alone.
    pub control: PathBuf,
    /// The file that tells what was done, and at the end why it ended: a [`crate::Status`].
    pub status: PathBuf,
    /// The store of snapshots.
    pub store: PathBuf,
    /// The snapshot in it; without one the base's memory is served as it is.
    pub snapshot: Option<SnapshotId>,
    /// Who has pinned the snapshot, where it may be deleted meanwhile.
    pub pinned_by: Option<String>,
    /// What the snapshot is laid over.
    pub base: Option<BaseConfig>,
    /// What is done before the machine asks for it.
    pub policy: Policy,
    /// How long the monitor may take to connect.
    pub connect_millis: u64,
    /// How long it may take to say where its memory is.
    pub handshake_millis: u64,
}

/// The memory that a snapshot is laid over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BaseConfig {
    /// A sealed memfd whose content was verified: `/proc/self/fd/N`, inherited.
    pub path: PathBuf,
    /// Its name.
    pub id: BaseId,
}

/// What is done before the machine asks for it. None of this changes what a page holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    /// The file with the pages to bring first. When recording it is written, else it is read
    /// if it is there.
    pub working_set: Option<PathBuf>,
    /// Records the working set. Until that is done nothing else is brought, since a page
    /// that is there is not asked for.
    pub record: Option<Record>,
    /// Whether all other pages are brought too.
    pub background: bool,
    /// Most bytes of data brought so per second; zeros and the working set are not counted.
    pub background_bytes_per_second: Option<u64>,
}

/// When a recording ends: with the first of these, or with [`crate::Request::FinishRecording`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// So long after the monitor has connected.
    pub millis: u64,
    /// With so many pages.
    pub pages: u32,
}

impl Config {
    /// Reads the orders from a descriptor, up to its end.
    pub fn read(from: impl Read) -> Result<Config, ServeError> {
        let mut text = Vec::new();
        let wrong = |error: &dyn std::fmt::Display| ServeError::Config(error.to_string());
        let mut limited = from.take(MAX_BYTES + 1);
        limited.read_to_end(&mut text).map_err(|e| wrong(&e))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(wrong(&format!("it is longer than {MAX_BYTES} bytes")));
        }
        let config: Config = serde_json::from_slice(&text).map_err(|e| wrong(&e))?;
        if config.policy.record.is_some() && config.policy.working_set.is_none() {
            let problem = "`record` needs `workingSet`, the file to write";
            return Err(ServeError::Config(problem.into()));
        }
        Ok(config)
    }

    pub(crate) fn connect_patience(&self) -> Duration {
        Duration::from_millis(self.connect_millis)
    }

    pub(crate) fn handshake_patience(&self) -> Duration {
        Duration::from_millis(self.handshake_millis)
    }
}
