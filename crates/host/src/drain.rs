//! Draining: the host starts nothing any more, and what runs goes on.
//!
//! Whether it drains is the file `drain.json` in the data folder, so it outlasts the agent and
//! the machine's own restart: an operator who empties a host for repair wants it empty until
//! told otherwise.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::activity::{from_unix_ms, unix_ms};
use crate::machine::{read_json, unfinished, write_json};

const FILE: &str = "drain.json";
const VERSION: u32 = 1;

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    since_unix_ms: i64,
}

/// Whether this host drains.
#[derive(Debug)]
pub struct Drain {
    data_dir: PathBuf,
    since: Mutex<Option<SystemTime>>,
}

impl Drain {
    /// As an earlier agent on this data folder left it.
    pub fn open(data_dir: &Path) -> io::Result<Drain> {
        // Its agent may have died while it wrote that down.
        remove(&data_dir.join(unfinished(FILE)))?;
        Ok(Drain {
            since: Mutex::new(draining_since(data_dir)?),
            data_dir: data_dir.to_owned(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<SystemTime>> {
        // One value is replaced by another; a panic leaves it whole.
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when it drains; `None`: it does not.
    pub fn since(&self) -> Option<SystemTime> {
        *self.lock()
    }

    /// Drains from now on, or no more. Once this has returned, it lasts. What was so before
    /// stays as it was, its time included.
    pub fn set(&self, draining: bool) -> io::Result<Option<SystemTime>> {
        let mut since = self.lock();
        if draining == since.is_some() {
            return Ok(*since);
        }
        let now = draining.then(SystemTime::now);
        match now {
            Some(now) => {
                let note = Note {
                    version: VERSION,
                    since_unix_ms: unix_ms(now),
                };
                write_json(&self.data_dir, FILE, &note)?;
                File::open(self.data_dir.join(FILE))?.sync_all()?;
            }
            None => remove(&self.data_dir.join(FILE))?,
        }
        File::open(&self.data_dir)?.sync_all()?;
        *since = now;
        Ok(now)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Since when the host with this data folder drains, whether or not its agent runs.
pub fn draining_since(data_dir: &Path) -> io::Result<Option<SystemTime>> {
    match read_json::<Note>(data_dir, FILE)? {
        None => Ok(None),
        Some(note) if note.version == VERSION => Ok(Some(from_unix_ms(note.since_unix_ms))),
        Some(note) => Err(io::Error::other(format!(
            "{} has version {}, this agent reads {VERSION}",
            data_dir.join(FILE).display(),
            note.version
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_outlasts_the_agent_and_keeps_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let drain = Drain::open(dir.path()).unwrap();
        assert_eq!(drain.since(), None);
        assert_eq!(drain.set(false).unwrap(), None);
        let since = drain.set(true).unwrap();
        assert!(since.is_some());
        assert_eq!(drain.set(true).unwrap(), since, "it began once");

        std::fs::write(dir.path().join(unfinished(FILE)), "{\"half").unwrap();
        let next = Drain::open(dir.path()).unwrap();
        assert_eq!(
            next.since().map(unix_ms),
            since.map(unix_ms),
            "to the millisecond"
        );
        assert_eq!(next.set(false).unwrap(), None);
        assert_eq!(draining_since(dir.path()).unwrap(), None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_damaged_note_is_named_and_not_taken_for_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        for wrong in ["{", r#"{"version":9,"since_unix_ms":1}"#] {
            std::fs::write(&path, wrong).unwrap();
            let error = Drain::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(FILE), "{error}");
        }
    }
}
