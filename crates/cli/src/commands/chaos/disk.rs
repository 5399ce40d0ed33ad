//! A disk of the trials' own, to be filled and slowed down: a file system in a file, mounted
//! below the data folder.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate, major, minor};

use crate::error::Failure;

/// Bytes: what a host keeps free, images and templates, and some sandboxes. The file is sparse.
const SIZE: u64 = 8 << 30;
/// The least that is asked for when the rest is filled.
const CRUMB: u64 = 4096;
/// Bytes per second of a slow disk: an old memory card.
pub(super) const SLOW: u64 = 2_000_000;
/// Where version 1 of control groups limits all that is written to a device, whoever writes it.
const THROTTLE: &str = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device";

/// The file system; [`SmallDisk::remove`] takes it away.
pub(super) struct SmallDisk {
    file: PathBuf,
    mounted: PathBuf,
}

fn failed(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::message(format!("cannot {what}: {error}")).code("chaos")
}

impl SmallDisk {
    /// Makes and mounts it in this folder.
    pub(super) fn make(folder: &Path) -> Result<SmallDisk, Failure> {
        let name = format!("chaos-disk-{}", std::process::id());
        let disk = SmallDisk {
            file: folder.join(format!("{name}.ext4")),
            mounted: folder.join(name),
        };
        let made = disk.set_up();
        if made.is_err() {
            disk.clear_up();
        }
        made.map(|()| disk)
    }

    fn set_up(&self) -> Result<(), Failure> {
        let lay = || -> io::Result<()> {
            File::create_new(&self.file)?.set_len(SIZE)?;
            fs::create_dir(&self.mounted)
        };
        lay().map_err(|error| failed("make a disk to fill", error))?;
        // Nothing is kept back for root, who is the one that fills it.
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1"])
            .arg(&self.file))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&self.file)
            .arg(&self.mounted))
    }

    /// Where it is mounted.
    pub(super) fn folder(&self) -> &Path {
        &self.mounted
    }

    /// Takes all the room there is, until that is dropped.
    pub(super) fn fill(&self) -> Result<Filler, Failure> {
        let path = self.mounted.join("filler");
        let file = File::create_new(&path).map_err(|error| failed("fill the disk", error))?;
        let (filler, mut at, mut piece) = (Filler(path), 0, SIZE);
        // In smaller and smaller pieces: a piece that does not fit leaves the disk as it was.
        while piece >= CRUMB {
            match fallocate(&file, FallocateFlags::empty(), at, piece) {
                Ok(()) => at += piece,
                Err(rustix::io::Errno::NOSPC) => piece /= 2,
                Err(error) => return Err(failed("fill the disk", error)),
            }
        }
        Ok(filler)
    }

    /// Has it take [`SLOW`] bytes per second, until that is dropped. `None` where this kernel
    /// cannot do that.
    pub(super) fn slow_down(&self) -> Result<Option<Throttle>, Failure> {
        if !Path::new(THROTTLE).exists() {
            return Ok(None);
        }
        let number = fs::metadata(&self.mounted)
            .map_err(|error| failed("look at the disk", error))?
            .dev();
        let throttle = Throttle(format!("{}:{}", major(number), minor(number)));
        throttle
            .set(SLOW)
            .map_err(|error| failed("slow the disk down", error))?;
        Ok(Some(throttle))
    }

    /// Unmounts and removes it.
    pub(super) fn remove(self) -> Result<(), Failure> {
        let unmounted = run(Command::new("umount").arg(&self.mounted));
        unmounted.map_err(|failure| {
            let (file, folder) = (self.file.display(), self.mounted.display());
            failure.hint(format!("unmount {folder} and remove it and {file}"))
        })?;
        self.clear_up();
        Ok(())
    }

    fn clear_up(&self) {
        for (path, removed) in [
            (&self.mounted, fs::remove_dir(&self.mounted)),
            (&self.file, fs::remove_file(&self.file)),
        ] {
            if let Err(error) = removed
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "of a disk that was made for trials this stays");
            }
        }
    }
}

/// What fills a disk.
pub(super) struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the disk stays full");
        }
    }
}

/// A device that is slow.
pub(super) struct Throttle(String);

impl Throttle {
    fn set(&self, bytes_per_sec: u64) -> io::Result<()> {
        fs::write(THROTTLE, format!("{} {bytes_per_sec}", self.0))
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Err(error) = self.set(0) {
            tracing::warn!(device = self.0, %error, "the disk stays slow");
        }
    }
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| failed(&format!("start {name}"), error))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(
            &format!("make a disk of its own with {name}"),
            String::from_utf8_lossy(&output.stderr).trim(),
        )),
    }
}
