//! The file operations of the store, each announced first, so that a test can stop it there.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::{Result, SnapshotError};

/// A change of the disk that is about to be made.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// A folder is made.
    CreateFolder(&'a Path),
    /// An empty file is made.
    Create(&'a Path),
    /// Bytes are written to a new file.
    Write(&'a Path, usize),
    /// A file gets a second name.
    Link(&'a Path, &'a Path),
    /// A file is synced.
    Sync(&'a Path),
    /// A folder is synced: names in it last.
    SyncFolder(&'a Path),
    /// A file or folder is renamed.
    Rename(&'a Path, &'a Path),
    /// A file, or a folder with all in it, is removed.
    Remove(&'a Path),
}

/// Told before each [`Step`]. An error is taken for the operating system's answer; tests
/// simulate full disks and crashes with it.
pub trait Faults: Send + Sync + fmt::Debug {
    /// What happens instead of `step`; `Ok` lets it happen.
    fn before(&self, step: Step<'_>) -> io::Result<()>;
}

/// Nothing is injected.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoFaults;

impl Faults for NoFaults {
    fn before(&self, _: Step<'_>) -> io::Result<()> {
        Ok(())
    }
}

/// The disk as the store sees it.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) faults: Arc<dyn Faults>,
}

impl Disk {
    fn ask(&self, doing: &'static str, path: &Path, step: Step<'_>) -> Result<()> {
        self.faults
            .before(step)
            .map_err(SnapshotError::io(doing, path))
    }

    pub(super) fn create_folder(&self, path: &Path) -> Result<()> {
        self.ask("create", path, Step::CreateFolder(path))?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(path)
            .map_err(SnapshotError::io("create", path))
    }

    /// Somebody else is about to make a file and write to it.
    pub(super) fn will_create(&self, path: &Path) -> Result<()> {
        self.ask("create", path, Step::Create(path))
    }

    /// A new file that nobody else can write to, ever: only this descriptor can.
    pub(super) fn create(&self, path: &Path) -> Result<File> {
        self.ask("create", path, Step::Create(path))?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(path)
            .map_err(SnapshotError::io("create", path))
    }

    pub(super) fn append(&self, file: &mut File, path: &Path, bytes: &[u8]) -> Result<()> {
        self.ask("write", path, Step::Write(path, bytes.len()))?;
        file.write_all(bytes)
            .map_err(SnapshotError::io("write", path))
    }

    pub(super) fn write_at(&self, file: &File, path: &Path, bytes: &[u8], at: u64) -> Result<()> {
        self.ask("write", path, Step::Write(path, bytes.len()))?;
        file.write_all_at(bytes, at)
            .map_err(SnapshotError::io("write", path))
    }

    pub(super) fn link(&self, from: &Path, to: &Path) -> Result<()> {
        self.ask("link", from, Step::Link(from, to))?;
        std::fs::hard_link(from, to).map_err(SnapshotError::io("link", from))
    }

    /// Syncs files at once: their journal commits become one.
    pub(super) fn sync(&self, files: &[(File, std::path::PathBuf)]) -> Result<()> {
        for (_, path) in files {
            self.ask("sync", path, Step::Sync(path))?;
        }
        let sync = |(file, path): &(File, std::path::PathBuf)| {
            file.sync_all().map_err(SnapshotError::io("sync", path))
        };
        std::thread::scope(|scope| {
            let (last, others) = match files.split_last() {
                Some(split) => split,
                None => return Ok(()),
            };
            let others: Vec<_> = others
                .iter()
                .map(|file| scope.spawn(move || sync(file)))
                .collect();
            let mut result = sync(last);
            for other in others {
                let other = other.join().unwrap_or_else(|_| {
                    let error = io::Error::other("the thread that synced it panicked");
                    Err(SnapshotError::io("sync", &last.1)(error))
                });
                result = result.and(other);
            }
            result
        })
    }

    pub(super) fn sync_folder(&self, path: &Path) -> Result<()> {
        self.ask("sync", path, Step::SyncFolder(path))?;
        File::open(path)
            .and_then(|folder| folder.sync_all())
            .map_err(SnapshotError::io("sync", path))
    }

    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.ask("rename", from, Step::Rename(from, to))?;
        std::fs::rename(from, to).map_err(SnapshotError::io("rename", from))
    }

    pub(super) fn remove_file(&self, path: &Path) -> Result<()> {
        self.ask("remove", path, Step::Remove(path))?;
        std::fs::remove_file(path).map_err(SnapshotError::io("remove", path))
    }

    pub(super) fn remove_folder(&self, path: &Path) -> Result<()> {
        self.ask("remove", path, Step::Remove(path))?;
        std::fs::remove_dir_all(path).map_err(SnapshotError::io("remove", path))
    }
}
