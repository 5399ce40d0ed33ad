//! Several layers of a disk as one.
//!
//! A layer says of each cluster of the disk that it holds its content, that it is zero, or
//! nothing, and then the layer below is asked. Of merged layers the highest that says
//! something counts, and what none says anything about is left to the layers below them.
//! Format: QEMU's `docs/interop/qcow2.txt`. What QEMU does not write into layers of ours
//! (compression, encryption, internal snapshots, other cluster sizes) is refused.
//!
//! A guest that has taken its QEMU over has written the layer. So a layer may name no more
//! clusters than it has: few that are named again and again would become a layer that fills
//! the host's disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{CLUSTER, CLUSTER_BITS, L1_COVERS, MAX_BYTES, REFCOUNTS_PER_BLOCK};

/// Where an entry of a table points to.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster has no other user, so it may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Of an entry of an L2 table: the cluster is zero, wherever the entry points to.
const ZERO: u64 = 1;
/// Entries of an L2 table.
const L2_ENTRIES: usize = (CLUSTER / 8) as usize;

/// What a layer says of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cluster {
    /// Ask below.
    Below,
    Zero,
    /// Its content is at this offset of the file.
    At(u64),
}

/// A layer that is read.
struct Layer<'a> {
    file: &'a File,
    length: u64,
    l1: Vec<u64>,
    /// Clusters that it may still name.
    unnamed: u64,
}

fn damaged(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Reads from a file behind whose end there is nothing but zeros.
fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64) {
            Ok(0) => {
                into[done..].fill(0);
                break;
            }
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_table(file: &File, entries: usize, at: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; entries * 8];
    read_at(file, &mut bytes, at)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(words.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

impl Layer<'_> {
    /// Reads header and L1 table, believing nothing in them. The disk has so many bytes.
    fn open(file: &File) -> io::Result<(Layer<'_>, u64)> {
        let length = file.metadata()?.len();
        let mut header = [0; 104];
        if length < header.len() as u64 {
            return Err(damaged("it ends inside its header"));
        }
        file.read_exact_at(&mut header, 0)?;
        let word = |at: usize| header[at..].first_chunk().copied().map(u32::from_be_bytes);
        let long = |at: usize| header[at..].first_chunk().copied().map(u64::from_be_bytes);
        let expect = |what: &str, found: Option<u64>, expected: u64| match found {
            Some(found) if found == expected => Ok(()),
            found => Err(damaged(format!("{what} is {found:?}, not {expected}"))),
        };
        let short = |at| word(at).map(u64::from);
        expect("its mark", short(0), 0x5146_49fb)?;
        expect("its version", short(4), 3)?;
        expect("its backing file", long(8), 0)?;
        expect("its cluster size", short(20), u64::from(CLUSTER_BITS))?;
        expect("its encryption", short(32), 0)?;
        expect("its number of snapshots", short(60), 0)?;
        // Among them: dirty refcounts, corruption, a data file, larger L2 entries.
        expect("its set of features", long(72), 0)?;
        let disk = long(24).filter(|bytes| (1..=MAX_BYTES).contains(bytes));
        let disk = disk.ok_or_else(|| damaged("its size is impossible"))?;
        let entries = disk.div_ceil(L1_COVERS);
        let has = short(36).filter(|has| (entries..=MAX_BYTES / L1_COVERS).contains(has));
        let at = long(40).filter(|at| at.is_multiple_of(CLUSTER) && *at < length);
        let (Some(_), Some(at)) = (has, at) else {
            return Err(damaged("its L1 table is not where or what it must be"));
        };
        // At most 32,768 for MAX_BYTES.
        let l1 = read_table(file, entries as usize, at)?;
        let layer = Layer {
            file,
            length,
            l1,
            unnamed: length.div_ceil(CLUSTER),
        };
        Ok((layer, disk))
    }

    /// What the layer says of the clusters under the L1 entry of this number; `None`: nothing.
    fn clusters(&mut self, l1_index: usize) -> io::Result<Option<Vec<Cluster>>> {
        let at = self.l1.get(l1_index).map_or(0, |entry| entry & OFFSET);
        if at == 0 {
            return Ok(None);
        }
        self.name(at)?;
        let entries = read_table(self.file, L2_ENTRIES, at)?;
        let cluster = |entry: u64| match entry & OFFSET {
            _ if entry & COMPRESSED != 0 => Err(damaged("a cluster is compressed")),
            _ if entry & ZERO != 0 => Ok(Cluster::Zero),
            0 => Ok(Cluster::Below),
            at => self.name(at).map(|()| Cluster::At(at)),
        };
        entries
            .into_iter()
            .map(cluster)
            .collect::<io::Result<_>>()
            .map(Some)
    }

    /// Something is said to be in the cluster at `at`.
    fn name(&mut self, at: u64) -> io::Result<()> {
        if !at.is_multiple_of(CLUSTER) || at >= self.length {
            return Err(damaged(format!("something is said to be at {at:#x}")));
        }
        let left = self.unnamed.checked_sub(1);
        self.unnamed = left.ok_or_else(|| damaged("it names more clusters than it has"))?;
        Ok(())
    }
}

/// Writes what `layers`, the lowest first, say together into a new layer at `path`, which must
/// not exist. `go_on` is asked after each cluster of content, with the bytes written so far;
/// if it says no, nothing is left and the error is of the kind `Interrupted`. Not synced.
///
/// A layer that is not as QEMU makes them is an error of the kind `InvalidData`. Blocking.
pub fn merge_layers(
    layers: &[&File],
    path: &Path,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> io::Result<()> {
    let mut opened = Vec::with_capacity(layers.len());
    let mut disk = None;
    for file in layers {
        let (layer, bytes) = Layer::open(file)?;
        if disk.is_some_and(|disk| disk != bytes) {
            return Err(damaged("the layers are of disks of different sizes"));
        }
        disk = Some(bytes);
        opened.push(layer);
    }
    let disk = disk.ok_or_else(|| damaged("there is no layer to merge"))?;
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = write_merged(&mut opened, disk, &file, go_on);
    if written.is_err() {
        // A half-made layer helps nobody; what matters is the error that is reported.
        let _ = std::fs::remove_file(path);
    }
    written
}

/// Clusters of the new file: 0 header, 1 refcount table, 2… L1 table, then each L2 table behind
/// the content it points to, and refcount blocks at the end, when their number is known.
fn write_merged(
    layers: &mut [Layer<'_>],
    disk: u64,
    file: &File,
    go_on: &mut dyn FnMut(u64) -> bool,
) -> io::Result<()> {
    let l1_entries = disk.div_ceil(L1_COVERS);
    let mut l1 = Vec::with_capacity(l1_entries as usize);
    let mut used = 2 + (l1_entries * 8).div_ceil(CLUSTER);
    let mut content = vec![0; CLUSTER as usize];
    let mut done = 0;
    for index in 0..l1_entries as usize {
        let mut said = Vec::with_capacity(layers.len());
        for layer in layers.iter_mut().rev() {
            if let Some(clusters) = layer.clusters(index)? {
                said.push((layer.file, clusters));
            }
        }
        if said.is_empty() {
            l1.push(0);
            continue;
        }
        let mut l2 = Vec::with_capacity(CLUSTER as usize);
        for number in 0..L2_ENTRIES {
            let highest = said
                .iter()
                .find_map(|(file, clusters)| match clusters[number] {
                    Cluster::Below => None,
                    cluster => Some((*file, cluster)),
                });
            let entry = match highest {
                None | Some((_, Cluster::Below)) => 0,
                Some((_, Cluster::Zero)) => ZERO,
                Some((from, Cluster::At(at))) => {
                    read_at(from, &mut content, at)?;
                    match crate::runs::is_zero(&content) {
                        true => ZERO,
                        false => {
                            let to = used * CLUSTER;
                            file.write_all_at(&content, to)?;
                            used += 1;
                            done += CLUSTER;
                            if !go_on(done) {
                                return Err(io::ErrorKind::Interrupted.into());
                            }
                            to | COPIED
                        }
                    }
                }
            };
            l2.extend_from_slice(&entry.to_be_bytes());
        }
        if crate::runs::is_zero(&l2) {
            // Tables that say nothing, of which a file with holes can have any number.
            l1.push(0);
            continue;
        }
        file.write_all_at(&l2, used * CLUSTER)?;
        l1.push((used * CLUSTER) | COPIED);
        used += 1;
    }
    let l1: Vec<u8> = l1.into_iter().flat_map(u64::to_be_bytes).collect();
    file.write_all_at(&l1, 2 * CLUSTER)?;

    let mut blocks = 1;
    while blocks * REFCOUNTS_PER_BLOCK < used + blocks {
        blocks += 1;
    }
    // Cluster 1 is the table of them.
    if blocks > CLUSTER / 8 {
        return Err(damaged("together they are larger than a layer can be"));
    }
    let table: Vec<u8> = (used..used + blocks)
        .flat_map(|block| (block * CLUSTER).to_be_bytes())
        .collect();
    file.write_all_at(&table, CLUSTER)?;
    let counts = 1u16.to_be_bytes().repeat((used + blocks) as usize);
    file.set_len((used + blocks) * CLUSTER)?;
    file.write_all_at(&counts, used * CLUSTER)?;
    file.write_all_at(&super::header(disk, l1_entries as u32, 2 * CLUSTER), 0)
}

#[cfg(test)]
mod tests {
    use super::super::create_overlay;
    use super::*;
    use std::path::PathBuf;
    use std::process::Command;

    use proptest::prelude::*;

    const DISK: u64 = (600 << 20) + 512;

    fn run(program: &str, args: &[&str]) -> String {
        let output = Command::new(program).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && !text.contains("failed"),
            "{program} {args:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// A new layer in which QEMU has done these things.
    fn layer(dir: &Path, name: &str, commands: &[String]) -> PathBuf {
        let path = dir.join(name);
        create_overlay(&path, DISK).unwrap();
        let mut args = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(path.to_str().unwrap());
        run("qemu-io", &args);
        path
    }

    fn merged(paths: &[PathBuf], to: &Path) -> io::Result<()> {
        let files: Vec<_> = paths.iter().map(|path| File::open(path).unwrap()).collect();
        merge_layers(&files.iter().collect::<Vec<_>>(), to, &mut |_| true)
    }

    /// What QEMU reads through this chain of layers over a base.
    fn chain(base: &Path, layers: &[PathBuf]) -> String {
        let mut node = format!(
            "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
            base.display()
        );
        for layer in layers {
            let below = node.trim_start_matches("json:").to_owned();
            node = format!(
                "json:{{\"driver\":\"qcow2\",\"backing\":{below},\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
                layer.display()
            );
        }
        node
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn g17_merged_layers_read_as_the_chain_they_were(
            writes in proptest::collection::vec(
                proptest::collection::vec((0u64..600, 1u64..300, 0u8..3), 0..6), 1..5),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("base.raw");
            File::create(&base).unwrap().set_len(DISK).unwrap();
            run("qemu-io", &["-f", "raw", "-c", "write -P 9 0 600M", base.to_str().unwrap()]);
            let mut layers = Vec::new();
            for (number, writes) in writes.iter().enumerate() {
                let commands: Vec<_> = writes.iter().map(|(at, kib, kind)| match kind {
                    // In pieces of a cluster, which QEMU completes from nothing: these layers
                    // are written without the one below, so whole clusters only.
                    0 => format!("write -P {} {}M {}k", number + 1, at, kib.next_multiple_of(64).min(1024)),
                    1 => format!("write -z {}M {}k", at, kib.next_multiple_of(64).min(1024)),
                    _ => format!("write -P 0 {}M 64k", at),
                }).collect();
                layers.push(layer(dir.path(), &format!("{number}"), &commands));
            }
            let one = dir.path().join("merged");
            merged(&layers, &one).unwrap();
            let check = run("qemu-img", &["check", "--output=json", one.to_str().unwrap()]);
            let check: serde_json::Value = serde_json::from_str(&check).unwrap();
            prop_assert_eq!(&check["check-errors"], 0);
            prop_assert!(check.get("leaks").is_none() && check.get("corruptions").is_none(), "{}", check);
            let (before, after) = (chain(&base, &layers), chain(&base, &[one]));
            run("qemu-img", &["compare", &before, &after]);
        }
    }

    #[test]
    fn a_merged_layer_is_written_to_as_any() {
        let dir = tempfile::tempdir().unwrap();
        let a = layer(dir.path(), "a", &["write -P 1 0 1M".into()]);
        let b = layer(dir.path(), "b", &["write -P 2 1M 1M".into()]);
        let one = dir.path().join("merged");
        merged(&[a, b], &one).unwrap();
        let text = one.to_str().unwrap();
        for command in [
            "write -P 3 512k 1M",
            "read -P 1 0 512k",
            "read -P 3 512k 1M",
            "read -P 2 1536k 512k",
        ] {
            run("qemu-io", &["-f", "qcow2", "-c", command, text]);
        }
        run("qemu-img", &["check", text]);
    }

    #[test]
    fn what_is_no_layer_of_ours_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let good = layer(dir.path(), "good", &["write -P 1 0 1M".into()]);
        let bytes = std::fs::read(&good).unwrap();
        let l1 = (u64::from_be_bytes(bytes[40..48].try_into().unwrap())) as usize;
        let l2 = (u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & OFFSET) as usize;
        let out = dir.path().join("out");
        // Mark, version, backing file, cluster size, size, encryption, L1 size and place,
        // snapshots, features; then the tables' entries: compressed, unaligned, far away.
        let header = [0, 7, 15, 23, 24, 35, 36, 40, 63, 79].map(|at| (at, 0x41));
        let tables = [(l1 + 1, 0x41), (l2, 0xC0), (l2 + 6, 0x02), (l2 + 1, 0x41)];
        for (at, value) in header.into_iter().chain(tables) {
            let mut wrong = bytes.clone();
            wrong[at] = value;
            let path = dir.path().join("wrong");
            std::fs::write(&path, wrong).unwrap();
            let error = merged(&[good.clone(), path], &out).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{at}: {error}");
            assert!(!out.exists());
        }
        // Each table and cluster again and again.
        let mut wrong = bytes.clone();
        for entry in wrong[l2..l2 + CLUSTER as usize].chunks_exact_mut(8) {
            entry.copy_from_slice(&bytes[l2..l2 + 8]);
        }
        let path = dir.path().join("repeated");
        std::fs::write(&path, wrong).unwrap();
        let error = merged(&[path], &out).unwrap_err().to_string();
        assert!(error.contains("more clusters than it has"), "{error}");
        assert!(!out.exists());
        let path = dir.path().join("short");
        std::fs::write(&path, &bytes[..100]).unwrap();
        assert!(merged(&[path], &out).is_err());
        let other = dir.path().join("other");
        create_overlay(&other, DISK + 512).unwrap();
        assert!(merged(&[good.clone(), other], &out).is_err());
        assert!(merged(&[], &out).is_err());
        let file = File::open(&good).unwrap();
        let given_up = merge_layers(&[&file], &out, &mut |_| false).unwrap_err();
        assert_eq!(given_up.kind(), io::ErrorKind::Interrupted);
        assert!(!out.exists());
    }
}
