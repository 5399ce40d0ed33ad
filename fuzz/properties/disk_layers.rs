//! Merging layers of a disk: a damaged one is an error that leaves nothing, and what is made
//! of those that pass is no larger than they are, and merges into itself.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::ThreadId;

use super::qcow2::{create_overlay, merge_layers};

const CLUSTER: u64 = 64 << 10;
/// Bytes of the disk: two tables of the second level.
const DISK: u64 = (512 << 20) + 512;
/// Clusters of a layer; an empty one has four.
const CLUSTERS: u64 = 12;

/// A file of this process and thread, in memory.
fn path(name: &str) -> PathBuf {
    let thread: ThreadId = std::thread::current().id();
    let file = format!("wrenn-fuzz-{}-{thread:?}-{name}", std::process::id());
    Path::new("/dev/shm").join(file)
}

/// An empty layer with changes. Each is where (a cluster, and in it a multiple of 8 bytes), how
/// many bytes, and the bytes.
fn layer(changes: &[u8]) -> File {
    let path = path("layer");
    create_overlay(&path, DISK).expect("an empty layer");
    let options = OpenOptions::new().read(true).write(true).open(&path);
    std::fs::remove_file(&path).expect("it is there");
    let file = options.expect("it is there");
    file.set_len(CLUSTERS * CLUSTER).expect("room");
    let mut rest = changes;
    while let [cluster, high, low, length, behind @ ..] = rest {
        let (bytes, more) = behind.split_at(usize::from(length % 16).min(behind.len()));
        let cluster = u64::from(*cluster) % CLUSTERS;
        let at = u64::from(u16::from_be_bytes([*high, *low]) % (CLUSTER / 8) as u16) * 8;
        file.write_all_at(bytes, cluster * CLUSTER + at)
            .expect("room");
        rest = more;
    }
    file
}

fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = File::open(path).expect("the merged layer");
    file.read_to_end(&mut bytes).expect("it is readable");
    bytes
}

/// How many bytes belong to the first layer, and the changes of two layers.
pub fn check(data: &[u8]) {
    let Some((first, changes)) = data.split_first() else {
        return;
    };
    let (first, second) = changes.split_at(usize::from(*first).min(changes.len()));
    let layers = [layer(first), layer(second)];
    let (one, two) = (path("one"), path("two"));
    let mut last = 0;
    let merged = merge_layers(&[&layers[0], &layers[1]], &one, &mut |done| {
        last = done;
        true
    });
    if let Err(error) = merged {
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
        assert!(!one.exists(), "something is left of a merge that failed");
        return;
    }
    let bytes = read(&one);
    // Header and tables, which for the largest disk take four more, and what the layers have.
    assert!(last <= 2 * CLUSTERS * CLUSTER);
    assert!(bytes.len() as u64 <= (2 * CLUSTERS + 8) * CLUSTER);
    let again = merge_layers(&[&File::open(&one).expect("it")], &two, &mut |_| true);
    again.expect("a merged layer is one as any");
    assert!(read(&two) == bytes, "merged again it is another");
    for path in [one, two] {
        std::fs::remove_file(path).expect("it is there");
    }
}
