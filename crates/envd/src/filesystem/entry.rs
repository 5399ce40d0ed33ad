//! What is known of one file: the entry of `Stat`, `ListDir` and watch events.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::marker::PhantomData;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use buffa::{EnumValue, MessageField};
use buffa_types::google::protobuf::Timestamp;
use rustix::fd::{AsFd, AsRawFd};
use rustix::fs::{AtFlags, CWD, FileType as Kind, Stat};
use rustix::io::Errno;
use wrenn_wire::filesystem::{EntryInfo, FileType};

use super::error::FsError;
use crate::users;

/// Extended attributes with this prefix are a file's metadata.
pub const METADATA_PREFIX: &str = "user.e2b.";
/// Attribute lists and values up to this size are read without a second call; see xattr(7).
const XATTR_BUFFER: usize = 4096;

/// One file, directory or link.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Last part of the path.
    pub name: String,
    /// Absolute path as it was asked for.
    pub path: PathBuf,
    /// What it is; for a link what it leads to, `Symlink` where it leads nowhere.
    pub kind: FileType,
    /// Bytes; for a link those of its text.
    pub size: i64,
    /// Permission bits, for a link those of what it leads to.
    pub mode: u32,
    /// `-rw-r--r--`, `Lrwxrwxrwx`.
    pub permissions: String,
    /// User name, the number where there is none.
    pub owner: String,
    /// Group name, the number where there is none.
    pub group: String,
    /// Seconds and nanoseconds of Unix time.
    pub modified: (i64, i32),
    /// Where a link leads, resolved to the end; its text where it leads nowhere.
    pub symlink_target: Option<String>,
    /// Attributes `user.e2b.*` without the prefix.
    pub metadata: HashMap<String, String>,
}

impl From<Entry> for EntryInfo {
    fn from(entry: Entry) -> Self {
        let modified = Timestamp {
            seconds: entry.modified.0,
            nanos: entry.modified.1,
            ..Timestamp::default()
        };
        EntryInfo {
            name: entry.name,
            r#type: EnumValue::from(entry.kind),
            path: entry.path.to_string_lossy().into_owned(),
            size: entry.size,
            mode: entry.mode,
            permissions: entry.permissions,
            owner: entry.owner,
            group: entry.group,
            modified_time: MessageField::some(modified),
            is_symlink: entry.symlink_target.is_some(),
            symlink_target: entry.symlink_target,
            metadata: entry.metadata.into_iter().collect(),
            ..EntryInfo::default()
        }
    }
}

/// Names of owners, looked up once each.
#[derive(Debug, Default)]
pub struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    fn user(&mut self, uid: u32) -> String {
        let name = || users::name_of_uid(uid).unwrap_or_else(|| uid.to_string());
        self.users.entry(uid).or_insert_with(name).clone()
    }

    fn group(&mut self, gid: u32) -> String {
        let name = || users::name_of_gid(gid).unwrap_or_else(|| gid.to_string());
        self.groups.entry(gid).or_insert_with(name).clone()
    }
}

/// The thread's own working directory, until this is dropped.
#[derive(Debug)]
pub struct Inside {
    thread_bound: PhantomData<*const ()>,
}

impl Inside {
    /// Enters an open directory. `None` where that cannot be, as for a user who may read it
    /// and not pass through it.
    pub fn enter(dir: impl AsFd) -> Option<Inside> {
        thread_local! {
            static OWN: Cell<bool> = const { Cell::new(false) };
        }
        if !OWN.get() {
            crate::sys::own_working_directory().ok()?;
            OWN.set(true);
        }
        rustix::process::fchdir(dir).ok()?;
        Some(Inside {
            thread_bound: PhantomData,
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // Nothing of ours goes by the working directory; only, none must be held.
        if let Err(error) = rustix::process::chdir("/") {
            tracing::warn!(%error, "a thread stays in a directory that it has listed");
        }
    }
}

/// The entry at an absolute path. A link is described, and what it leads to gives type,
/// mode and metadata.
///
/// # Errors
/// [`FsError::Missing`] where there is nothing, also below something that is no directory.
pub fn at_path(path: &Path, names: &mut Names) -> Result<Entry, FsError> {
    let stat = rustix::fs::lstat(path).map_err(|errno| match errno {
        Errno::NOTDIR => FsError::Missing(path.to_owned()),
        other => FsError::from_errno("stat", path, other),
    })?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    let name = name.to_string_lossy().into_owned();
    let at = path.as_os_str().as_bytes();
    build(CWD, at, path, name, path.to_owned(), &stat, names)
}

/// The entry `name` of the open directory `dir`, whose path is `parent`. Quicker where the
/// thread has the directory as its own working directory, `inside`.
///
/// # Errors
/// [`FsError::Missing`] when it is gone by now.
pub fn in_dir(
    dir: impl AsFd,
    parent: &Path,
    name: &CStr,
    inside: Option<&Inside>,
    names: &mut Names,
) -> Result<Entry, FsError> {
    let bytes = name.to_bytes();
    let path = parent.join(std::ffi::OsStr::from_bytes(bytes));
    let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| FsError::from_errno("stat", &path, errno))?;
    let shown = String::from_utf8_lossy(bytes).into_owned();
    let reach = match inside {
        Some(_) => PathBuf::from(std::ffi::OsStr::from_bytes(bytes)),
        None => beneath(&dir, bytes),
    };
    build(dir, bytes, &reach, shown, path, &stat, names)
}

/// A path that reaches a name in an open directory: extended attributes have no calls
/// relative to a descriptor. The kernel walks through its proc file system for it.
fn beneath(dir: impl AsFd, name: &[u8]) -> PathBuf {
    let fd = dir.as_fd().as_raw_fd();
    Path::new(&format!("/proc/self/fd/{fd}")).join(std::ffi::OsStr::from_bytes(name))
}

fn build(
    dir: impl AsFd,
    at: &[u8],
    reach: &Path,
    name: String,
    path: PathBuf,
    stat: &Stat,
    names: &mut Names,
) -> Result<Entry, FsError> {
    let own = Kind::from_raw_mode(stat.st_mode);
    let (kind, mode, symlink_target) = if own == Kind::Symlink {
        let (kind, mode) = match rustix::fs::statat(&dir, at, AtFlags::empty()) {
            Ok(target) => (
                wire_kind(Kind::from_raw_mode(target.st_mode)),
                target.st_mode,
            ),
            // It leads nowhere, in a circle, or where the user may not look.
            Err(_) => (FileType::FILE_TYPE_SYMLINK, stat.st_mode),
        };
        let target = match std::fs::canonicalize(&path) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(_) => rustix::fs::readlinkat(&dir, at, Vec::new())
                .map_err(|errno| FsError::from_errno("read link", &path, errno))?
                .to_string_lossy()
                .into_owned(),
        };
        (kind, mode, Some(target))
    } else {
        (wire_kind(own), stat.st_mode, None)
    };
    let metadata = match own {
        Kind::RegularFile | Kind::Directory | Kind::Symlink => metadata(reach),
        _ => HashMap::new(),
    };
    Ok(Entry {
        name,
        path,
        kind,
        size: stat.st_size,
        mode: mode & 0o777,
        permissions: permissions(stat.st_mode),
        owner: names.user(stat.st_uid),
        group: names.group(stat.st_gid),
        modified: (
            stat.st_mtime,
            i32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ),
        symlink_target,
        metadata,
    })
}

fn wire_kind(kind: Kind) -> FileType {
    match kind {
        Kind::RegularFile => FileType::FILE_TYPE_FILE,
        Kind::Directory => FileType::FILE_TYPE_DIRECTORY,
        Kind::Symlink => FileType::FILE_TYPE_SYMLINK,
        _ => FileType::FILE_TYPE_UNSPECIFIED,
    }
}

/// The metadata of what `path` leads to. Empty where there is none, the file system keeps
/// none, or the user may not read it: an entry is not refused for its metadata.
pub fn metadata(path: &Path) -> HashMap<String, String> {
    let Some(list) = sized(|buffer| rustix::fs::listxattr(path, buffer)) else {
        return HashMap::new();
    };
    let mut out = HashMap::new();
    for name in list.split(|byte| *byte == 0) {
        let Some(key) = name.strip_prefix(METADATA_PREFIX.as_bytes()) else {
            continue;
        };
        if let Some(value) = sized(|buffer| rustix::fs::getxattr(path, name, buffer)) {
            out.insert(
                String::from_utf8_lossy(key).into_owned(),
                String::from_utf8_lossy(&value).into_owned(),
            );
        }
    }
    out
}

/// The attributes `user.*` of a file that are not metadata, with their values.
pub fn other_attributes(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let list = sized(|buffer| rustix::fs::listxattr(path, buffer)).unwrap_or_default();
    list.split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user.") && !name.starts_with(METADATA_PREFIX.as_bytes()))
        .filter_map(|name| {
            let value = sized(|buffer| rustix::fs::getxattr(path, name, buffer))?;
            Some((name.to_vec(), value))
        })
        .collect()
}

/// Reads with a small buffer, then with the largest the kernel fills (64 KiB).
fn sized(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> Option<Vec<u8>> {
    let mut small = [0u8; XATTR_BUFFER];
    match read(&mut small) {
        Ok(length) => small.get(..length).map(<[u8]>::to_vec),
        Err(Errno::RANGE) => {
            let mut large = vec![0u8; 1 << 16];
            let length = read(&mut large).ok()?;
            large.truncate(length);
            Some(large)
        }
        Err(_) => None,
    }
}

/// Type and permissions as Go's `fs.FileMode` prints them: type letters (`d`, `L`, `D`, `Dc`,
/// `p`, `S`), then `u`, `g`, `t` for set-user-id, set-group-id and sticky, `-` where there is
/// none of these, then nine permission letters.
pub fn permissions(mode: u32) -> String {
    let mut text = String::with_capacity(12);
    text.push_str(match Kind::from_raw_mode(mode) {
        Kind::Directory => "d",
        Kind::Symlink => "L",
        Kind::BlockDevice => "D",
        Kind::Fifo => "p",
        Kind::Socket => "S",
        Kind::CharacterDevice => "D",
        _ => "",
    });
    for (bit, letter) in [(0o4000, 'u'), (0o2000, 'g')] {
        if mode & bit != 0 {
            text.push(letter);
        }
    }
    if Kind::from_raw_mode(mode) == Kind::CharacterDevice {
        text.push('c');
    }
    if mode & 0o1000 != 0 {
        text.push('t');
    }
    if text.is_empty() {
        text.push('-');
    }
    for shift in (0..9).rev() {
        let letter = ['x', 'w', 'r'][shift % 3];
        text.push(if mode & (1 << shift) != 0 {
            letter
        } else {
            '-'
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_read_as_go_prints_them() {
        for (mode, text) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o120_777, "Lrwxrwxrwx"),
            (0o041_777, "dtrwxrwxrwx"),
            (0o104_755, "urwxr-xr-x"),
            (0o106_711, "ugrwx--x--x"),
            (0o042_755, "dgrwxr-xr-x"),
            (0o020_666, "Dcrw-rw-rw-"),
            (0o060_660, "Drw-rw----"),
            (0o010_600, "prw-------"),
            (0o140_755, "Srwxr-xr-x"),
            (0o100_000, "----------"),
        ] {
            assert_eq!(permissions(mode), text, "{mode:o}");
        }
    }
}
