//! `machine.json`: which processes a machine's folder belongs to.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::machine::{ExitReason, MachinePids};
use crate::probe::Driver;
use crate::{LayerFormat, VmmError, firecracker};

const RECORD: &str = "machine.json";
const RECORD_TEMPORARY: &str = "machine.json.new";
pub(crate) const EXIT: &str = "exit.json";
pub(crate) const CONSOLE: &str = "console.log";

/// Version of the file.
const VERSION: u32 = 1;

/// A machine that was started in this folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Record {
    version: u32,
    /// Run of the host in which the processes were started.
    pub(crate) boot_id: String,
    /// The processes.
    pub(crate) pids: MachinePids,
    /// What runs the machine; a record from before there was a choice names none.
    #[serde(default)]
    pub(crate) monitor: Monitor,
}

/// A monitor that a driver exists for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Monitor {
    /// QEMU.
    #[default]
    Qemu,
    /// Firecracker.
    Firecracker,
}

impl fmt::Display for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Monitor::Qemu => "QEMU",
            Monitor::Firecracker => "Firecracker",
        })
    }
}

impl Record {
    pub(crate) fn new(boot_id: String, pids: MachinePids, monitor: Monitor) -> Record {
        Record {
            version: VERSION,
            boot_id,
            pids,
            monitor,
        }
    }

    /// Writes the record so that a reader finds all of it or none. It speaks of processes,
    /// which no crash of the host survives, so it is not synced.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), VmmError> {
        let path = dir.join(RECORD);
        let temporary = dir.join(RECORD_TEMPORARY);
        let write = || {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source: io::Error| VmmError::File {
            what: "cannot write",
            path,
            source,
        })
    }

    /// The record in `dir`; `None` where no machine was ever started.
    pub(crate) fn read(dir: &Path) -> Result<Option<Record>, VmmError> {
        let path = dir.join(RECORD);
        let failed = |source| VmmError::File {
            what: "cannot read",
            path: path.clone(),
            source,
        };
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if bytes.is_empty() {
            // Its host lost power before that was on the disk: no machine of it lives.
            return Ok(None);
        }
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|error| failed(error.into()))?;
        if record.version != VERSION {
            return Err(failed(io::Error::other(format!(
                "it has version {}, and only {VERSION} is known",
                record.version
            ))));
        }
        Ok(Some(record))
    }
}

/// The driver of the machine in this folder, whether or not it lives; `None` where none was ever
/// started.
pub fn driver_in(dir: &Path) -> Result<Option<Driver>, VmmError> {
    Ok(Record::read(dir)?.map(|record| match record.monitor {
        Monitor::Qemu => Driver::Qemu,
        Monitor::Firecracker => Driver::Firecracker,
    }))
}

/// How the disk layers of the machine in this folder are written, whether or not it lives; `None`
/// where none was ever started.
pub fn layers_in(dir: &Path) -> Result<Option<LayerFormat>, VmmError> {
    Ok(driver_in(dir)?.map(|driver| match driver {
        Driver::Qemu => LayerFormat::Qcow2,
        Driver::Firecracker => firecracker::layers_in(dir),
    }))
}

/// What the keeper wrote at the machine's end; `None` if it has not or never could.
pub(crate) fn read_exit(dir: &Path) -> Option<ExitReason> {
    let bytes = fs::read(dir.join(EXIT)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The end of what the guest wrote to its console.
pub(crate) fn console_tail(dir: &Path, bytes: usize) -> Result<Vec<u8>, VmmError> {
    let path = dir.join(CONSOLE);
    let read = || -> io::Result<Vec<u8>> {
        let file = File::open(&path)?;
        let length = file.metadata()?.len();
        let start = length.saturating_sub(bytes as u64);
        let mut tail = vec![0; (length - start) as usize];
        // The log may be cut meanwhile: what is there then is shorter.
        let mut filled = 0;
        while filled < tail.len() {
            match file.read_at(&mut tail[filled..], start + filled as u64)? {
                0 => break,
                count => filled += count,
            }
        }
        tail.truncate(filled);
        Ok(tail)
    };
    read().map_err(|source| VmmError::File {
        what: "cannot read the console",
        path: path.clone(),
        source,
    })
}

/// What is left of a machine that has died, from its folder: how it ended, if somebody saw it,
/// and the last `console` bytes of its console, as far as they can be read.
pub fn post_mortem(dir: &Path, console: usize) -> (Option<ExitReason>, Vec<u8>) {
    (
        read_exit(dir),
        console_tail(dir, console).unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::ProcessId;

    #[test]
    fn a_record_is_read_as_written_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), None);
        assert_eq!(driver_in(dir.path()).unwrap(), None);
        fs::write(dir.path().join(RECORD), "").unwrap();
        assert_eq!(
            Record::read(dir.path()).unwrap(),
            None,
            "lost with the power"
        );
        let id = |pid| ProcessId { pid, start_time: 9 };
        let record = Record::new(
            "boot".into(),
            MachinePids {
                keeper: id(1),
                vmm: id(2),
            },
            Monitor::Firecracker,
        );
        record.write(dir.path()).unwrap();
        assert_eq!(Record::read(dir.path()).unwrap(), Some(record.clone()));
        assert_eq!(driver_in(dir.path()).unwrap(), Some(Driver::Firecracker));
        let text = fs::read_to_string(dir.path().join(RECORD)).unwrap();
        let older = text.replace(r#","monitor":"firecracker""#, "");
        assert_ne!(older, text);
        fs::write(dir.path().join(RECORD), older).unwrap();
        let older = Record::read(dir.path()).unwrap().unwrap();
        assert_eq!((older.pids, older.monitor), (record.pids, Monitor::Qemu));
        fs::write(dir.path().join(RECORD), b"{\"version\":1").unwrap();
        assert!(Record::read(dir.path()).is_err());
    }
}
