//! Disks that machines write to, made in the best way that the host has: as raw images, each a
//! copy of the layer below, or as layers of the device mapper.

mod in_jail;
mod loops;
mod mapped;
mod mapper;

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use sha2::{Digest, Sha256};

pub(crate) use self::in_jail::layers_in;
pub(super) use self::in_jail::{DiskInJail, layer_in};
pub use self::mapped::MappedDisk;
use crate::memory::PAGE;
use crate::sparse::data_in;
use crate::{LayerFormat, VmmError};

/// How much of an image is copied at once.
const CHUNK: u64 = 1 << 20;

/// How images are copied, and why so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cloning {
    /// The way.
    pub way: CloneWay,
    /// Why, as a sentence.
    pub why: String,
    /// How the names of devices begin that are made for machines of this data folder.
    #[serde(skip)]
    prefix: String,
}

/// A way to copy an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CloneWay {
    /// The copy shares its blocks with the original until one of them is written
    /// (ioctl_ficlone(2)): it takes no time and no room.
    Reflink,
    /// What differs from the image below is kept beside it; see `mapped`.
    DeviceMapper,
    /// All that is not a hole is copied.
    Copy,
}

impl fmt::Display for CloneWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CloneWay::Reflink => "reflink",
            CloneWay::DeviceMapper => "device mapper",
            CloneWay::Copy => "sparse copy",
        })
    }
}

impl Cloning {
    /// Finds the best way by trying, in the folder where the images are, and takes away what
    /// an agent of it has left in the kernel that was killed. Leaves nothing behind. Blocking.
    pub fn probe(dir: &Path) -> Cloning {
        let prefix = format!("wrenn-{}-", short_digest(dir));
        let reflink = try_reflink(dir);
        let mapper = match reflink {
            Ok(()) => Ok(()),
            Err(_) => try_device_mapper(dir, &prefix),
        };
        Cloning::judge(dir, prefix, reflink, mapper)
    }

    /// The verdict from what was tried. Pure.
    fn judge(
        dir: &Path,
        prefix: String,
        reflink: io::Result<()>,
        mapper: io::Result<()>,
    ) -> Cloning {
        let dir = dir.display();
        let (way, why) = match (reflink, mapper) {
            (Ok(()), _) => (
                CloneWay::Reflink,
                format!("the file system of {dir} shares blocks between files"),
            ),
            (Err(error), Ok(())) => (
                CloneWay::DeviceMapper,
                format!(
                    "disks are snapshots of the device mapper: the file system of {dir} cannot share blocks between files ({error})"
                ),
            ),
            (Err(error), Err(mapper)) => (
                CloneWay::Copy,
                format!(
                    "disks are copied: the file system of {dir} cannot share blocks ({error}; btrfs and xfs can), and the device mapper cannot be used ({mapper})"
                ),
            ),
        };
        Cloning { way, why, prefix }
    }

    /// How layers are written that are made this way.
    pub(super) fn layers(&self) -> LayerFormat {
        match self.way {
            CloneWay::Reflink | CloneWay::Copy => LayerFormat::Raw,
            CloneWay::DeviceMapper => LayerFormat::DmSnapshot,
        }
    }

    /// What the device of the machine in this folder is called.
    fn device(&self, dir: &Path) -> String {
        format!("{}{}", self.prefix, short_digest(dir))
    }

    /// Fills the raw image `to`, which is empty, with what `from` holds. Blocking.
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
            CloneWay::DeviceMapper | CloneWay::Copy => sparse_copy(&original, &copy),
        }
        .map_err(failed("cannot fill the disk", to))
    }
}

fn reflink(from: &impl AsFd, to: &impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::ioctl_ficlone(to, from)?)
}

/// Some letters that stand for a path, whatever it is called by.
fn short_digest(path: &Path) -> String {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    hex::encode(&Sha256::digest(path.as_os_str().as_encoded_bytes())[..8])
}

/// A file without a name, so it cannot stay behind.
fn unnamed(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR)?;
    Ok(file.into())
}

fn try_reflink(dir: &Path) -> io::Result<()> {
    let (from, to) = (unnamed(dir)?, unnamed(dir)?);
    rustix::io::write(&from, &[1; PAGE])?;
    reflink(&from, &to)
}

/// Writes to a small disk, and looks whether only its layer has changed.
fn try_device_mapper(dir: &Path, prefix: &str) -> io::Result<()> {
    const BYTES: u64 = 1 << 20;
    mapped::sweep(prefix)?;
    let (image, layer) = (unnamed(dir)?, unnamed(dir)?);
    image.set_len(BYTES)?;
    image.write_all_at(&[1; PAGE], 0)?;
    MappedDisk::create_layer(BYTES, &layer)?;
    let path = |file: &File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let name = format!("{prefix}probe");
    let (_, disk) = MappedDisk::attach(&name, &path(&image), &path(&layer))?;
    disk.write_all_at(&[2; PAGE], 0)?;
    disk.sync_data()?;
    let mut kept = [0; PAGE];
    image.read_exact_at(&mut kept, 0)?;
    match kept == [1; PAGE] {
        true => Ok(()),
        false => Err(io::Error::other("it wrote to the image below")),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_is_told_with_its_reason() {
        let dir = Path::new("/data");
        let judge = |reflink, mapper| Cloning::judge(dir, String::new(), reflink, mapper);
        let cannot = || Err(io::Error::from(io::ErrorKind::Unsupported));
        let cloning = judge(Ok(()), cannot());
        assert_eq!(cloning.way, CloneWay::Reflink);
        assert_eq!(cloning.layers(), LayerFormat::Raw);
        let cloning = judge(cannot(), Ok(()));
        assert_eq!(cloning.way, CloneWay::DeviceMapper);
        assert_eq!(cloning.layers(), LayerFormat::DmSnapshot);
        let missing = io::Error::other("/dev/mapper/control: not found");
        let cloning = judge(cannot(), Err(missing));
        assert_eq!(cloning.way, CloneWay::Copy);
        assert!(cloning.why.contains("/data") && cloning.why.contains("/dev/mapper/control"));
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
                ..cloning.clone()
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
