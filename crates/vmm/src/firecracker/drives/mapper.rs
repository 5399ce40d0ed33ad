//! The device mapper: block devices that are made of others, linux/dm-ioctl.h.

use std::fs::{File, OpenOptions};
use std::io;

use crate::kernel::{self, DM_IOCTL};

/// Where the kernel's device mapper is steered.
pub(super) const CONTROL: &str = "/dev/mapper/control";

/// Commands of the kernel's interface, of which version 4 is asked for.
const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const TABLE_LOAD: u8 = 9;
const TABLE_CLEAR: u8 = 10;
const TABLE_DEPS: u8 = 11;

/// `DM_DEFERRED_REMOVE`: a device that is in use goes when it no longer is.
const DEFERRED: u32 = 1 << 17;

/// What udev(7) is told with an event: that a device is none of its business. Else it would look
/// for file systems and volume groups in what guests write, and LVM would use them. These are
/// libdevmapper's `DM_UDEV_DISABLE_*` for subsystem, disk and other rules, in the upper half of
/// the cookie that is handed on.
const LEAVE_ALONE: u32 = (0x02 | 0x04 | 0x08) << 16;

/// Offsets in `struct dm_ioctl`.
const VERSION: usize = 0;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGETS: usize = 20;
const FLAGS: usize = 28;
const EVENT: usize = 32;
const DEVICE: usize = 40;
const NAME: usize = 48;
const NAME_BYTES: usize = 128;

/// Room for an answer; the longest is the list of all devices.
const ANSWER: usize = 64 << 10;

/// `struct dm_target_spec`.
const TARGET: usize = 40;
const TARGET_TYPE: usize = 24;

/// A way to the kernel's device mapper.
#[derive(Debug)]
pub(super) struct Mapper(File);

impl Mapper {
    /// Opens it, which loads its module where there is one.
    pub(super) fn open() -> io::Result<Mapper> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL);
        control
            .map(Mapper)
            .map_err(|error| io::Error::new(error.kind(), format!("{CONTROL}: {error}")))
    }

    /// Makes a device without a table, and tells its number.
    pub(super) fn create(&self, name: &str) -> io::Result<u64> {
        let answer = self.ask(DEV_CREATE, name, 0, &[])?;
        Ok(number_at(&answer, DEVICE))
    }

    /// Gives a device its next table: one target over all of it, `sectors` of 512 bytes long.
    pub(super) fn load(
        &self,
        name: &str,
        sectors: u64,
        target: &str,
        parameters: &str,
    ) -> io::Result<()> {
        let mut spec = vec![0; TARGET];
        spec[8..16].copy_from_slice(&sectors.to_le_bytes());
        spec[TARGET_TYPE..TARGET_TYPE + target.len()].copy_from_slice(target.as_bytes());
        spec.extend_from_slice(parameters.as_bytes());
        spec.resize((spec.len() + 1).next_multiple_of(8), 0);
        self.ask(TABLE_LOAD, name, 0, &spec).map(drop)
    }

    /// Forgets the next table.
    pub(super) fn clear(&self, name: &str) -> io::Result<()> {
        self.ask(TABLE_CLEAR, name, 0, &[]).map(drop)
    }

    /// Has the next table take the place of the one that is used, in one step.
    pub(super) fn resume(&self, name: &str) -> io::Result<()> {
        self.ask(DEV_SUSPEND, name, 0, &[]).map(drop)
    }

    /// Removes a device that nobody uses.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        self.ask(DEV_REMOVE, name, 0, &[]).map(drop)
    }

    /// Removes a device as soon as nobody uses it, whether there is an agent then or not.
    pub(super) fn remove_unused(&self, name: &str) -> io::Result<()> {
        self.ask(DEV_REMOVE, name, DEFERRED, &[]).map(drop)
    }

    /// Number of a device and of those its table is made of; `None` when there is none of this
    /// name.
    pub(super) fn find(&self, name: &str) -> io::Result<Option<(u64, Vec<u64>)>> {
        let answer = match self.ask(TABLE_DEPS, name, 0, &[]) {
            Ok(answer) => answer,
            // ENXIO.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
            Err(error) => return Err(error),
        };
        // `struct dm_target_deps`: a count, padding, then device numbers.
        let deps = answer.get(half_at(&answer, DATA_START) as usize..);
        let deps = deps.filter(|deps| deps.len() >= 8).unwrap_or(&[0; 8]);
        let numbers = deps[8..].chunks_exact(8).map(|number| number_at(number, 0));
        let count = half_at(deps, 0) as usize;
        Ok(Some((
            number_at(&answer, DEVICE),
            numbers.take(count).collect(),
        )))
    }

    /// Names of all devices.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let answer = self.ask(LIST_DEVICES, "", 0, &[])?;
        let mut names = Vec::new();
        let mut at = half_at(&answer, DATA_START) as usize;
        // `struct dm_name_list`: number, offset of the next, name.
        while let Some(entry) = answer.get(at..).filter(|entry| entry.len() > 12) {
            if number_at(entry, 0) == 0 {
                break;
            }
            let name = entry[12..].split(|byte| *byte == 0).next();
            names.push(String::from_utf8_lossy(name.unwrap_or_default()).into_owned());
            match half_at(entry, 8) {
                0 => break,
                next => at += next as usize,
            }
        }
        Ok(names)
    }

    fn ask(&self, command: u8, name: &str, flags: u32, data: &[u8]) -> io::Result<Vec<u8>> {
        if name.len() >= NAME_BYTES {
            return Err(io::Error::from(io::ErrorKind::InvalidFilename));
        }
        let bytes = (DM_IOCTL + data.len()).max(ANSWER);
        let mut request = vec![0; bytes];
        let mut put = |at: usize, value: u32| {
            request[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(VERSION, 4);
        put(DATA_SIZE, bytes as u32);
        put(DATA_START, DM_IOCTL as u32);
        put(TARGETS, u32::from(!data.is_empty()));
        put(FLAGS, flags);
        if matches!(command, DEV_SUSPEND | DEV_REMOVE) {
            put(EVENT, LEAVE_ALONE);
        }
        request[NAME..NAME + name.len()].copy_from_slice(name.as_bytes());
        request[DM_IOCTL..DM_IOCTL + data.len()].copy_from_slice(data);
        kernel::device_mapper(&self.0, command, &mut request)?;
        Ok(request)
    }
}

/// Four bytes of an answer, which is longer.
fn half_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

/// Eight bytes of an answer, which is longer.
fn number_at(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}
