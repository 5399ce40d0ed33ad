//! Raw disk images that a machine writes to: each a copy of the layer below, made in the best
//! way that the file system has.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::VmmError;
use crate::memory::{PAGE, data_in};

/// How much of an image is copied at once.
const CHUNK: u64 = 1 << 20;

/// Where the kernel's device mapper is steered.
const DEVICE_MAPPER: &str = "/dev/mapper/control";

/// How images are copied, and why so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cloning {
    /// The way.
    pub way: CloneWay,
    /// Why, as a sentence.
    pub why: String,
}

/// A way to copy an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CloneWay {
    /// The copy shares its blocks with the original until one of them is written
    /// (ioctl_ficlone(2)): it takes no time and no room.
    Reflink,
    /// All that is not a hole is copied.
    Copy,
}

impl fmt::Display for CloneWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CloneWay::Reflink => "reflink",
            CloneWay::Copy => "sparse copy",
        })
    }
}

impl Cloning {
    /// Finds the best way by trying, in the folder where the images are. Leaves nothing
    /// behind. Blocking.
    pub fn probe(dir: &Path) -> Cloning {
        Cloning::judge(dir, try_reflink(dir), Path::new(DEVICE_MAPPER).exists())
    }

    /// The verdict from what was tried. Pure.
    fn judge(dir: &Path, reflink: io::Result<()>, device_mapper: bool) -> Cloning {
        let dir = dir.display();
        let (way, why) = match reflink {
            Ok(()) => (
                CloneWay::Reflink,
                format!("the file system of {dir} shares blocks between files"),
            ),
            Err(error) => (
                CloneWay::Copy,
                format!(
                    "disks are copied: the file system of {dir} cannot share blocks ({error}; btrfs and xfs can), and {}",
                    if device_mapper {
                        "snapshots of the device mapper, which this host has, are not supported"
                    } else {
                        "this kernel has no device mapper"
                    }
                ),
            ),
        };
        Cloning { way, why }
    }

    /// Fills the image `to`, which is empty, with what `from` holds. Blocking.
    pub(super) fn fill(&self, from: &Path, to: &Path) -> Result<(), VmmError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| VmmError::File { what, path, source }
        };
        let original = File::open(from).map_err(failed("cannot open the disk", from))?;
        let copy = OpenOptions::new().read(true).write(true).open(to);
        let copy = copy.map_err(failed("cannot open the disk", to))?;
        match self.way {
            CloneWay::Reflink => reflink(&original, &copy),
            CloneWay::Copy => sparse_copy(&original, &copy),
        }
        .map_err(failed("cannot fill the disk", to))
    }
}

fn reflink(from: &impl AsFd, to: &impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::ioctl_ficlone(to, from)?)
}

/// Both files are unnamed, so nothing can stay behind.
fn try_reflink(dir: &Path) -> io::Result<()> {
    let unnamed = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)
    };
    let (from, to) = (unnamed()?, unnamed()?);
    rustix::io::write(&from, &[1; PAGE])?;
    reflink(&from, &to)
}

fn sparse_copy(from: &File, to: &File) -> io::Result<()> {
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    let mut buffer = vec![0; CHUNK as usize];
    let page = PAGE as u64;
    for part in data_in(from, 0, bytes.div_ceil(page))? {
        let mut at = part.first * page;
        let end = (part.end() * page).min(bytes);
        while at < end {
            let chunk = &mut buffer[..(end - at).min(CHUNK) as usize];
            from.read_exact_at(chunk, at)?;
            to.write_all_at(chunk, at)?;
            at += chunk.len() as u64;
        }
    }
    Ok(())
}

/// An image without content, to be filled when it is used.
pub(super) fn create_empty(path: &Path) -> Result<(), VmmError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map(drop)
        .map_err(|source| VmmError::File {
            what: "cannot create the disk",
            path: path.to_owned(),
            source,
        })
}

/// The disk that another has taken the place of, until it is known which of them is used.
#[derive(Debug)]
#[must_use]
pub(super) struct Before {
    name: PathBuf,
    kept: PathBuf,
}

impl Before {
    /// The other one is used, or this one again. Blocking.
    pub(super) fn end(self, replaced: bool) -> Result<(), VmmError> {
        match replaced {
            true => std::fs::remove_file(&self.kept),
            false => std::fs::rename(&self.kept, &self.name),
        }
        .map_err(|source| VmmError::File {
            what: "cannot put in its place the disk",
            path: self.name,
            source,
        })
    }
}

/// A machine's disk in its jail: a second name of the layer that is on top.
#[derive(Debug)]
pub(super) struct DiskInJail {
    name: PathBuf,
    new_name: PathBuf,
}

impl DiskInJail {
    pub(super) fn new(jail: &Path, name: &str) -> DiskInJail {
        DiskInJail {
            name: jail.join(name),
            new_name: jail.join(format!("{name}.new")),
        }
    }

    /// What it is called on the host.
    pub(super) fn path(&self) -> &Path {
        &self.name
    }

    /// As [`DiskInJail::set`], and keeps what was there. Blocking.
    pub(super) fn replace(&self, top: &Path, uid: u32, gid: u32) -> Result<Before, VmmError> {
        let kept = self.name.with_extension("before");
        let keep = match std::fs::remove_file(&kept) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => std::fs::hard_link(&self.name, &kept),
        };
        keep.map_err(|source| VmmError::File {
            what: "cannot keep the disk",
            path: self.name.clone(),
            source,
        })?;
        self.set(top, uid, gid)?;
        Ok(Before {
            name: self.name.clone(),
            kept,
        })
    }

    /// Makes `top` the disk, for this user alone. Blocking.
    pub(super) fn set(&self, top: &Path, uid: u32, gid: u32) -> Result<(), VmmError> {
        let failed = |what| {
            let path = top.to_owned();
            move |source: io::Error| VmmError::File { what, path, source }
        };
        chown(top, Some(uid), Some(gid)).map_err(failed("cannot give away the disk"))?;
        let linked = match std::fs::remove_file(&self.new_name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => std::fs::hard_link(top, &self.new_name),
        };
        linked
            .and_then(|()| std::fs::rename(&self.new_name, &self.name))
            .map_err(failed(
                "cannot put into the jail of its machine (both must be on one file system) the disk",
            ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_is_told_with_its_reason() {
        let dir = Path::new("/data");
        let cloning = Cloning::judge(dir, Ok(()), true);
        assert_eq!(cloning.way, CloneWay::Reflink);
        let cannot = || Err(io::Error::from(io::ErrorKind::Unsupported));
        let cloning = Cloning::judge(dir, cannot(), false);
        assert_eq!(cloning.way, CloneWay::Copy);
        assert!(cloning.why.contains("/data") && cloning.why.contains("no device mapper"));
        let cloning = Cloning::judge(dir, cannot(), true);
        assert!(cloning.why.contains("not supported"), "{}", cloning.why);
    }

    #[test]
    fn a_copy_holds_the_same_and_takes_no_more_room() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let cloning = Cloning::probe(dir.path());
        println!("{cloning:?}");
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        // Sizes that are no multiple of anything, and data at both ends.
        let bytes = (8 << 20) + 700;
        let original = File::create(&from).unwrap();
        original.set_len(bytes).unwrap();
        for at in [0, 3 << 20, bytes - 300] {
            original.write_all_at(&[7; 300], at).unwrap();
        }
        for way in [cloning.way, CloneWay::Copy] {
            create_empty(&to).unwrap();
            let cloning = Cloning {
                way,
                why: String::new(),
            };
            cloning.fill(&from, &to).unwrap();
            assert!(std::fs::read(&to).unwrap() == std::fs::read(&from).unwrap());
            let blocks = |path: &Path| std::fs::metadata(path).unwrap().blocks();
            assert!(blocks(&to) <= blocks(&from), "{way}");
            std::fs::remove_file(&to).unwrap();
        }
        assert!(create_empty(&from).is_err(), "an image was overwritten");
    }
}
