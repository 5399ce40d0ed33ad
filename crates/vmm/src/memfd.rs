//! Small files in memory that are handed to monitors, see memfd_create(2).

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::VmmError;

/// An empty one.
pub(crate) fn new_memfd(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(rustix::fs::memfd_create(name, flags)?))
}

/// One with this content that nobody can change. A monitor opens it anew as a user that may
/// have no right to the original file.
pub(crate) fn sealed_memfd(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = new_memfd(name)?;
    file.write_all(content)?;
    seal(file)
}

/// The same with what `from` holds from where it stands.
pub(crate) fn copy_of(name: &str, mut from: &File) -> io::Result<OwnedFd> {
    let mut file = new_memfd(name)?;
    io::copy(&mut from, &mut file)?;
    file.rewind()?;
    seal(file)
}

/// The same with what is at `path`.
pub(crate) fn copy_of_path(name: &str, path: &Path) -> Result<OwnedFd, VmmError> {
    File::open(path)
        .and_then(|file| copy_of(name, &file))
        .map_err(|source| VmmError::File {
            what: "cannot read",
            path: path.to_owned(),
            source,
        })
}

fn seal(file: File) -> io::Result<OwnedFd> {
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(file.into())
}
