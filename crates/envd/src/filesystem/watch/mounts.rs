//! Which file systems do not tell us what others do to them.

use std::path::Path;

use rustix::fd::AsFd;

use crate::filesystem::error::FsError;

/// Magic numbers of statfs(2): inotify only sees what this kernel does, and on these others
/// write too.
const NETWORK: [(u32, &str); 8] = [
    (0x6969, "NFS"),
    (0xFF53_4D42, "CIFS"),
    (0xFE53_4D42, "SMB2"),
    (0x517B, "SMB"),
    (0x6573_5546, "FUSE"),
    (0x00C3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414F, "AFS"),
];

/// The kind of network file system that an open file is on.
pub(super) fn network(file: impl AsFd, path: &Path) -> Result<Option<&'static str>, FsError> {
    let stat = rustix::fs::fstatfs(file).map_err(|e| FsError::from_errno("inspect", path, e))?;
    // The field is as wide as a word; magic numbers have 32 bits and may be sign-extended.
    Ok(name_of(stat.f_type as u32))
}

fn name_of(magic: u32) -> Option<&'static str> {
    NETWORK
        .iter()
        .find(|(known, _)| *known == magic)
        .map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_file_system_is_no_network_mount() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::open(dir.path()).unwrap();
        assert_eq!(network(&file, dir.path()).unwrap(), None);
        assert_eq!(name_of(0x6969), Some("NFS"));
        assert_eq!(name_of(0xFFFF_FFFF_FF53_4D42_u64 as u32), Some("CIFS"));
        assert_eq!(name_of(0xEF53), None);
    }
}
