//! Copy-on-write layers for a machine's disk: empty ones, and several merged into one.
//!
//! A clone needs a fresh layer within the time of a create, and `qemu-img` takes longer than
//! the rest of it. An empty qcow2 file is four clusters: header, refcount table, one refcount
//! block, and an empty L1 table (more for a huge disk). Format: QEMU's `docs/interop/qcow2.txt`.
//!
//! The file names no backing file, so that no path is baked in; the driver joins the layers
//! by reference.

mod merge;

pub use merge::merge_layers;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// 64 KiB clusters, QEMU's default.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;

/// Guest bytes that one L1 entry covers: an L2 table of 8-byte entries, a cluster each.
const L1_COVERS: u64 = CLUSTER / 8 * CLUSTER;

/// One refcount block of 16-bit counts covers so many clusters of the file.
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER / 2;

/// 16 TiB: far above any sandbox, and its L1 table fits in a few clusters.
const MAX_BYTES: u64 = 16 << 40;

/// Why a layer could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// An impossible size.
    #[error(
        "a disk of {0} bytes cannot be had: the size must be a positive multiple of 512 up to 16 TiB"
    )]
    Size(u64),
    /// The file could not be made.
    #[error("cannot create disk layer {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Makes an empty layer at `path` (which must not exist) for a disk of `virtual_bytes`. Not
/// synced: until its machine is paused its loss loses nothing that was promised.
pub fn create_overlay(path: &Path, virtual_bytes: u64) -> Result<(), OverlayError> {
    if virtual_bytes == 0 || !virtual_bytes.is_multiple_of(512) || virtual_bytes > MAX_BYTES {
        return Err(OverlayError::Size(virtual_bytes));
    }
    let failed = |source| OverlayError::File {
        path: path.to_owned(),
        source,
    };
    let layout = Layout::of(virtual_bytes);
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let written = file
        .set_len(layout.clusters * CLUSTER)
        .and_then(|()| file.write_all_at(&header(virtual_bytes, layout.l1_entries, 3 * CLUSTER), 0))
        .and_then(|()| file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER))
        .and_then(|()| file.write_all_at(&layout.refcounts(), 2 * CLUSTER));
    written.map_err(|source| {
        // A half-made layer helps nobody; what matters is the error that is reported.
        let _ = std::fs::remove_file(path);
        failed(source)
    })
}

/// Size of the disk that a layer holds, from its header; `None` if it is no such layer.
pub(crate) fn virtual_bytes(file: &File) -> io::Result<Option<u64>> {
    let mut header = [0; 32];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let size = header.last_chunk().copied().map(u64::from_be_bytes);
    Ok(size.filter(|_| header.starts_with(b"QFI\xfb")))
}

/// The version 3 header, 104 bytes, and the end of the header extensions. The refcount table is
/// the second cluster.
fn header(virtual_bytes: u64, l1_entries: u32, l1_at: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(112);
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3u32.to_be_bytes()); // version
    header.extend_from_slice(&0u64.to_be_bytes()); // backing file: none
    header.extend_from_slice(&0u32.to_be_bytes()); // length of its name
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&virtual_bytes.to_be_bytes());
    header.extend_from_slice(&0u32.to_be_bytes()); // encryption: none
    header.extend_from_slice(&l1_entries.to_be_bytes());
    header.extend_from_slice(&l1_at.to_be_bytes());
    header.extend_from_slice(&CLUSTER.to_be_bytes()); // refcount table
    header.extend_from_slice(&1u32.to_be_bytes()); // its clusters
    header.extend_from_slice(&0u32.to_be_bytes()); // internal snapshots
    header.extend_from_slice(&0u64.to_be_bytes());
    header.extend_from_slice(&[0; 24]); // incompatible, compatible, autoclear features
    header.extend_from_slice(&4u32.to_be_bytes()); // refcounts of 2⁴ bits
    header.extend_from_slice(&104u32.to_be_bytes()); // header length
    header.extend_from_slice(&[0; 8]); // no extension follows
    header
}

/// Clusters: 0 header, 1 refcount table, 2 refcount block, 3… L1 table.
struct Layout {
    l1_entries: u32,
    clusters: u64,
}

impl Layout {
    fn of(virtual_bytes: u64) -> Layout {
        // At most 32,768 entries for MAX_BYTES.
        let l1_entries = virtual_bytes.div_ceil(L1_COVERS) as u32;
        let clusters = 3 + (u64::from(l1_entries) * 8).div_ceil(CLUSTER);
        debug_assert!(clusters <= REFCOUNTS_PER_BLOCK);
        Layout {
            l1_entries,
            clusters,
        }
    }

    fn refcounts(&self) -> Vec<u8> {
        1u16.to_be_bytes().repeat(self.clusters as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn qemu_img(args: &[&str]) -> String {
        let output = Command::new("qemu-img").args(args).output().unwrap();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn qemu_img_accepts_layers_of_all_sizes() {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [512, 2 << 30, (2 << 30) + 512, 512 << 30, 5 << 40, MAX_BYTES] {
            let path = dir.path().join(format!("{bytes}.qcow2"));
            create_overlay(&path, bytes).unwrap();
            let layer = File::open(&path).unwrap();
            assert_eq!(virtual_bytes(&layer).unwrap(), Some(bytes));
            let path = path.to_str().unwrap();
            let check = qemu_img(&["check", "--output=json", path]);
            let check: serde_json::Value = serde_json::from_str(&check).unwrap();
            assert_eq!(check["check-errors"], 0);
            assert!(check.get("leaks").is_none() && check.get("corruptions").is_none());
            let info = qemu_img(&["info", "--output=json", path]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], bytes);
            assert!(info.get("backing-filename").is_none());
            assert!(info["actual-size"].as_u64().unwrap() <= 16 << 10, "{info}");
        }
    }

    #[test]
    fn data_written_to_a_layer_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.qcow2");
        create_overlay(&path, 1 << 30).unwrap();
        let path = path.to_str().unwrap();
        for args in [
            "write -P 7 900M 1M",
            "read -P 7 900M 1M",
            "read -P 0 899M 1M",
        ] {
            let output = Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", args, path])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success() && !text.contains("failed"),
                "{text}"
            );
        }
        qemu_img(&["check", path]);
    }

    #[test]
    fn impossible_sizes_and_existing_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.qcow2");
        for bytes in [0, 511, MAX_BYTES + 512] {
            assert!(matches!(
                create_overlay(&path, bytes),
                Err(OverlayError::Size(_))
            ));
        }
        create_overlay(&path, 512).unwrap();
        assert!(matches!(
            create_overlay(&path, 512),
            Err(OverlayError::File { .. })
        ));
    }
}
