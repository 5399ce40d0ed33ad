//! Names that a slot's resolver relay did not resolve because the policy says so: noted by the
//! relay, read by the agent.
//!
//! The relay is another process, has no rights and outlives the agent. It gets a file as a
//! descriptor for writing, one made anew for each relay, and writes in place: [`PLACES`] entries of
//! [`ENTRY`] bytes, of which the one refused longest ago gives way to the next name. A checksum
//! tells a whole entry from a torn one. What a guest asks for is in there, so the agent takes it
//! for no more than a text.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::config::NetConfig;
use crate::denials::{Denial, Destination, Reason};
use crate::notice::checksum;

/// Names that are remembered.
const PLACES: usize = 64;
/// Bytes of an entry: checksum of the rest 4, version 1, reason 1, length of the name 2, count 8,
/// milliseconds since 1970 8, name.
const ENTRY: usize = 24 + LONGEST_NAME;
/// The longest name as text.
const LONGEST_NAME: usize = 256;
const VERSION: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: String,
    reason: Reason,
    count: u64,
    at_unix_ms: u64,
}

impl Entry {
    fn encode(&self) -> Option<[u8; ENTRY]> {
        let mut bytes = [0; ENTRY];
        let name = self.name.as_bytes();
        bytes[4] = VERSION;
        bytes[5] = u8::try_from(self.reason.mark()).ok()?;
        bytes[6..8].copy_from_slice(&u16::try_from(name.len()).ok()?.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.count.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.at_unix_ms.to_be_bytes());
        bytes.get_mut(24..24 + name.len())?.copy_from_slice(name);
        let sum = checksum(&bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_be_bytes());
        Some(bytes)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; ENTRY] = bytes.try_into().ok()?;
        let sum = u32::from_be_bytes(*bytes.first_chunk()?);
        if sum != checksum(&bytes[4..]) || bytes[4] != VERSION {
            return None;
        }
        let number = |at: usize| Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let len = usize::from(u16::from_be_bytes([bytes[6], bytes[7]]));
        let name = std::str::from_utf8(bytes.get(24..24 + len)?).ok()?;
        Some(Self {
            name: name.to_owned(),
            reason: Reason::of_mark(u32::from(bytes[5])),
            count: number(8)?,
            at_unix_ms: number(16)?,
        })
    }
}

/// The relay's end: where it notes what it refuses. Clones note in the same file.
#[derive(Debug, Clone)]
pub(crate) struct Refusals(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    file: File,
    entries: Vec<Entry>,
}

impl Refusals {
    pub(crate) fn new(file: File) -> Self {
        Self(Arc::new(Mutex::new(Table {
            file,
            entries: Vec::new(),
        })))
    }

    /// This name was not resolved just now.
    pub(crate) fn note(&self, name: &str, reason: Reason) {
        // An entry is replaced in one step; a panic leaves the table whole.
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = table.note(name, reason, unix_ms(SystemTime::now())) {
            tracing::debug!(%error, "a name that was refused could not be noted");
        }
    }
}

impl Table {
    fn note(&mut self, name: &str, reason: Reason, now: u64) -> io::Result<()> {
        let known = |entry: &Entry| entry.name == name && entry.reason == reason;
        let place = match self.entries.iter().position(known) {
            Some(place) => place,
            None => {
                let new = Entry {
                    name: name.to_owned(),
                    reason,
                    count: 0,
                    at_unix_ms: now,
                };
                let oldest = self.entries.iter().enumerate();
                match oldest.min_by_key(|(_, entry)| entry.at_unix_ms) {
                    Some((place, _)) if self.entries.len() == PLACES => {
                        self.entries[place] = new;
                        place
                    }
                    _ => {
                        self.entries.push(new);
                        self.entries.len() - 1
                    }
                }
            }
        };
        let entry = &mut self.entries[place];
        entry.count = entry.count.saturating_add(1);
        entry.at_unix_ms = now;
        match entry.encode() {
            Some(bytes) => self.file.write_all_at(&bytes, (place * ENTRY) as u64),
            None => Err(io::Error::other("the name is too long")),
        }
    }
}

/// Where the names that a slot's relay refused are noted.
pub(crate) fn path_of(config: &NetConfig, name: &str) -> PathBuf {
    config.state_dir.join("net").join("refused").join(name)
}

/// Makes the file for a new relay; whatever an earlier one still writes is nobody's.
pub(crate) fn make(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    remove(path)?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Forgets all names, if there are any.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names that were refused not longer ago than `kept`. None where there is no file: a relay
/// of an earlier version notes nothing.
pub(crate) fn read(path: &Path, kept: Duration) -> io::Result<Vec<Denial>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    io::Read::read_to_end(
        &mut io::Read::take(file, (PLACES * ENTRY) as u64),
        &mut bytes,
    )?;
    let since = unix_ms(SystemTime::now()).saturating_sub(kept.as_millis() as u64);
    let entries = bytes.chunks(ENTRY).filter_map(Entry::decode);
    let denial = |entry: Entry| Denial {
        at: SystemTime::UNIX_EPOCH + Duration::from_millis(entry.at_unix_ms),
        protocol: None,
        destination: Destination::Name(entry.name),
        port: None,
        count: entry.count,
        reason: entry.reason,
    };
    Ok(entries
        .filter(|entry| entry.at_unix_ms >= since)
        .map(denial)
        .collect())
}

fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn names(path: &Path) -> Vec<(String, u64, Reason)> {
        let read = read(path, HOUR).unwrap();
        let all = read.into_iter();
        all.map(|d| (d.destination.to_string(), d.count, d.reason))
            .collect()
    }

    #[test]
    fn names_are_counted_by_reason_and_a_new_relay_forgets_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("refused/wrenn-1");
        assert_eq!(names(&path), []);
        let refusals = Refusals::new(make(&path).unwrap());
        refusals.note("evil.example", Reason::Denied);
        refusals.clone().note("evil.example", Reason::Denied);
        refusals.note("evil.example", Reason::Forbidden);
        assert_eq!(
            names(&path),
            [
                ("evil.example".to_owned(), 2, Reason::Denied),
                ("evil.example".to_owned(), 1, Reason::Forbidden),
            ]
        );
        let next = Refusals::new(make(&path).unwrap());
        refusals.note("late.example", Reason::Denied);
        assert_eq!(names(&path), []);
        next.note(&"a".repeat(255), Reason::InternetOff);
        assert_eq!(names(&path).len(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
    }

    #[test]
    fn a_flood_takes_no_more_room_and_what_is_old_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("refused");
        let mut table = Table {
            file: make(&path).unwrap(),
            entries: Vec::new(),
        };
        let now = unix_ms(SystemTime::now());
        for n in 0..1000 {
            table
                .note(&format!("n{n}.example"), Reason::Denied, now + n)
                .unwrap();
        }
        let all = names(&path);
        assert_eq!(all.len(), PLACES);
        assert!(all.iter().any(|(name, ..)| name == "n999.example"));
        assert!(!all.iter().any(|(name, ..)| name == "n1.example"));
        assert_eq!(fs::metadata(&path).unwrap().len(), (PLACES * ENTRY) as u64);
    }

    #[test]
    fn what_is_old_torn_or_nonsense_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("refused");
        let mut table = Table {
            file: make(&path).unwrap(),
            entries: Vec::new(),
        };
        let now = unix_ms(SystemTime::now());
        table
            .note("old.example", Reason::Denied, now - 3_700_000)
            .unwrap();
        assert_eq!(names(&path), []);
        table.note("new.example", Reason::Denied, now).unwrap();
        assert_eq!(names(&path).len(), 1);
        let whole = fs::read(&path).unwrap();
        for at in ENTRY..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x41;
            fs::write(&path, &bad).unwrap();
            assert_eq!(names(&path), [], "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(names(&path), [], "cut at {at}");
        }
        fs::write(&path, vec![0xff; 10 * PLACES * ENTRY]).unwrap();
        assert_eq!(names(&path), []);
    }
}
