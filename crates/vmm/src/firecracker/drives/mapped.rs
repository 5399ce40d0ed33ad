//! Disks where the file system cannot share blocks between files: the kernel's device mapper
//! lays what a machine writes over an image that all of them share (its `snapshot` target,
//! <https://docs.kernel.org/admin-guide/device-mapper/snapshot.html>).
//!
//! ```text
//!   raw image ──▶ loop device, read-only ─┐
//!                                         ├─▶ /dev/dm-N ──▶ the machine
//!   its layer ──▶ loop device ────────────┘
//! ```
//!
//! A layer holds all that differs from the image, in the kernel's own format (`persistent`), so
//! it is copied to go on from it, and never grows longer than what was ever written.
//!
//! Nothing of this has to be taken away by anybody: the device is removed by the kernel when its
//! machine closes it, and with it go the loop devices. What an agent leaves that is killed before
//! the kernel was told so is taken away by the next, [`sweep`].

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::loops::{self, Loop};
use super::mapper::Mapper;

/// What is written is kept in parts of this size.
const CHUNK: u64 = 4096;
const SECTOR: u64 = 512;

/// How many parts are described by one part of a layer, 16 bytes each.
const DESCRIBED: u64 = CHUNK / 16;

/// How long the device of the machine that was there before may take to go.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// How a layer begins, after Linux's `drivers/md/dm-snap-persistent.c`: this, and then whether it
/// is whole.
const MAGIC: [u8; 4] = *b"SnAp";
const VALID: u64 = 4;

/// The disk of one machine, a device of the device mapper.
#[derive(Debug)]
pub struct MappedDisk {
    name: String,
    node: PathBuf,
}

impl MappedDisk {
    /// Makes an empty file the layer of an image of `bytes` that nothing was written to. Blocking.
    pub fn create_layer(bytes: u64, layer: &File) -> io::Result<()> {
        if !bytes.is_multiple_of(CHUNK) {
            let odd = format!("its image has {bytes} bytes, which is no multiple of {CHUNK}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, odd));
        }
        layer.set_len(layer_bytes(bytes))
    }

    /// Makes an empty file what the layer `from` is. Blocking.
    pub fn copy_layer(from: &File, to: &File) -> io::Result<()> {
        super::sparse_copy(from, to)?;
        // The kernel marks a layer as broken when it cannot write to it, as on a full disk. What was
        // described before is whole.
        let mut begins = [0; MAGIC.len()];
        to.read_exact_at(&mut begins, 0)?;
        match begins == MAGIC {
            true => to.write_all_at(&1u32.to_le_bytes(), VALID),
            // Nothing was ever written to it.
            false => Ok(()),
        }
    }

    /// Makes the device `name` of an image and the layer `top`, which [`MappedDisk::create_layer`] or
    /// [`MappedDisk::copy_layer`] has made. It
    /// goes with the last of its users, the first of which is the file returned. Blocking.
    pub fn attach(name: &str, image: &Path, top: &Path) -> io::Result<(MappedDisk, File)> {
        let mapper = Mapper::open()?;
        let bytes = std::fs::metadata(image)?.len();
        let (image, layer) = (Loop::attach(image, false)?, Loop::attach(top, true)?);
        let number = make(&mapper, name)?;
        let node = node(number);
        let used = (|| {
            mapper.load(
                name,
                bytes / SECTOR,
                "snapshot",
                &table(image.number()?, &layer)?,
            )?;
            mapper.resume(name)?;
            let used = OpenOptions::new().read(true).write(true).open(&node)?;
            mapper.remove_unused(name)?;
            Ok(used)
        })();
        match used {
            Ok(used) => {
                let name = name.to_owned();
                Ok((MappedDisk { name, node }, used))
            }
            Err(error) => {
                if let Err(error) = mapper.remove(name) {
                    tracing::warn!(%error, name, "a device that could not be set up stays");
                }
                Err(error)
            }
        }
    }

    /// The device of this name that a machine uses, if there is one. Blocking.
    pub fn find(name: &str) -> io::Result<Option<MappedDisk>> {
        let found = Mapper::open()?.find(name)?;
        Ok(found.map(|(number, _)| MappedDisk {
            name: name.to_owned(),
            node: node(number),
        }))
    }

    /// Where it is.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Writes to its layer what was written to it so far. Blocking.
    pub fn sync(&self) -> io::Result<()> {
        File::open(&self.node)?.sync_data()
    }

    /// The layer it writes to. Blocking.
    pub fn layer(&self) -> io::Result<PathBuf> {
        let (_, layer) = self.parts(&Mapper::open()?)?;
        loops::backing_file(layer)
    }

    /// Has it write to `top`, a copy of the layer it had, which then never changes again. Its
    /// machine must stand still. If this fails it is as before. Blocking.
    pub fn switch(&self, top: &Path) -> io::Result<()> {
        let mapper = Mapper::open()?;
        let (image, _) = self.parts(&mapper)?;
        let bytes = File::open(&self.node)?.seek(SeekFrom::End(0))?;
        let layer = Loop::attach(top, true)?;
        let table = table(image, &layer)?;
        mapper.load(&self.name, bytes / SECTOR, "snapshot", &table)?;
        mapper.resume(&self.name).inspect_err(|_| {
            if let Err(error) = mapper.clear(&self.name) {
                tracing::warn!(%error, name = self.name, "the layer that was not switched to stays open");
            }
        })
    }

    /// Numbers of the devices that hold its image and its layer.
    fn parts(&self, mapper: &Mapper) -> io::Result<(u64, u64)> {
        let (_, parts) = mapper
            .find(&self.name)?
            .ok_or_else(|| io::Error::other("its device is gone"))?;
        let (mut image, mut layer) = (None, None);
        for part in parts {
            match loops::is_writable(part)? {
                true => layer = Some(part),
                false => image = Some(part),
            }
        }
        image
            .zip(layer)
            .ok_or_else(|| io::Error::other("its device is not made of an image and a layer"))
    }
}

fn table(image: u64, layer: &Loop) -> io::Result<String> {
    let number = |number| {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        format!("{major}:{minor}")
    };
    let layer = number(layer.number()?);
    Ok(format!("{} {layer} P {}", number(image), CHUNK / SECTOR))
}

fn node(number: u64) -> PathBuf {
    format!("/dev/dm-{}", rustix::fs::minor(number)).into()
}

/// The kernel removes the device of a machine that has ended some moments later.
fn make(mapper: &Mapper, name: &str) -> io::Result<u64> {
    let began = Instant::now();
    loop {
        match mapper.create(name) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                if began.elapsed() > PATIENCE {
                    return Err(error);
                }
                std::thread::sleep(POLL);
            }
            created => return created,
        }
    }
}

/// How long a layer can become in which all of an image is written anew: its beginning, and each
/// 256 parts with the one that describes them. Its file has holes.
fn layer_bytes(image: u64) -> u64 {
    // The next description is cleared as soon as one is full.
    let descriptions = (image / CHUNK).div_ceil(DESCRIBED) + 1;
    (1 + descriptions * (DESCRIBED + 1)) * CHUNK
}

/// Takes away the devices of this prefix that nobody uses. Blocking.
pub(super) fn sweep(prefix: &str) -> io::Result<()> {
    let mapper = Mapper::open()?;
    for name in mapper.names()? {
        if !name.starts_with(prefix) {
            continue;
        }
        match mapper.remove(&name) {
            Ok(()) => tracing::info!(name, "removed a disk's device that no machine uses"),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
