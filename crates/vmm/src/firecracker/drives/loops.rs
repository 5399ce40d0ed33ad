//! Files as block devices: loop devices, loop(4).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::kernel::{self, LOOP_CONFIG};

const CONTROL: &str = "/dev/loop-control";

/// `LO_FLAGS_*`, linux/loop.h.
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

/// How often another taker may be faster.
const ATTEMPTS: u32 = 64;

/// A loop device, which goes with its last user: this handle or what was built on it meanwhile.
#[derive(Debug)]
pub(super) struct Loop {
    device: File,
}

impl Loop {
    /// Makes a device of a file. Blocking.
    pub(super) fn attach(file: &Path, writable: bool) -> io::Result<Loop> {
        let backing = OpenOptions::new().read(true).write(writable).open(file)?;
        let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
        let config = config(&backing, writable);
        for _ in 0..ATTEMPTS {
            let number = kernel::free_loop(&control)?;
            let device = format!("/dev/loop{number}");
            let device = OpenOptions::new()
                .read(true)
                .write(writable)
                .open(&device)
                .map_err(|error| io::Error::new(error.kind(), format!("{device}: {error}")))?;
            match kernel::configure_loop(&device, &config) {
                Ok(()) => return Ok(Loop { device }),
                // Somebody else took it in between.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(
            "others take every loop device that is free",
        ))
    }

    /// Its device number.
    pub(super) fn number(&self) -> io::Result<u64> {
        Ok(self.device.metadata()?.st_rdev())
    }
}

/// `struct loop_config`: descriptor, block size, then a `struct loop_info64`.
fn config(backing: &File, writable: bool) -> [u8; LOOP_CONFIG] {
    /// Where `lo_flags` of the `loop_info64` is.
    const FLAGS: usize = 60;
    let mut config = [0; LOOP_CONFIG];
    config[..4].copy_from_slice(&backing.as_raw_fd().to_le_bytes());
    let flags = AUTOCLEAR | if writable { 0 } else { READ_ONLY };
    config[FLAGS..FLAGS + 4].copy_from_slice(&flags.to_le_bytes());
    config
}

/// What the kernel tells of a block device.
fn told(number: u64, what: &str) -> io::Result<String> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{what}"))
}

/// Whether a block device can be written to.
pub(super) fn is_writable(number: u64) -> io::Result<bool> {
    Ok(told(number, "ro")?.trim_end() == "0")
}

/// The file behind a loop device, by the name under which it was attached.
pub(super) fn backing_file(number: u64) -> io::Result<PathBuf> {
    Ok(told(number, "loop/backing_file")?
        .trim_end_matches('\n')
        .into())
}
