//! The files of a machine that is started: its jail, disk, kernel and state.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt, chown};
use std::path::Path;

use super::launch::{JAIL, RUN};
use crate::VmmError;
use crate::machine::BootFiles;
use crate::memfd::copy_of;

/// What a kernel is called among a monitor's descriptors.
pub(super) const BOOT_NAME: &str = "wrenn-boot";

/// Kernel and initial file system, in memory that nobody can change.
pub(super) fn open_kernel(boot: &BootFiles) -> Result<(OwnedFd, OwnedFd), VmmError> {
    let open = |path: &Path| {
        File::open(path).map_err(|source| VmmError::File {
            what: "cannot read",
            path: path.to_owned(),
            source,
        })
    };
    let kernel = open(&boot.kernel)?;
    let mut magic = [0; 4];
    let found = kernel.read_exact_at(&mut magic, 0);
    if found.is_err() || magic != *b"\x7fELF" {
        return Err(VmmError::Unsupported {
            monitor: "Firecracker",
            what: "boot a kernel that is no ELF file",
            why: format!(
                "{} is none (a bzImage has one inside, `vmlinux`: give that)",
                boot.kernel.display()
            ),
        });
    }
    let copied = |path: &Path, file: &File| {
        copy_of(BOOT_NAME, file).map_err(|source| VmmError::File {
            what: "cannot read",
            path: path.to_owned(),
            source,
        })
    };
    let initramfs = open(&boot.initramfs)?;
    Ok((
        copied(&boot.kernel, &kernel)?,
        copied(&boot.initramfs, &initramfs)?,
    ))
}

/// An empty jail in the machine's folder.
pub(super) fn make_jail(dir: &Path, (uid, gid): (u32, u32)) -> Result<(), VmmError> {
    let jail = dir.join(JAIL);
    let make = || -> io::Result<()> {
        match fs::remove_dir_all(&jail) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let run = jail.join(RUN);
        // The machine's folder keeps all others out.
        DirBuilder::new().mode(0o755).create(&jail)?;
        fs::set_permissions(&jail, fs::Permissions::from_mode(0o755))?;
        DirBuilder::new().mode(0o700).create(&run)?;
        chown(&run, Some(uid), Some(gid))
    };
    make().map_err(|source| VmmError::File {
        what: "cannot make the jail",
        path: jail.clone(),
        source,
    })
}

/// Runs work that waits for files.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VmmError> + Send + 'static,
) -> Result<T, VmmError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(VmmError::Spec(format!(
                "its files were not prepared: {error}"
            )))
        })
}

pub(super) fn own_file(what: &'static str, dir: &Path, source: io::Error) -> VmmError {
    VmmError::File {
        what,
        path: dir.to_owned(),
        source,
    }
}

pub(super) fn unreadable(state: &File, source: io::Error) -> VmmError {
    VmmError::State {
        doing: "loaded",
        why: format!("{} cannot be read: {source}", path_of(state)),
    }
}

/// What a file is called, for people.
pub(super) fn path_of(file: &File) -> String {
    match fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) {
        Ok(path) => path.display().to_string(),
        Err(_) => "its state".into(),
    }
}
