//! Making, listing and removing directories. Blocking: called inside [`super::identity::run`].

use std::ffi::{CString, OsStr, OsString};
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, FileType as Kind, Mode, OFlags};
use rustix::io::Errno;
use wrenn_wire::filesystem::FileType;

use super::entry::{self, Entry, Inside, Names};
use super::error::FsError;
use super::path::split;

/// Mode of directories we make.
const DIR_MODE: u32 = 0o755;
/// More entries than this are refused, so that one request cannot fill the guest's memory.
const MAX_ENTRIES: usize = 200_000;

/// An open directory, and what is missing below it on the way to the one that was wanted.
#[derive(Debug)]
pub struct Nearest {
    /// The deepest directory that is there, opened with `O_PATH`.
    pub dir: OwnedFd,
    /// Its path.
    pub path: PathBuf,
    /// Names below it that are not there yet, outermost first.
    pub missing: Vec<OsString>,
}

/// Opens the deepest directory on the way to `path` that is there.
///
/// # Errors
/// [`FsError::NotDirectory`] when something else is in the way, [`FsError::Denied`].
pub fn nearest(path: &Path) -> Result<Nearest, FsError> {
    let mut missing = Vec::new();
    let mut at = path;
    loop {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(at, flags, Mode::empty()) {
            Ok(dir) => {
                missing.reverse();
                return Ok(Nearest {
                    dir,
                    path: at.to_owned(),
                    missing,
                });
            }
            Err(Errno::NOENT) => {
                let (parent, name) = split(at)?;
                missing.push(name.to_owned());
                at = parent;
            }
            Err(errno) => return Err(FsError::from_errno("open", at, errno)),
        }
    }
}

impl Nearest {
    /// Makes what is missing, with mode 0755, and opens the last of it. Says whether that
    /// one was made by this call.
    pub fn make(self) -> Result<(OwnedFd, bool), FsError> {
        let Nearest {
            mut dir,
            mut path,
            missing,
        } = self;
        let mut made = false;
        for name in missing {
            path.push(&name);
            made = match rustix::fs::mkdirat(&dir, &name, Mode::from_raw_mode(DIR_MODE)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(FsError::from_errno("make directory", &path, errno)),
            };
            dir = if made {
                let fresh = open_fresh(&dir, &name)
                    .map_err(|errno| FsError::from_errno("open", &path, errno))?;
                fit_mode(&fresh, &path)?;
                fresh
            } else {
                // Somebody else made it meanwhile, as a link perhaps, which is theirs to do.
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::openat(&dir, &name, flags, Mode::empty())
                    .map_err(|errno| FsError::from_errno("open", &path, errno))?
            };
        }
        Ok((dir, made))
    }
}

fn open_fresh(dir: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// The agent's umask must not show in what it makes. The set-group-id bit a directory
/// inherits stays.
fn fit_mode(dir: &OwnedFd, path: &Path) -> Result<(), FsError> {
    let stat = rustix::fs::fstat(dir).map_err(|e| FsError::from_errno("stat", path, e))?;
    if stat.st_mode & 0o777 == DIR_MODE {
        return Ok(());
    }
    let mode = Mode::from_raw_mode((stat.st_mode & 0o7000) | DIR_MODE);
    rustix::fs::fchmod(dir, mode).map_err(|e| FsError::from_errno("change mode of", path, e))
}

/// Makes the directory `path` and its parents.
///
/// # Errors
/// [`FsError::Exists`] when it is there, [`FsError::Invalid`] when something else is.
pub fn make(path: &Path) -> Result<Entry, FsError> {
    match nearest(path) {
        Ok(nearest) => {
            if nearest.missing.is_empty() {
                return Err(FsError::Exists(path.to_owned()));
            }
            let (_dir, made) = nearest.make()?;
            if !made {
                return Err(FsError::Exists(path.to_owned()));
            }
            entry::at_path(path, &mut Names::default())
        }
        Err(FsError::NotDirectory(at)) => Err(FsError::Invalid(format!(
            "cannot make directory '{}': '{}' already exists and is not a directory",
            path.display(),
            at.display()
        ))),
        Err(other) => Err(other),
    }
}

/// Lists `path` in lexical order, each directory before its contents, down to `depth`
/// levels (0 means 1). Links are not followed but for `path` itself. A directory further
/// down that the user may not read, or that vanishes, is listed without its contents.
///
/// # Errors
/// [`FsError::Missing`], [`FsError::NotDirectory`], [`FsError::Exhausted`] for too many entries.
pub fn list(path: &Path, depth: u32) -> Result<Vec<Entry>, FsError> {
    let depth = depth.max(1);
    let mut names = Names::default();
    let mut out = Vec::new();
    let mut walk = vec![read(path, true, &mut names)?.into_iter()];
    while let Some(level) = walk.last_mut() {
        let Some(entry) = level.next() else {
            walk.pop();
            continue;
        };
        let descend = entry.kind == FileType::FILE_TYPE_DIRECTORY
            && entry.symlink_target.is_none()
            && walk.len() < depth as usize;
        if descend {
            match read(&entry.path, false, &mut names) {
                Ok(below) => walk.push(below.into_iter()),
                Err(FsError::Denied { .. } | FsError::Missing(_) | FsError::NotDirectory(_)) => {}
                Err(other) => return Err(other),
            }
        }
        out.push(entry);
        let waiting: usize = walk.iter().map(ExactSizeIterator::len).sum();
        if out.len() + waiting > MAX_ENTRIES {
            return Err(too_many(path));
        }
    }
    Ok(out)
}

fn too_many(path: &Path) -> FsError {
    FsError::Exhausted(format!(
        "'{}' has more than {MAX_ENTRIES} entries at this depth; list with a smaller depth or list directories below it",
        path.display()
    ))
}

/// The entries of one directory, sorted by their bytes.
fn read(path: &Path, follow: bool, names: &mut Names) -> Result<Vec<Entry>, FsError> {
    let mut flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    if !follow {
        flags |= OFlags::NOFOLLOW;
    }
    let dir = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| match e {
        // With O_NOFOLLOW a link is not a directory.
        Errno::LOOP if !follow => FsError::NotDirectory(path.to_owned()),
        other => FsError::from_errno("list", path, other),
    })?;
    let mut found = Vec::new();
    let inside = Inside::enter(&dir);
    for name in names_in(&dir, path)? {
        match entry::in_dir(&dir, path, &name, inside.as_ref(), names) {
            Ok(entry) => found.push(entry),
            // Gone since it was read.
            Err(FsError::Missing(_)) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(found)
}

/// The names in an open directory, sorted by their bytes, without `.` and `..`.
///
/// # Errors
/// The kernel's, and [`FsError::Exhausted`] for too many.
pub fn names_in(dir: impl AsFd, path: &Path) -> Result<Vec<CString>, FsError> {
    let failed = |errno| FsError::from_errno("list", path, errno);
    let mut names = Vec::new();
    for item in rustix::fs::Dir::read_from(dir).map_err(failed)? {
        let item = item.map_err(failed)?;
        let name = item.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name.to_owned());
        }
        if names.len() > MAX_ENTRIES {
            return Err(too_many(path));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Removes `path` with all that is below it; links are removed, not followed. Nothing there
/// is no error.
///
/// # Errors
/// [`FsError::Invalid`] for the root, [`FsError::Denied`] and the kernel's others.
pub fn remove(path: &Path) -> Result<(), FsError> {
    if path.parent().is_none() {
        return Err(FsError::Invalid(
            "the root directory cannot be removed".into(),
        ));
    }
    let stat = match rustix::fs::lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(errno) => return Err(FsError::from_errno("remove", path, errno)),
    };
    let removed = if Kind::from_raw_mode(stat.st_mode) == Kind::Directory {
        // Descends by descriptors and does not follow a link put in its way.
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FsError::from_io("remove", path, &error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_a_lexical_walk_down_to_its_depth() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        make(&root.join("b/c/d")).unwrap();
        for file in ["a", "b/x", "b/c/y", "b.txt", "z"] {
            std::fs::write(root.join(file), file).unwrap();
        }
        std::os::unix::fs::symlink("b", root.join("link")).unwrap();
        let listed = |depth| -> Vec<String> {
            let entries = list(root, depth).unwrap();
            entries
                .iter()
                .map(|e| {
                    e.path
                        .strip_prefix(root)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned()
                })
                .collect()
        };
        assert_eq!(listed(0), ["a", "b", "b.txt", "link", "z"]);
        assert_eq!(listed(1), listed(0));
        assert_eq!(listed(2), ["a", "b", "b/c", "b/x", "b.txt", "link", "z"]);
        assert_eq!(
            listed(9),
            [
                "a", "b", "b/c", "b/c/d", "b/c/y", "b/x", "b.txt", "link", "z"
            ]
        );
        assert!(matches!(
            list(&root.join("a"), 1),
            Err(FsError::NotDirectory(_))
        ));
        assert!(matches!(
            list(&root.join("no"), 1),
            Err(FsError::Missing(_))
        ));
        assert_eq!(list(&root.join("link"), 1).unwrap().len(), 2);
    }

    #[test]
    fn removal_does_not_follow_links_and_minds_no_absence() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept");
        make(&kept.join("deep")).unwrap();
        let gone = dir.path().join("gone");
        make(&gone).unwrap();
        std::os::unix::fs::symlink(&kept, gone.join("link")).unwrap();
        remove(&gone).unwrap();
        remove(&gone).unwrap();
        remove(&kept.join("nothing/below")).unwrap();
        assert!(kept.join("deep").is_dir());
        assert!(matches!(remove(Path::new("/")), Err(FsError::Invalid(_))));
    }

    #[test]
    fn making_says_what_is_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let entry = make(&dir.path().join("a/b")).unwrap();
        assert_eq!((entry.name.as_str(), entry.mode), ("b", 0o755));
        assert!(matches!(
            make(&dir.path().join("a")),
            Err(FsError::Exists(_))
        ));
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(
            make(&dir.path().join("file")),
            Err(FsError::Invalid(_))
        ));
        assert!(matches!(
            make(&dir.path().join("file/x")),
            Err(FsError::Invalid(_))
        ));
    }
}
