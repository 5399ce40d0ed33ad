//! What sandboxes may use of the disk.

use std::path::Path;

use wrenn_host::cgroups::Cgroups;
use wrenn_vmm::DiskLimits;

/// What limits sandboxes' use of the disk and how, for people.
pub(super) fn describe(groups: &Cgroups, folder: &Path, limits: DiskLimits) -> String {
    let by = match groups.disk_of(folder) {
        Ok(device) if groups.know_writers() => format!("device {device}, by control groups"),
        Ok(_) => "by the monitor: control groups v1 do not know whose a write from the cache is"
            .to_owned(),
        Err(why) => format!("by the monitor: {why}"),
    };
    format!("{by}; {}", words(limits))
}

fn words(limits: DiskLimits) -> String {
    let bytes = limits.bytes_per_sec;
    let bytes = bytes.map(|bytes| format!("{} MB/s", bytes / 1_000_000));
    let operations = limits.operations_per_sec;
    let operations = operations.map(|number| format!("{number} operations/s"));
    let all: Vec<String> = bytes.into_iter().chain(operations).collect();
    match all.is_empty() {
        true => "none is set (--guest-disk-bandwidth, --guest-disk-iops)".to_owned(),
        false => format!("each sandbox {}", all.join(" and ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_named() {
        let mut limits = DiskLimits::default();
        assert!(words(limits).starts_with("none is set"));
        limits.bytes_per_sec = Some(50_000_000);
        assert_eq!(words(limits), "each sandbox 50 MB/s");
        limits.operations_per_sec = Some(100);
        assert_eq!(words(limits), "each sandbox 50 MB/s and 100 operations/s");
    }
}
