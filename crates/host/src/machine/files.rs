//! The folder of a machine.
//!
//! ```text
//! machines/m-…/          root, 0711: the VM's user may pass, not look
//!     record.json        root, 0600: slot, template, host token
//!     sandbox.json       root, 0600: the sandbox's journal
//!     disk               root, 0600: passed to QEMU as a descriptor; Firecracker's is its user's
//!     vm/                the VM's user, 0700: QMP socket, console, exit status
//! ```

use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::MachineError;

/// The part of a machine's folder that belongs to its VM.
pub fn vm_folder(folder: &Path) -> PathBuf {
    folder.join("vm")
}

/// Makes a new folder for a machine below `machines`, with the VM's part owned by `uid`.
pub fn new_folder(machines: &Path, uid: u32) -> Result<PathBuf, MachineError> {
    let mut random = [0u8; 8];
    let name = getrandom::fill(&mut random).map(|()| format!("m-{}", hex::encode(random)));
    let name = name.map_err(|e| MachineError::File {
        action: "name a folder in",
        path: machines.to_owned(),
        source: io::Error::other(e.to_string()),
    })?;
    let folder = machines.join(name);
    let make = || -> io::Result<()> {
        std::fs::DirBuilder::new().mode(0o711).create(&folder)?;
        // The umask may have taken the passage away.
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
        let vm = vm_folder(&folder);
        std::fs::DirBuilder::new().mode(0o700).create(&vm)?;
        std::os::unix::fs::chown(&vm, Some(uid), Some(uid))
    };
    match make() {
        Ok(()) => Ok(folder),
        Err(source) => {
            // On a full disk it is there without the VM's part.
            if let Err(error) = std::fs::remove_dir_all(&folder)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::error!(folder = %folder.display(), %error, "half a machine's folder stays");
            }
            Err(MachineError::File {
                action: "make",
                path: folder,
                source,
            })
        }
    }
}

/// Removes a machine's folder; it is no error when it is gone.
pub async fn remove_folder(folder: &Path) -> Result<(), MachineError> {
    match tokio::fs::remove_dir_all(folder).await {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(MachineError::File {
            action: "remove",
            path: folder.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// What a file is called until it is whole.
pub fn unfinished(name: &str) -> String {
    format!(".{name}.new")
}

/// Removes what [`write_json`] had begun in a folder when its process died. While nobody writes
/// there.
pub fn sweep_unfinished(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let inner = name.strip_prefix('.').and_then(|n| n.strip_suffix(".new"));
        if inner.is_some_and(|name| name.ends_with(".json")) {
            std::fs::remove_file(entry.path())?;
            tracing::info!(file = %entry.path().display(), "a file that was not whole is removed");
        }
    }
    Ok(())
}

/// Replaces `folder/name` by `value` as JSON, in one step, readable by its owner only.
pub fn write_json(folder: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(value)?;
    let temporary = folder.join(unfinished(name));
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&text)?;
        std::fs::rename(&temporary, folder.join(name))
    };
    let written = write();
    if written.is_err() {
        // On a full disk it is there and empty. That it was not written is what is told.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Has all that [`write_json`] wrote into a folder outlast a loss of power.
pub fn sync_json(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "json") {
            std::fs::File::open(path)?.sync_all()?;
        }
    }
    std::fs::File::open(folder)?.sync_all()
}

/// Reads `folder/name`; `None` when there is no such file, or nothing of it reached the disk
/// before its host lost power ([`write_json`] never writes nothing). Damage is an error that names
/// it.
pub fn read_json<T: DeserializeOwned>(folder: &Path, name: &str) -> io::Result<Option<T>> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| io::Error::other(format!("{} is damaged: {e}", path.display()))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_whole_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        write_json(dir.path(), "whole.json", &1).unwrap();
        // Their writer died before the rename.
        for name in ["whole.json", "other.json"] {
            std::fs::write(dir.path().join(unfinished(name)), "{\"half").unwrap();
        }
        for name in [".other.new", ".hidden.json", "x.json.new"] {
            std::fs::write(dir.path().join(name), "another's").unwrap();
        }
        sweep_unfinished(dir.path()).unwrap();
        let mut left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(
            left,
            [".hidden.json", ".other.new", "whole.json", "x.json.new"]
        );
        assert_eq!(read_json::<i32>(dir.path(), "whole.json").unwrap(), Some(1));
        sync_json(dir.path()).unwrap();
        // What ext4 leaves of a file that was renamed and not synced when the power went.
        std::fs::write(dir.path().join("whole.json"), "").unwrap();
        assert_eq!(read_json::<i32>(dir.path(), "whole.json").unwrap(), None);
        std::fs::write(dir.path().join("whole.json"), "{").unwrap();
        assert!(read_json::<i32>(dir.path(), "whole.json").is_err());
        assert!(sweep_unfinished(&dir.path().join("gone")).is_err());
    }
}
