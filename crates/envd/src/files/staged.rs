//! A file that is being written and that nobody sees yet. Blocking: all of it happens with
//! the user's rights inside [`crate::filesystem::identity::run`].
//!
//! ```text
//!   create ──▶ write … ──▶ seal ──▶ commit ──▶ there, whole
//!      │          │          │         │
//!      └──────────┴──────────┴─────────┴─ dropped: nothing stays
//! ```
//!
//! Where the file system can, the bytes go to a file without a name (`O_TMPFILE`, open(2)),
//! which even a killed agent leaves no trace of; elsewhere to a hidden name. It is made in
//! the deepest directory on the way that exists; missing ones are made by the commit, which
//! then gives the file a hidden name beside its own and renames it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{IoSlice, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{
    Access, AtFlags, CWD, FileType as Kind, Mode, OFlags, RenameFlags, Stat, XattrFlags,
};
use rustix::io::Errno;

use super::metadata::Metadata;
use crate::filesystem::directory::{Nearest, nearest};
use crate::filesystem::entry::{METADATA_PREFIX, other_attributes};
use crate::filesystem::error::FsError;
use crate::filesystem::hidden::{Appears, upload_name};
use crate::filesystem::kind::kind_of;
use crate::filesystem::path::split;

/// Mode of new files.
const FILE_MODE: u32 = 0o644;
/// As many links as the kernel follows (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// See the module.
#[derive(Debug)]
pub struct Staged {
    /// Where the file goes, links resolved.
    target: PathBuf,
    /// Deepest directory on the way; the file without a name is on its file system.
    dir: OwnedFd,
    dir_path: PathBuf,
    missing: Vec<OsString>,
    /// Open until it is parked.
    file: Option<File>,
    /// Its hidden name in `dir`, once it has one.
    hidden: Option<OsString>,
    /// Mode of the file that is replaced, else that of new ones.
    mode: u32,
    size: u64,
}

impl Staged {
    /// Prepares to write the file `path`.
    ///
    /// # Errors
    /// [`FsError::IsDirectory`], [`FsError::NotRegular`] for devices and the like,
    /// [`FsError::Denied`] where the user may not write the file that is there, or not make
    /// one in its directory.
    pub fn create(path: &Path) -> Result<Staged, FsError> {
        let target = follow(path)?;
        let (parent, name) = split(&target)?;
        let Nearest {
            dir,
            path: dir_path,
            missing,
        } = nearest(parent)?;
        let mut mode = FILE_MODE;
        if missing.is_empty()
            && let Some(stat) = look(&dir, name, &target)?
        {
            match Kind::from_raw_mode(stat.st_mode) {
                Kind::RegularFile => mode = stat.st_mode & 0o777,
                Kind::Directory => return Err(FsError::IsDirectory(target)),
                _ => return Err(FsError::NotRegular(target)),
            }
            let flags = AtFlags::EACCESS | AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::accessat(&dir, name, Access::WRITE_OK, flags)
                .map_err(|errno| FsError::from_errno("write", &target, errno))?;
        }
        let (file, hidden) = open(&dir, &target)?;
        Ok(Staged {
            target,
            dir,
            dir_path,
            missing,
            file: Some(file),
            hidden,
            mode,
            size: 0,
        })
    }

    /// Where the file goes.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The open file, for appending by other means than [`Staged::write`].
    ///
    /// # Errors
    /// [`FsError::Internal`] when it is parked.
    pub fn file(&self) -> Result<&File, FsError> {
        self.file.as_ref().ok_or_else(|| {
            FsError::Internal(format!(
                "'{}' is written after its end",
                self.target.display()
            ))
        })
    }

    /// Appends.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] and the kernel's others.
    pub fn write(&mut self, chunks: &[Bytes]) -> Result<(), FsError> {
        let mut file = self.file()?;
        let mut slices: Vec<IoSlice<'_>> = chunks.iter().map(|c| IoSlice::new(c)).collect();
        let mut left = slices.as_mut_slice();
        IoSlice::advance_slices(&mut left, 0);
        let mut written = 0u64;
        while !left.is_empty() {
            match file.write_vectored(left) {
                Ok(0) => {
                    return Err(FsError::NoSpace {
                        action: "write",
                        path: self.target.clone(),
                    });
                }
                Ok(n) => {
                    written += n as u64;
                    IoSlice::advance_slices(&mut left, n);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FsError::from_io("write", &self.target, &error)),
            }
        }
        self.size += written;
        Ok(())
    }

    /// Counts bytes that were appended by other means.
    pub fn count(&mut self, bytes: u64) {
        self.size += bytes;
    }

    /// Gives the file metadata, in place of what the file before it had. Before its contents:
    /// where metadata cannot be kept, nobody sends a gigabyte to learn it.
    ///
    /// # Errors
    /// [`FsError::Invalid`] where the file system keeps no extended attributes: a tmpfs
    /// before Linux 6.6 is one.
    pub fn label(&mut self, metadata: &Metadata) -> Result<(), FsError> {
        for (key, value) in metadata {
            self.attribute(
                format!("{METADATA_PREFIX}{key}").as_bytes(),
                value.as_bytes(),
            )?;
        }
        Ok(())
    }

    fn attribute(&self, name: &[u8], value: &[u8]) -> Result<(), FsError> {
        let file = self.file()?;
        rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()).map_err(|errno| match errno {
            Errno::OPNOTSUPP => FsError::Invalid(format!(
                "metadata of '{}' cannot be kept: its file system, {}, has no extended attributes \
                 for users; upload it without X-Metadata headers, or to another file system",
                self.target.display(),
                kind_of(file).as_deref().unwrap_or("whatever it is"),
            )),
            errno => FsError::from_errno("set metadata of", &self.target, errno),
        })
    }

    /// The contents are complete: gives the file its mode, and what the file before it had of
    /// the user's attributes that are no metadata.
    ///
    /// # Errors
    /// The kernel's.
    pub fn seal(&mut self) -> Result<(), FsError> {
        if self.missing.is_empty() {
            for (name, value) in other_attributes(&self.target) {
                self.attribute(&name, &value)?;
            }
        }
        rustix::fs::fchmod(self.file()?, Mode::from_raw_mode(self.mode))
            .map_err(|errno| FsError::from_errno("change mode of", &self.target, errno))
    }

    /// Closes the file of a sealed upload that has to wait for others, under a hidden name.
    ///
    /// # Errors
    /// The kernel's.
    pub fn park(&mut self) -> Result<(), FsError> {
        if self.hidden.is_none() {
            let name = upload_name(Appears::New);
            self.link(&self.dir, &name)?;
            self.hidden = Some(name);
        }
        self.file = None;
        Ok(())
    }

    /// Makes the file visible, with the directories it needs. All or nothing.
    ///
    /// # Errors
    /// The kernel's; [`FsError::IsDirectory`] when a directory took its place meanwhile.
    pub fn commit(mut self) -> Result<(), FsError> {
        let missing = std::mem::take(&mut self.missing);
        let own_dir = self
            .dir
            .try_clone()
            .map_err(|e| FsError::from_io("open", &self.dir_path, &e))?;
        let (dir, _) = Nearest {
            dir: own_dir,
            path: self.dir_path.clone(),
            missing,
        }
        .make()?;
        let target = self.target.clone();
        let (_, name) = split(&target)?;
        let mut appears = match look(&dir, name, &target)? {
            None if self.size == 0 => Appears::NewEmpty,
            None => Appears::New,
            Some(_) => Appears::Replaced,
        };
        loop {
            let beside = upload_name(appears);
            match self.hidden.take() {
                Some(before) => {
                    if let Err(errno) = rustix::fs::renameat(&self.dir, &before, &dir, &beside) {
                        self.hidden = Some(before);
                        return Err(FsError::from_errno("write", &target, errno));
                    }
                }
                None => self.link(&dir, &beside)?,
            }
            // From here the hidden name is in the final directory.
            self.dir = dir
                .try_clone()
                .map_err(|e| FsError::from_io("open", &self.dir_path, &e))?;
            self.hidden = Some(beside.clone());
            match appear(&dir, &beside, name, appears) {
                Ok(()) => {
                    self.hidden = None;
                    return Ok(());
                }
                // Somebody else made it since we looked.
                Err(Errno::EXIST) if appears != Appears::Replaced => appears = Appears::Replaced,
                Err(errno) => return Err(FsError::from_errno("write", &target, errno)),
            }
        }
    }

    /// Gives a file without a name one.
    fn link(&self, dir: &OwnedFd, name: &OsStr) -> Result<(), FsError> {
        let by_descriptor = format!("/proc/self/fd/{}", self.file()?.as_raw_fd());
        rustix::fs::linkat(CWD, by_descriptor, dir, name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|errno| FsError::from_errno("write", &self.target, errno))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let Some(name) = self.hidden.take() else {
            return;
        };
        // By descriptor, and a name of ours only: nothing else can be meant.
        if let Err(error) = rustix::fs::unlinkat(&self.dir, &name, AtFlags::empty())
            && error != Errno::NOENT
        {
            let target = self.target.display();
            tracing::warn!(%error, %target, "an upload that broke off left a hidden file");
        }
    }
}

fn appear(dir: &OwnedFd, from: &OsStr, to: &OsStr, appears: Appears) -> rustix::io::Result<()> {
    if appears == Appears::Replaced {
        return rustix::fs::renameat(dir, from, dir, to);
    }
    match rustix::fs::renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        // This file system cannot look and rename at once.
        Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::renameat(dir, from, dir, to),
        other => other,
    }
}

fn open(dir: &OwnedFd, target: &Path) -> Result<(File, Option<OsString>), FsError> {
    let mode = Mode::from_raw_mode(0o600);
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(dir, ".", flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok((file.into(), None)),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
        Err(errno) => return Err(FsError::from_errno("write", target, errno)),
    }
    let name = upload_name(Appears::New);
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(dir, &name, flags, mode)
        .map_err(|errno| FsError::from_errno("write", target, errno))?;
    Ok((file.into(), Some(name)))
}

fn look(dir: &OwnedFd, name: &OsStr, path: &Path) -> Result<Option<Stat>, FsError> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(FsError::from_errno("write", path, errno)),
    }
}

/// Where writing to `path` writes: links at its end are followed, as by open(2), since a
/// rename would replace them.
fn follow(path: &Path) -> Result<PathBuf, FsError> {
    let mut at = path.to_owned();
    for _ in 0..MAX_LINKS {
        match std::fs::read_link(&at) {
            Ok(text) => {
                let (parent, _) = split(&at)?;
                at = parent.join(text);
            }
            // Not a link, or nothing there, or an error that the next step finds again.
            Err(_) => return Ok(at),
        }
    }
    Err(FsError::from_errno("write", path, Errno::LOOP))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filesystem::entry;
    use std::os::unix::fs::PermissionsExt;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn write(path: &Path, text: &'static str) -> Result<(), FsError> {
        let mut staged = Staged::create(path)?;
        staged.write(&[
            Bytes::new(),
            Bytes::from_static(text.as_bytes()),
            Bytes::new(),
        ])?;
        staged.seal()?;
        staged.commit()
    }

    #[test]
    fn g31_a_file_is_not_there_before_it_is_whole_and_leaves_nothing_when_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/f");
        let mut staged = Staged::create(&path).unwrap();
        staged.write(&[Bytes::from_static(b"half")]).unwrap();
        assert_eq!(names(dir.path()), Vec::<String>::new());
        staged.seal().unwrap();
        staged.park().unwrap();
        assert_eq!(names(dir.path()).len(), 1);
        drop(staged);
        assert_eq!(names(dir.path()), Vec::<String>::new());
        write(&path, "whole").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole");
        assert_eq!(names(&dir.path().join("a/b")), ["f"]);
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&path), mode(&dir.path().join("a"))), (0o644, 0o755));
    }

    #[test]
    fn a_replaced_file_keeps_its_mode_and_links_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o750)).unwrap();
        std::os::unix::fs::symlink("script", dir.path().join("link")).unwrap();
        write(&dir.path().join("link"), "new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert!(dir.path().join("link").is_symlink());
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
            0o750
        );
        assert_eq!(names(dir.path()), ["link", "script"]);
        assert!(matches!(
            write(dir.path(), "x"),
            Err(FsError::IsDirectory(_))
        ));
        std::os::unix::fs::symlink("self", dir.path().join("self")).unwrap();
        assert!(write(&dir.path().join("self"), "x").is_err());
        std::os::unix::fs::symlink("nowhere/f", dir.path().join("dangling")).unwrap();
        write(&dir.path().join("dangling"), "x").unwrap();
        assert!(dir.path().join("nowhere/f").is_file());
    }

    #[test]
    fn a_parked_file_can_be_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/f");
        let mut staged = Staged::create(&path).unwrap();
        staged.label(&vec![("k".into(), "v".into())]).unwrap();
        staged.write(&[Bytes::from_static(b"x")]).unwrap();
        staged.seal().unwrap();
        staged.park().unwrap();
        staged.commit().unwrap();
        assert_eq!(names(dir.path()), ["new"]);
        assert_eq!(names(&dir.path().join("new")), ["f"]);
        assert_eq!(entry::metadata(&path)["k"], "v");
        write(&path, "y").unwrap();
        assert!(entry::metadata(&path).is_empty());
    }
}
