//! Users and groups, read from `/etc/passwd` and `/etc/group`.
//!
//! A static glibc has no NSS, so the two files are parsed here; see passwd(5), group(5).
//! The parsed table is kept until one of the files changes.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Neither file is believed beyond this size, so that a sandbox cannot fill our memory.
const MAX_BYTES: u64 = 4 << 20;

/// A user as programs run under it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one first, none twice.
    pub groups: Vec<u32>,
    /// Home directory, whether it is there or not.
    pub home: PathBuf,
    /// Login shell; `/bin/sh` where the entry has none.
    pub shell: PathBuf,
}

/// Why a user was not found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// There is no such name.
    #[error("invalid username: '{0}'")]
    Unknown(String),
    /// The user database cannot be read.
    #[error("cannot read {path}: {source}")]
    Database {
        /// Which file.
        path: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// The user of that name, or with that number.
pub fn lookup(name: &str) -> Result<User, UserError> {
    let table = Table::current()?;
    table
        .user(name)
        .ok_or_else(|| UserError::Unknown(name.to_owned()))
}

/// The name of a user id; `None` where no entry has it.
pub fn name_of_uid(uid: u32) -> Option<String> {
    Table::current().ok()?.uid_names.get(&uid).cloned()
}

/// The name of a group id; `None` where no entry has it.
pub fn name_of_gid(gid: u32) -> Option<String> {
    Table::current().ok()?.gid_names.get(&gid).cloned()
}

/// An absolute path for what a client wrote: `~` is the home, and what is relative starts
/// there.
pub fn expand_home(path: &Path, home: &Path) -> PathBuf {
    match path.strip_prefix("~") {
        Ok(rest) if rest.as_os_str().is_empty() => home.to_owned(),
        Ok(rest) => home.join(rest),
        Err(_) => home.join(path),
    }
}

/// What tells one version of a file from the next: device, inode, size, mtime, ctime.
type Stamp = Option<(u64, u64, u64, i64, i64, i64, i64)>;

struct Entry {
    uid: u32,
    gid: u32,
    home: PathBuf,
    shell: PathBuf,
}

#[derive(Default)]
struct Table {
    stamp: (Stamp, Stamp),
    users: HashMap<String, Entry>,
    uid_names: HashMap<u32, String>,
    gid_names: HashMap<u32, String>,
    member_of: HashMap<String, Vec<u32>>,
}

static CURRENT: Mutex<Option<Arc<Table>>> = Mutex::new(None);

fn stamp(path: &str) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    Some((
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
    ))
}

fn read(path: &'static str) -> Result<Vec<u8>, UserError> {
    use std::io::Read;
    let failed = |source| UserError::Database { path, source };
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .map_err(failed)?
        .take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(bytes)
}

impl Table {
    fn current() -> Result<Arc<Table>, UserError> {
        let now = (stamp(PASSWD), stamp(GROUP));
        let mut kept = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = kept.as_ref().filter(|t| t.stamp == now) {
            return Ok(Arc::clone(table));
        }
        let passwd = read(PASSWD)?;
        // An image without groups still has users.
        let group = match read(GROUP) {
            Err(UserError::Database { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Vec::new()
            }
            other => other?,
        };
        let mut table = Table::parse(&passwd, &group);
        table.stamp = now;
        let table = Arc::new(table);
        *kept = Some(Arc::clone(&table));
        Ok(table)
    }

    /// Lines that do not parse are skipped, and of two entries the first counts, as in
    /// glibc.
    fn parse(passwd: &[u8], group: &[u8]) -> Table {
        let mut table = Table::default();
        for line in passwd.split(|&b| b == b'\n') {
            let fields: Vec<&[u8]> = line.split(|&b| b == b':').collect();
            let [name, _, uid, gid, _, home, shell] = fields.as_slice() else {
                continue;
            };
            let (Some(name), Some(uid), Some(gid)) = (text(name), number(uid), number(gid)) else {
                continue;
            };
            if name.is_empty() || name.starts_with('#') {
                continue;
            }
            table
                .uid_names
                .entry(uid)
                .or_insert_with(|| name.to_owned());
            table.users.entry(name.to_owned()).or_insert_with(|| Entry {
                uid,
                gid,
                home: path_or(home, "/"),
                shell: path_or(shell, "/bin/sh"),
            });
        }
        for line in group.split(|&b| b == b'\n') {
            let fields: Vec<&[u8]> = line.split(|&b| b == b':').collect();
            let [name, _, gid, members] = fields.as_slice() else {
                continue;
            };
            let (Some(name), Some(gid)) = (text(name), number(gid)) else {
                continue;
            };
            table
                .gid_names
                .entry(gid)
                .or_insert_with(|| name.to_owned());
            for member in members
                .split(|&b| b == b',')
                .filter_map(text)
                .filter(|m| !m.is_empty())
            {
                table
                    .member_of
                    .entry(member.to_owned())
                    .or_default()
                    .push(gid);
            }
        }
        table
    }

    fn user(&self, name: &str) -> Option<User> {
        let (name, entry) = self.users.get_key_value(name).or_else(|| {
            let uid: u32 = number(name.as_bytes())?;
            self.users.get_key_value(self.uid_names.get(&uid)?)
        })?;
        let mut groups = vec![entry.gid];
        for gid in self.member_of.get(name).into_iter().flatten() {
            if !groups.contains(gid) {
                groups.push(*gid);
            }
        }
        Some(User {
            name: name.clone(),
            uid: entry.uid,
            gid: entry.gid,
            groups,
            home: entry.home.clone(),
            shell: entry.shell.clone(),
        })
    }
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

/// Digits only: `u32::from_str` would take a sign, and 4294967295 means "no id".
fn number(field: &[u8]) -> Option<u32> {
    let digits = text(field)?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|n| *n != u32::MAX)
}

fn path_or(field: &[u8], default: &str) -> PathBuf {
    if field.is_empty() {
        PathBuf::from(default)
    } else {
        Path::new(OsStr::from_bytes(field)).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_primary_and_supplementary_groups() {
        let table = Table::parse(
            b"root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:,,,:/home/user:\nbroken:x:-1:0::/:/\nuser:x:5:5::/:/\n# c:x:7:7::/:/\n",
            b"root:x:0:\nsudo:x:27:user,other\nuser:x:1000:user\nbad\nwheel:x:10:user",
        );
        let user = table.user("user").unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1000));
        assert_eq!(user.groups, [1000, 27, 10]);
        assert_eq!(user.home, Path::new("/home/user"));
        assert_eq!(user.shell, Path::new("/bin/sh"));
        assert_eq!(table.user("1000"), Some(user));
        assert!(
            table.user("broken").is_none()
                && table.user("").is_none()
                && table.user("nobody").is_none()
        );
        assert_eq!(table.gid_names.get(&27).map(String::as_str), Some("sudo"));
    }

    #[test]
    fn an_unknown_name_is_said_in_the_words_clients_know() {
        let error = lookup("no-such-user").unwrap_err();
        assert_eq!(error.to_string(), "invalid username: 'no-such-user'");
        assert_eq!(lookup("root").unwrap().uid, 0);
    }
}
