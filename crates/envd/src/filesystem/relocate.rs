//! Moving files and directories, also between file systems. Blocking.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType as Kind, Mode, OFlags, Stat, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use super::directory::{nearest, remove};
use super::entry::{self, Entry, Names};
use super::error::FsError;
use super::path::split;

/// How much one `copy_file_range` is asked to copy.
const COPY_STEP: usize = 64 << 20;

/// Moves `source` to `destination`, whose parents are made; a file there is replaced. Where
/// the two are on different file systems (the guest's `/tmp` is one of its own), the source
/// is copied beside the destination, renamed into place, and removed.
///
/// # Errors
/// [`FsError::Missing`] without a source; the kernel's for a directory in the way.
pub fn relocate(source: &Path, destination: &Path) -> Result<Entry, FsError> {
    rustix::fs::lstat(source).map_err(|errno| FsError::from_errno("move", source, errno))?;
    let (parent, name) = split(destination)?;
    if destination.starts_with(source) && destination != source {
        return Err(FsError::Invalid(format!(
            "cannot move '{}' into itself, to '{}'",
            source.display(),
            destination.display()
        )));
    }
    let (dir, _) = nearest(parent)?.make()?;
    match rustix::fs::renameat(CWD, source, &dir, name) {
        Ok(()) => {}
        Err(Errno::XDEV) => across(source, parent, name.to_owned())?,
        Err(errno) => return Err(FsError::from_errno("move to", destination, errno)),
    }
    entry::at_path(destination, &mut Names::default())
}

fn across(source: &Path, parent: &Path, name: OsString) -> Result<(), FsError> {
    let staging = parent.join(super::hidden::move_name());
    let destination = parent.join(name);
    let moved = copy_tree(source, &staging).and_then(|()| {
        rustix::fs::rename(&staging, &destination)
            .map_err(|errno| FsError::from_errno("move to", &destination, errno))
    });
    match moved {
        Ok(()) => remove(source),
        Err(error) => {
            remove(&staging)?;
            Err(error)
        }
    }
}

/// Copies whatever `from` is to `to`, which is not there yet: contents, modes, times and
/// user attributes. The copy belongs to the user who makes it.
fn copy_tree(from: &Path, to: &Path) -> Result<(), FsError> {
    copy_one(from, to)?;
    // Directories wait here until their contents are there: writing into one changes its
    // times, and a read-only one could not be filled.
    let mut open: Vec<(PathBuf, PathBuf, Stat)> = Vec::new();
    let mut todo: Vec<(PathBuf, PathBuf)> = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = todo.pop() {
        let stat =
            rustix::fs::lstat(&from).map_err(|errno| FsError::from_errno("stat", &from, errno))?;
        if Kind::from_raw_mode(stat.st_mode) != Kind::Directory {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&from, flags, Mode::empty())
            .map_err(|errno| FsError::from_errno("read", &from, errno))?;
        for name in super::directory::names_in(&dir, &from)? {
            use std::os::unix::ffi::OsStrExt;
            let name = std::ffi::OsStr::from_bytes(name.to_bytes());
            copy_one(&from.join(name), &to.join(name))?;
            todo.push((from.join(name), to.join(name)));
        }
        open.push((from, to, stat));
    }
    for (from, to, stat) in open.into_iter().rev() {
        finish(&from, &to, &stat)?;
    }
    Ok(())
}

fn copy_one(from: &Path, to: &Path) -> Result<(), FsError> {
    let stat = rustix::fs::lstat(from).map_err(|errno| FsError::from_errno("stat", from, errno))?;
    match Kind::from_raw_mode(stat.st_mode) {
        Kind::Directory => std::fs::DirBuilder::new()
            .mode(0o700)
            .create(to)
            .map_err(|e| FsError::from_io("make directory", to, &e)),
        Kind::Symlink => {
            let text = std::fs::read_link(from).map_err(|e| FsError::from_io("read", from, &e))?;
            std::os::unix::fs::symlink(text, to).map_err(|e| FsError::from_io("make", to, &e))
        }
        Kind::RegularFile => {
            let input = File::options()
                .read(true)
                .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
                .open(from)
                .map_err(|e| FsError::from_io("read", from, &e))?;
            let output = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(to)
                .map_err(|e| FsError::from_io("write", to, &e))?;
            append(&input, &output).map_err(|e| FsError::from_io("copy to", to, &e))?;
            finish(from, to, &stat)
        }
        _ => Err(FsError::Invalid(format!(
            "'{}' is neither file, directory nor link and cannot be moved to another file system",
            from.display()
        ))),
    }
}

/// Gives the copy its mode, attributes and times.
fn finish(from: &Path, to: &Path, stat: &Stat) -> Result<(), FsError> {
    let mut attributes = entry::other_attributes(from);
    for (key, value) in entry::metadata(from) {
        let name = format!("{}{key}", entry::METADATA_PREFIX);
        attributes.push((name.into_bytes(), value.into_bytes()));
    }
    for (name, value) in attributes {
        match rustix::fs::lsetxattr(to, name.as_slice(), &value, XattrFlags::empty()) {
            // The other file system keeps no such attributes; `mv` drops them too.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(FsError::from_errno("set attributes of", to, errno)),
        }
    }
    let mode = Mode::from_raw_mode(stat.st_mode & 0o777);
    rustix::fs::chmodat(CWD, to, mode, AtFlags::empty())
        .map_err(|errno| FsError::from_errno("change mode of", to, errno))?;
    let times = Timestamps {
        last_access: timespec(stat.st_atime, stat.st_atime_nsec),
        last_modification: timespec(stat.st_mtime, stat.st_mtime_nsec),
    };
    rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| FsError::from_errno("set times of", to, errno))
}

fn timespec(seconds: i64, nanos: u64) -> Timespec {
    Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanos).unwrap_or(0),
    }
}

/// Appends all of `input` at the position of `output`, inside the kernel where it can.
///
/// # Errors
/// The kernel's.
pub fn append(input: &File, output: &File) -> io::Result<u64> {
    let mut copied = 0;
    loop {
        match rustix::fs::copy_file_range(input, None, output, None, COPY_STEP) {
            Ok(0) if copied == 0 => break,
            Ok(0) => return Ok(copied),
            Ok(n) => copied += n as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                break;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    // Some file systems cannot, and some report nothing to copy where there is something
    // (files in /proc say that they are empty).
    let (mut reader, mut writer) = (input, output);
    Ok(copied + io::copy(&mut reader, &mut writer)?)
}
