//! The files of a tree, each directory before what is in it and that by the bytes of its name.

use std::fs::{DirEntry, FileType, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::io::Errno;
use serde::Serialize;

use super::Name;
use super::mounts::Mounts;
use crate::filesystem::hidden;

/// More files than this are not listed.
const MOST: usize = 1_000_000;

/// One file.
#[derive(Debug, Serialize)]
pub(super) struct Listed {
    #[serde(flatten)]
    name: Name,
    kind: &'static str,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    /// In nanoseconds since 1970, as is `changed`.
    modified: i64,
    changed: i64,
    inode: u64,
}

fn kind(of: FileType) -> &'static str {
    match of {
        of if of.is_file() => "file",
        of if of.is_dir() => "directory",
        of if of.is_symlink() => "symlink",
        of if of.is_fifo() => "fifo",
        of if of.is_socket() => "socket",
        of if of.is_block_device() => "block_device",
        _ => "character_device",
    }
}

impl Listed {
    fn new(path: &Path, about: &Metadata) -> Listed {
        let nanos =
            |secs: i64, nanos: i64| secs.saturating_mul(1_000_000_000).saturating_add(nanos);
        Listed {
            name: Name::of(path),
            kind: kind(about.file_type()),
            mode: about.mode() & 0o7777,
            uid: about.uid(),
            gid: about.gid(),
            // A directory's is its file system's business.
            size: if about.is_dir() { 0 } else { about.size() },
            modified: nanos(about.mtime(), about.mtime_nsec()),
            changed: nanos(about.ctime(), about.ctime_nsec()),
            inode: about.ino(),
        }
    }
}

/// Tells of `path` and all below it, but for what [`Mounts::passes_over`]. Files that go while it
/// looks are left out. `true` when there are more than it told of.
pub(super) fn below(
    path: &Path,
    mounts: &Mounts,
    tell: &mut impl FnMut(&Listed) -> io::Result<()>,
) -> io::Result<bool> {
    let Some(about) = there(std::fs::symlink_metadata(path))? else {
        return Ok(false);
    };
    tell(&Listed::new(path, &about))?;
    let mut told = 1;
    let mut truncated = false;
    let mut open = Vec::new();
    if about.is_dir() {
        open.push(entries(path, &mut truncated)?);
    }
    while let Some(entries_left) = open.last_mut() {
        let Some(entry) = entries_left.next() else {
            open.pop();
            continue;
        };
        let path = entry.path();
        // Before it is asked what it is: who would have to answer may stand still.
        if mounts.passes_over(&path) || hidden::is_hidden(entry.file_name().as_bytes()) {
            continue;
        }
        let Some(about) = there(entry.metadata())? else {
            continue;
        };
        if told == MOST {
            return Ok(true);
        }
        tell(&Listed::new(&path, &about))?;
        told += 1;
        if about.is_dir() {
            open.push(entries(&path, &mut truncated)?);
        }
    }
    Ok(truncated)
}

/// What is in a directory, in order.
fn entries(path: &Path, truncated: &mut bool) -> io::Result<std::vec::IntoIter<DirEntry>> {
    let mut found = Vec::new();
    let read = match std::fs::read_dir(path) {
        // Deeper than a path can say.
        Err(error) if error.raw_os_error() == Some(Errno::NAMETOOLONG.raw_os_error()) => {
            *truncated = true;
            None
        }
        read => there(read)?,
    };
    for entry in read.into_iter().flatten() {
        if found.len() == MOST {
            *truncated = true;
            break;
        }
        found.push(entry?);
    }
    found.sort_by_cached_key(DirEntry::file_name);
    Ok(found.into_iter())
}

/// `None` for what is not there, or no directory any more.
fn there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(None),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn told(path: &Path) -> Vec<serde_json::Value> {
        let mut all = Vec::new();
        let truncated = below(path, &Mounts::default(), &mut |file| {
            all.push(serde_json::to_value(file).unwrap());
            Ok(())
        });
        assert!(!truncated.unwrap());
        all
    }

    #[test]
    fn a_tree_is_told_in_its_order() {
        let dir = std::env::temp_dir().join(format!("envd-walk-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a")).unwrap();
        std::fs::write(dir.join("a/z"), "12345").unwrap();
        std::fs::write(dir.join("a.b"), "").unwrap();
        std::fs::write(dir.join(hidden::move_name()), "half").unwrap();
        std::fs::set_permissions(dir.join("a.b"), PermissionsExt::from_mode(0o4711)).unwrap();
        symlink("a/z", dir.join("link")).unwrap();
        let all = told(&dir);
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let names: Vec<_> = all
            .iter()
            .map(|one| one["path"].as_str().unwrap())
            .collect();
        // What is in `a` comes before `a.b`, which has the smaller path.
        assert_eq!(
            names,
            [
                dir.to_str().unwrap(),
                &path("a"),
                &path("a/z"),
                &path("a.b"),
                &path("link")
            ]
        );
        assert_eq!(
            (all[2]["kind"].as_str(), all[2]["size"].as_u64()),
            (Some("file"), Some(5))
        );
        assert_eq!(all[3]["mode"], 0o4711);
        assert_eq!(
            (all[4]["kind"].as_str(), all[4]["size"].as_u64()),
            (Some("symlink"), Some(3))
        );
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(told(&dir).is_empty());
    }

    #[test]
    fn what_the_kernel_makes_up_is_left_out() {
        let mut all = 0;
        let ended = below(Path::new("/"), &Mounts::read().unwrap(), &mut |file| {
            all += 1;
            let path = serde_json::to_value(file).unwrap()["path"].to_string();
            assert!(!path.starts_with("\"/proc"), "{path}");
            match all {
                2000 => Err(io::ErrorKind::Interrupted.into()),
                _ => Ok(()),
            }
        });
        assert!(all > 10, "{ended:?}");
    }
}
