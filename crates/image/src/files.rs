//! Files that must be whole or absent.

use crate::error::{ImageError, at};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Prefix of folders under construction, below the store's root.
pub const BUILD_PREFIX: &str = "build-";

/// A folder that is removed with all it holds unless it was renamed away.
pub struct BuildFolder {
    path: PathBuf,
}

impl BuildFolder {
    /// Makes one below `root`.
    pub fn new(root: &Path) -> Result<Self, ImageError> {
        let path = root.join(format!("{BUILD_PREFIX}{}", std::process::id()));
        fs::create_dir(&path).map_err(at("make the folder", &path))?;
        // From here on the folder is removed whatever happens.
        let folder = BuildFolder { path };
        set_mode(&folder.path, 0o700)?;
        Ok(folder)
    }

    /// A path inside it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for BuildFolder {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next build, which also reports it.
        drop(fs::remove_dir_all(&self.path));
    }
}

/// Removes what builds that were killed left behind. Only for the holder of the lock.
pub fn remove_stale(root: &Path) -> Result<(), ImageError> {
    for entry in fs::read_dir(root).map_err(at("read", root))? {
        let path = entry.map_err(at("read", root))?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.starts_with(BUILD_PREFIX) {
            fs::remove_dir_all(&path).map_err(at("remove", &path))?;
        }
    }
    Ok(())
}

/// Writes a file with its mode; an existing one is replaced, not written through, so that
/// neither a symbolic link nor a hard link leads elsewhere.
pub fn write(path: &Path, mode: u32, content: &[u8]) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(at("replace", path)(error)),
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(at("write", path))?;
    file.write_all(content).map_err(at("write", path))?;
    // The umask has no say in an image.
    set_mode(path, mode)
}

/// Sets permissions.
pub fn set_mode(path: &Path, mode: u32) -> Result<(), ImageError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(at("set the mode of", path))
}

/// Makes a file's or folder's content safe against a crash.
pub fn sync(path: &Path) -> Result<(), ImageError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(at("sync", path))
}

/// Makes a folder with its parents.
pub fn folder(path: &Path) -> Result<(), ImageError> {
    fs::create_dir_all(path).map_err(at("make the folder", path))
}

/// Removes a folder or file if it is there.
pub fn remove(path: &Path) -> Result<(), ImageError> {
    let done = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match done {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(at("remove", path)(error))
        }
        _ => Ok(()),
    }
}
