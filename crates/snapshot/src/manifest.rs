//! The file `manifest`: what a snapshot consists of and what a restore depends on.
//!
//! One line of text with version, length and digest, then JSON. The snapshot's name is the
//! digest of the whole file, so that a manifest in another's place shows too.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use wrenn_types::Shape;

use crate::map::PageCounts;
use crate::page::MAX_PAGES;
use crate::{BaseId, Digest, Fault, ObjectId, Result, SnapshotError, SnapshotId};

/// First word of the file.
const MAGIC: &str = "wrenn-snapshot";
/// Version of the format.
const VERSION: u32 = 2;
/// The version before: all its disk layers have the plain digest.
const BEFORE: u32 = 1;
/// A larger manifest is not read.
pub(crate) const MAX_BYTES: u64 = 1 << 20;
/// A larger device state or additional part is neither written nor read: they are kept in
/// memory. QEMU's take some tens of KiB.
pub(crate) const MAX_PART_BYTES: u64 = 64 << 20;

/// A file of a snapshot: its length and digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Length in bytes.
    pub bytes: u64,
    /// Digest of the content.
    pub blake3: Digest,
}

impl Part {
    /// Length and digest of `content`.
    pub fn of(content: &[u8]) -> Part {
        Part {
            bytes: content.len() as u64,
            blake3: Digest::of(content),
        }
    }
}

/// Name of an additional part, such as `firmware`: also its file's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PartName(String);

impl PartName {
    /// 1 to 64 of `a-z`, `0-9`, `-`, `_`, and `.` inside.
    pub fn new(name: &str) -> Result<PartName> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.');
        let fits = (1..=64).contains(&name.len())
            && name.bytes().all(allowed)
            && !name.starts_with('.')
            && !name.ends_with('.');
        match fits {
            true => Ok(PartName(name.to_owned())),
            false => Err(SnapshotError::Name(name.chars().take(80).collect())),
        }
    }

    /// Name of the part's file. The prefix keeps it apart from the format's own files.
    pub(crate) fn file_name(&self) -> String {
        format!("part.{}", self.0)
    }
}

impl fmt::Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for PartName {
    type Error = SnapshotError;

    fn try_from(name: String) -> Result<Self> {
        PartName::new(&name)
    }
}

impl From<PartName> for String {
    fn from(name: PartName) -> String {
        name.0
    }
}

/// The monitor a snapshot was taken with. A state loads only in an equal one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vmm {
    /// Which driver: `qemu`, `firecracker`.
    pub driver: String,
    /// Version of the program.
    pub version: String,
    /// All else that has to be equal for a restore, as the driver sees fit: CPU model,
    /// machine, devices, clock rates. Only compared here.
    pub fingerprint: serde_json::Value,
}

/// What the guest was booted from, by digests; opaque here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The template it descends from.
    pub template: Option<String>,
    /// The image, whose root file system is below all disk layers.
    pub image: String,
    /// The kernel.
    pub kernel: String,
    /// The guest agent's version.
    pub envd_version: String,
}

/// A generation that holds pages of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationPart {
    /// Its name.
    pub id: ObjectId,
    /// Bytes of its file.
    pub bytes: u64,
}

/// The memory of a frozen machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPart {
    /// What inherited pages are inherited from.
    pub base: Option<BaseId>,
    /// The file `memory.index`.
    pub index: Part,
    /// The generations, in the order of the index.
    pub generations: Vec<GenerationPart>,
    /// How many pages are what.
    pub pages: PageCounts,
}

/// A frozen machine, as opposed to a disk alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachinePart {
    /// Guest memory.
    pub memory: MemoryPart,
    /// The file `device.state`: processors and devices, as the monitor saved them.
    pub device_state: Part,
    /// Whatever else has to be put back, such as firmware segments outside the memory.
    pub parts: BTreeMap<PartName, Part>,
}

/// Of what the name of a disk layer is the digest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerDigest {
    /// Of the file, as `b3sum` prints it. Layers of version 1, which say nothing about it.
    #[default]
    Plain,
    /// Of its length and what in it is not zero; see `docs/snapshot-format.md`.
    Sparse,
}

impl LayerDigest {
    fn is_plain(&self) -> bool {
        *self == LayerDigest::Plain
    }
}

/// A layer of the disk: an immutable object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLayer {
    /// Its name: a digest of the file.
    pub id: ObjectId,
    /// Bytes of the file.
    pub bytes: u64,
    /// What it is: `qcow2`, `raw`, `dm-snapshot`.
    pub format: String,
    /// Which digest its name is.
    #[serde(default, skip_serializing_if = "LayerDigest::is_plain")]
    pub digest: LayerDigest,
}

/// What the maker of a snapshot knows about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// When the machine was frozen, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Processors and memory, fixed for good.
    pub shape: Shape,
    /// What the guest was booted from.
    pub origin: Origin,
    /// The monitor.
    pub vmm: Vmm,
    /// Free for the maker: shown, never interpreted here.
    pub labels: BTreeMap<String, String>,
}

/// What a snapshot is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// What its maker said.
    pub description: Description,
    /// The snapshots it was made from.
    pub parents: Vec<SnapshotId>,
    /// The snapshot with the same content and more generations that this one replaces.
    pub merged_from: Option<SnapshotId>,
    /// The frozen machine; `None` if only its disk was saved.
    pub machine: Option<MachinePart>,
    /// Layers of the disk over the image's root file system, the lowest first.
    pub disk: Vec<DiskLayer>,
}

impl Manifest {
    /// The bytes of the file, and the snapshot's name.
    pub fn to_bytes(&self) -> Result<(Vec<u8>, SnapshotId)> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| SnapshotError::Incomplete(error.to_string()))?;
        let digest = Digest::of(json.as_bytes());
        let version = self.version();
        let bytes = format!("{MAGIC} {version} {} {digest}\n{json}", json.len()).into_bytes();
        if bytes.len() as u64 > MAX_BYTES {
            let problem = format!("its manifest would take {} bytes", bytes.len());
            return Err(SnapshotError::Incomplete(problem));
        }
        let id = SnapshotId(Digest::of(&bytes).0);
        Ok((bytes, id))
    }

    /// The oldest that can say it: a store stays readable for as long as it can be.
    fn version(&self) -> u32 {
        match self.disk.iter().all(|layer| layer.digest.is_plain()) {
            true => BEFORE,
            false => VERSION,
        }
    }

    /// Reads the manifest called `id`, believing nothing in it.
    pub fn parse(bytes: &[u8], id: SnapshotId) -> Result<Manifest, Fault> {
        if Digest::of(bytes).0 != id.0 {
            return Err(Fault::at(
                0,
                "the manifest is not the one its folder is named after: changed, or another's",
            ));
        }
        Self::parse_any(bytes)
    }

    /// The part of [`Manifest::parse`] behind the first digest.
    pub(crate) fn parse_any(bytes: &[u8]) -> Result<Manifest, Fault> {
        let text = std::str::from_utf8(bytes)
            .map_err(|error| Fault::at(error.valid_up_to() as u64, "not text"))?;
        let (head, json) = text
            .split_once('\n')
            .ok_or_else(|| Fault::at(0, "not a manifest"))?;
        let mut words = head.split(' ');
        let (magic, version) = (words.next(), words.next());
        if magic != Some(MAGIC) {
            return Err(Fault::at(0, "not a manifest"));
        }
        let found = version.and_then(|version| version.parse().ok());
        let version = match found {
            Some(version @ (BEFORE | VERSION)) => version,
            Some(found) => {
                return Err(Fault::Version {
                    found,
                    known: VERSION,
                });
            }
            None => return Err(Fault::at(0, "not a manifest")),
        };
        // Compared as text, so that there is one spelling.
        let digest = Digest::of(json.as_bytes());
        if head != format!("{MAGIC} {version} {} {digest}", json.len()) {
            return Err(Fault::at(0, "the content does not match its checksum"));
        }
        let manifest: Manifest = serde_json::from_str(json)
            .map_err(|error| Fault::at(head.len() as u64 + 1, error.to_string()))?;
        if manifest.version() != version {
            return Err(Fault::at(0, "a version that its content does not need"));
        }
        manifest.check()?;
        Ok(manifest)
    }

    /// What no type says.
    fn check(&self) -> Result<(), Fault> {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        let memory = &machine.memory;
        let pages = self.description.shape.memory.bytes() / crate::PAGE as u64;
        let counts = memory.pages;
        let sum = counts
            .inherited
            .checked_add(counts.zero)
            .and_then(|sum| sum.checked_add(counts.data));
        if pages == 0 || pages > MAX_PAGES || sum != Some(pages) {
            return Err(Fault::at(0, "pages that do not add up to the memory"));
        }
        if memory.index.bytes > crate::index::largest(pages) {
            return Err(Fault::at(0, "a memory index larger than any can be"));
        }
        let parts = machine.parts.values().chain([&machine.device_state]);
        if parts.clone().any(|part| part.bytes > MAX_PART_BYTES) {
            return Err(Fault::at(0, "a device state larger than any can be"));
        }
        Ok(())
    }

    /// All objects the snapshot needs.
    pub fn objects(&self) -> impl Iterator<Item = ObjectFile> + '_ {
        let memory = self.machine.iter().flat_map(|machine| {
            let generations = machine.memory.generations.iter();
            generations.map(|generation| ObjectFile::Generation(generation.id))
        });
        memory.chain(self.disk.iter().map(|layer| ObjectFile::Disk(layer.id)))
    }

    /// Whether the snapshot can become a machine of `asked`: only if that is its own shape.
    pub fn require_shape(&self, asked: Shape) -> Result<()> {
        let has = self.description.shape;
        match asked == has {
            true => Ok(()),
            false => Err(SnapshotError::Shape { asked, has }),
        }
    }
}

/// An immutable object of the store, and what kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectFile {
    /// Memory.
    Generation(ObjectId),
    /// A layer of a disk.
    Disk(ObjectId),
}

impl ObjectFile {
    /// Its file's name.
    pub(crate) fn file_name(self) -> String {
        match self {
            ObjectFile::Generation(id) => format!("{id}.memory"),
            ObjectFile::Disk(id) => format!("{id}.disk"),
        }
    }

    /// The object a file's name stands for.
    pub(crate) fn from_file_name(name: &str) -> Option<ObjectFile> {
        let (id, kind) = name.split_once('.')?;
        let id = id.parse().ok()?;
        match kind {
            "memory" => Some(ObjectFile::Generation(id)),
            "disk" => Some(ObjectFile::Disk(id)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use wrenn_types::{MemoryMib, Vcpus};

    fn sample() -> Manifest {
        let part = Part::of(b"x");
        Manifest {
            description: Description {
                created_unix_ms: 1,
                shape: Shape {
                    vcpus: Vcpus(2),
                    memory: MemoryMib(1),
                },
                origin: Origin {
                    template: None,
                    image: "sha256-1".into(),
                    kernel: "sha256-2".into(),
                    envd_version: "0.6.2".into(),
                },
                vmm: Vmm {
                    driver: "qemu".into(),
                    version: "7.2".into(),
                    fingerprint: serde_json::json!({"cpu": "max", "tsc_khz": 2_500_000}),
                },
                labels: BTreeMap::from([("name".into(), "é\n".into())]),
            },
            parents: vec![SnapshotId([1; 32])],
            merged_from: None,
            machine: Some(MachinePart {
                memory: MemoryPart {
                    base: Some(BaseId([2; 32])),
                    index: part,
                    generations: vec![GenerationPart {
                        id: ObjectId([3; 32]),
                        bytes: 9,
                    }],
                    pages: PageCounts {
                        inherited: 200,
                        zero: 50,
                        data: 6,
                    },
                },
                device_state: part,
                parts: BTreeMap::from([(PartName("firmware".into()), part)]),
            }),
            disk: vec![DiskLayer {
                id: ObjectId([4; 32]),
                bytes: 8,
                format: "qcow2".into(),
                digest: LayerDigest::Sparse,
            }],
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let (bytes, id) = sample().to_bytes().unwrap();
        assert_eq!(Manifest::parse(&bytes, id), Ok(sample()));
        assert!(bytes.starts_with(b"wrenn-snapshot 2 "));
    }

    #[test]
    fn a_manifest_of_the_version_before_is_read() {
        let mut before = sample();
        before.disk[0].digest = LayerDigest::Plain;
        let (bytes, id) = before.to_bytes().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.starts_with("wrenn-snapshot 1 ") && !text.contains("\"digest\""));
        assert_eq!(Manifest::parse(&bytes, id), Ok(before));
        // Each manifest has one spelling.
        let other = text.replacen(" 1 ", " 2 ", 1);
        assert!(Manifest::parse_any(other.as_bytes()).is_err());
    }

    #[test]
    fn g11_another_shape_is_refused_with_both() {
        let mut asked = sample().description.shape;
        assert!(sample().require_shape(asked).is_ok());
        asked.vcpus = Vcpus(1);
        let error = sample().require_shape(asked).unwrap_err().to_string();
        assert!(
            error.contains("2 vCPU, 1 MiB") && error.contains("1 vCPU, 1 MiB"),
            "{error}"
        );
        asked = sample().description.shape;
        asked.memory = MemoryMib(2);
        assert!(sample().require_shape(asked).is_err());
    }

    #[test]
    fn g16_every_flipped_bit_and_every_cut_of_a_manifest_shows_even_without_its_name() {
        let (bytes, id) = sample().to_bytes().unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(Manifest::parse(&flipped, id).is_err());
                assert!(Manifest::parse_any(&flipped).is_err(), "{at} {bit}");
            }
            assert!(Manifest::parse_any(&bytes[..at]).is_err());
        }
        assert!(Manifest::parse(&bytes, SnapshotId([0; 32])).is_err());
    }

    #[test]
    fn names_of_parts_cannot_leave_the_folder() {
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "A",
            "x\0",
            "é",
            ".x",
            "x.",
            &"x".repeat(65),
        ] {
            assert!(PartName::new(name).is_err(), "{name:?}");
        }
        assert!(PartName::new("firmware-0xf0000.bin").is_ok());
    }

    /// A manifest with right checksums around `json`.
    fn sealed(json: &str) -> Vec<u8> {
        let digest = Digest::of(json.as_bytes());
        format!("{MAGIC} {VERSION} {} {digest}\n{json}", json.len()).into_bytes()
    }

    #[test]
    fn another_version_is_named() {
        let (bytes, _) = sample().to_bytes().unwrap();
        let newer = String::from_utf8(bytes)
            .unwrap()
            .replacen(" 2 ", " 3 ", 1)
            .into_bytes();
        let id = SnapshotId(Digest::of(&newer).0);
        assert_eq!(
            Manifest::parse(&newer, id),
            Err(Fault::Version { found: 3, known: 2 })
        );
    }

    #[test]
    fn impossible_contents_are_refused_under_right_checksums() {
        let mut wrong = sample();
        if let Some(machine) = &mut wrong.machine {
            machine.memory.pages.inherited = u64::MAX;
        }
        assert!(Manifest::parse_any(&wrong.to_bytes().unwrap().0).is_err());
        let mut wrong = sample();
        if let Some(machine) = &mut wrong.machine {
            machine.memory.index.bytes = u64::MAX;
        }
        assert!(Manifest::parse_any(&wrong.to_bytes().unwrap().0).is_err());
        let json = serde_json::to_string(&sample()).unwrap();
        let unknown = json.replacen("{", "{\"later\":1,", 1);
        assert!(Manifest::parse_any(&sealed(&unknown)).is_err());
        let escaping = json.replace("firmware", "../../x");
        assert!(Manifest::parse_any(&sealed(&escaping)).is_err());
        assert!(Manifest::parse_any(&sealed(&"[".repeat(100_000))).is_err());
    }

    proptest! {
        #[test]
        fn numbers_of_a_fingerprint_are_written_as_they_were_read(
            number in proptest::num::f64::NORMAL | proptest::num::f64::SUBNORMAL
        ) {
            let mut manifest = sample();
            manifest.description.vmm.fingerprint = serde_json::json!({ "clock": number });
            let (bytes, id) = manifest.to_bytes().unwrap();
            let read = Manifest::parse(&bytes, id);
            prop_assert_eq!(read.as_ref(), Ok(&manifest));
            prop_assert_eq!(read.unwrap().to_bytes().unwrap(), (bytes, id));
        }

        #[test]
        fn arbitrary_text_never_panics(
            json in ".{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            prop_assert!(Manifest::parse_any(&sealed(&json)).is_err());
            prop_assert!(Manifest::parse_any(&bytes).is_err());
        }
    }
}
