//! How much fits on this host.

use std::path::Path;

use wrenn_types::Shape;

/// Memory that stays free for the host itself.
pub const MEMORY_RESERVE: u64 = 512 << 20;
/// What an idle machine takes of its own: the emulator's heap, its translation cache and
/// the pages it has written since its restore (measured: 30 to 45 MiB; at most 50 are
/// promised).
pub const IDLE_MACHINE: u64 = 50 << 20;
/// A guest may touch all its memory, but few do; so much of it is counted on admission where the
/// operator says nothing else.
pub const EXPECTED_USE_PERCENT: u32 = 25;
/// Disk that must stay free for the host to keep working.
pub const DISK_RESERVE: u64 = 1 << 30;
/// Disk a fresh sandbox is expected to write.
pub const DISK_EACH: u64 = 128 << 20;

/// Why a machine was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// The host's memory is used up.
    #[error(
        "not enough memory for another sandbox of {shape}: it needs about {needed_mib} MiB, {available_mib} MiB are available and 512 MiB stay reserved; end sandboxes or ask for less memory"
    )]
    Memory {
        /// What was asked for.
        shape: Shape,
        /// What one is expected to use.
        needed_mib: u64,
        /// What the kernel says is available.
        available_mib: u64,
    },
    /// The disk is used up.
    #[error(
        "not enough disk for another sandbox in {dir}: {available_mib} MiB are free and 1024 MiB stay reserved; free some space"
    )]
    Disk {
        /// The data folder.
        dir: String,
        /// What is free there.
        available_mib: u64,
    },
    /// The kernel did not say.
    #[error("cannot read how much {what} is free: {source}")]
    Unknown {
        /// Memory or disk.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

fn meminfo(field: &str) -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| {
            let kib = line
                .strip_prefix(field)?
                .strip_prefix(':')?
                .trim()
                .strip_suffix(" kB")?;
            kib.parse::<u64>().ok().map(|kib| kib << 10)
        })
        .ok_or_else(|| std::io::Error::other(format!("/proc/meminfo has no {field}")))
}

/// Bytes of memory of this host.
pub fn memory_total() -> std::io::Result<u64> {
    meminfo("MemTotal")
}

/// Bytes of memory that could be given out without swapping.
pub fn memory_available() -> std::io::Result<u64> {
    meminfo("MemAvailable")
}

/// Bytes free in the file system of `dir`.
pub fn disk_available(dir: &Path) -> std::io::Result<u64> {
    let fs = rustix::fs::statvfs(dir)?;
    Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
}

/// What a machine of this shape is expected to use, in bytes, where so much of its memory is
/// counted.
pub fn expected_use(shape: Shape, percent: u32) -> u64 {
    IDLE_MACHINE + shape.memory.bytes() * u64::from(percent) / 100
}

/// Whether there is room to save a sandbox: what it has written since it started is of its
/// memory's order, and the disk's reserve is what a full disk is met with.
pub fn admit_save(dir: &Path) -> Result<(), CapacityError> {
    let available = disk_available(dir).map_err(|source| CapacityError::Unknown {
        what: "disk",
        source,
    })?;
    match available >= DISK_RESERVE {
        true => Ok(()),
        false => Err(CapacityError::Disk {
            dir: dir.display().to_string(),
            available_mib: available >> 20,
        }),
    }
}

/// How many more machines of this shape fit.
pub fn fits(shape: Shape, percent: u32, memory_available: u64, disk_available: u64) -> u64 {
    let each = expected_use(shape, percent);
    let by_memory = memory_available.saturating_sub(MEMORY_RESERVE) / each;
    let by_disk = disk_available.saturating_sub(DISK_RESERVE) / DISK_EACH;
    by_memory.min(by_disk)
}

/// Bytes of memory that a machine of this shape lacks to be admitted; 0 where it would be.
pub fn memory_lacking(shape: Shape, percent: u32) -> std::io::Result<u64> {
    let needed = MEMORY_RESERVE + expected_use(shape, percent);
    Ok(needed.saturating_sub(memory_available()?))
}

/// Refuses a machine that would not fit.
pub fn admit(shape: Shape, percent: u32, data_dir: &Path) -> Result<(), CapacityError> {
    let memory = memory_available().map_err(|source| CapacityError::Unknown {
        what: "memory",
        source,
    })?;
    let needed = expected_use(shape, percent);
    if memory.saturating_sub(MEMORY_RESERVE) < needed {
        return Err(CapacityError::Memory {
            shape,
            needed_mib: needed >> 20,
            available_mib: memory >> 20,
        });
    }
    let disk = disk_available(data_dir).map_err(|source| CapacityError::Unknown {
        what: "disk",
        source,
    })?;
    if disk.saturating_sub(DISK_RESERVE) < DISK_EACH {
        return Err(CapacityError::Disk {
            dir: data_dir.display().to_string(),
            available_mib: disk >> 20,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_fits_into_the_reserve() {
        assert_eq!(fits(Shape::DEFAULT, 25, MEMORY_RESERVE, u64::MAX), 0);
        assert_eq!(fits(Shape::DEFAULT, 25, u64::MAX, DISK_RESERVE), 0);
        let one = MEMORY_RESERVE + expected_use(Shape::DEFAULT, 25);
        assert_eq!(fits(Shape::DEFAULT, 25, one, u64::MAX), 1);
        assert_eq!(fits(Shape::DEFAULT, 25, one - 1, u64::MAX), 0);
        // All of its memory is counted where nothing is to be overcommitted.
        assert_eq!(fits(Shape::DEFAULT, 100, one, u64::MAX), 0);
    }

    #[test]
    fn this_host_says_what_it_has() {
        assert!(memory_available().unwrap() <= memory_total().unwrap());
        assert!(disk_available(Path::new("/")).is_ok());
        assert!(disk_available(Path::new("/nowhere")).is_err());
    }
}
