//! What a machine may use of the disk that the data folder lies on: which device that is, and
//! what is written to a group's files for it.
//!
//! The kernel limits what reaches the device. In version 2 that is everything, also what it
//! writes back later from its cache of files. Version 1 knows whose a write is only when it goes
//! past that cache, and a machine's do not: there only what a guest reads is limited, and the
//! monitor has to do it ([`super::Cgroups::limits_disk`]).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};
use wrenn_vmm::DiskLimits;

/// Where the kernel lists block devices by number.
pub(super) const DEVICES: &str = "/sys/dev/block";

/// The disk below a folder, as a control group's files name it: `254:0`. Of a partition its
/// whole disk, since only disks can be limited. An error is a sentence for people.
pub(super) fn device_of(folder: &Path, devices: &Path) -> Result<String, String> {
    let shown = folder.display();
    let number = fs::metadata(folder)
        .map_err(|error| format!("cannot look at {shown}: {error}"))?
        .dev();
    let name = format!("{}:{}", major(number), minor(number));
    let device = fs::canonicalize(devices.join(&name)).map_err(|_| {
        format!(
            "the file system of {shown} is on no block device of its own, as btrfs, overlayfs, \
             tmpfs and network file systems are not, and only a device can be limited"
        )
    })?;
    let disk = match (device.join("partition").exists(), device.parent()) {
        (true, Some(disk)) => disk,
        _ => &device,
    };
    let file = disk.join("dev");
    let number = fs::read_to_string(&file)
        .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    Ok(number.trim().to_owned())
}

/// The files of a group that limit a device, with what is written to them. `""` is the tree of
/// version 2.
pub(super) fn settings(
    controller: &str,
    device: &str,
    limits: DiskLimits,
) -> Vec<(&'static str, String)> {
    let DiskLimits {
        bytes_per_sec,
        operations_per_sec,
    } = limits;
    match controller {
        "" => {
            let word = |names: [&str; 2], limit: Option<u64>| {
                limit.map(|limit| format!(" {}={limit} {}={limit}", names[0], names[1]))
            };
            let words: String = word(["rbps", "wbps"], bytes_per_sec)
                .into_iter()
                .chain(word(["riops", "wiops"], operations_per_sec))
                .collect();
            vec![("io.max", format!("{device}{words}"))]
        }
        "blkio" => {
            let all = [
                ("blkio.throttle.read_bps_device", bytes_per_sec),
                ("blkio.throttle.write_bps_device", bytes_per_sec),
                ("blkio.throttle.read_iops_device", operations_per_sec),
                ("blkio.throttle.write_iops_device", operations_per_sec),
            ];
            let set =
                |(file, limit): (_, Option<u64>)| Some((file, format!("{device} {}", limit?)));
            all.into_iter().filter_map(set).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_partition_is_its_disk_and_a_disk_itself() {
        let sys = tempfile::tempdir().unwrap();
        let number = fs::metadata(sys.path()).unwrap().dev();
        let name = format!("{}:{}", major(number), minor(number));
        let disk = sys.path().join("sda");
        let partition = disk.join("sda1");
        fs::create_dir_all(&partition).unwrap();
        fs::write(disk.join("dev"), "8:0\n").unwrap();
        fs::write(partition.join("dev"), "8:1\n").unwrap();
        fs::write(partition.join("partition"), "1\n").unwrap();
        symlink(&partition, sys.path().join(&name)).unwrap();
        assert_eq!(device_of(sys.path(), sys.path()).unwrap(), "8:0");
        fs::remove_file(sys.path().join(&name)).unwrap();
        symlink(&disk, sys.path().join(&name)).unwrap();
        assert_eq!(device_of(sys.path(), sys.path()).unwrap(), "8:0");
    }

    #[test]
    fn a_file_system_without_a_device_is_named() {
        let why = device_of(Path::new("/proc"), Path::new(DEVICES)).unwrap_err();
        assert!(
            why.contains("/proc") && why.contains("no block device"),
            "{why}"
        );
    }

    #[test]
    fn g38_only_what_is_limited_is_written() {
        let limits = DiskLimits {
            bytes_per_sec: Some(5_000_000),
            operations_per_sec: None,
        };
        let v2 = settings("", "8:0", limits);
        assert_eq!(v2, [("io.max", "8:0 rbps=5000000 wbps=5000000".to_owned())]);
        let both = DiskLimits {
            operations_per_sec: Some(200),
            ..limits
        };
        let v2 = settings("", "8:0", both);
        assert!(v2[0].1.ends_with(" riops=200 wiops=200"), "{v2:?}");
        let v1 = settings("blkio", "8:0", limits);
        let files: Vec<&str> = v1.iter().map(|(file, _)| *file).collect();
        assert_eq!(
            files,
            [
                "blkio.throttle.read_bps_device",
                "blkio.throttle.write_bps_device"
            ]
        );
        assert!(v1.iter().all(|(_, value)| value == "8:0 5000000"));
        assert_eq!(settings("memory", "8:0", both), []);
    }
}
