//! The file `memory.index`: a [`PageMap`] as bytes. See `docs/snapshot-format.md`.

use crate::bytes::{array, put, u32_at, u64_at};
use crate::map::{Extent, GenerationRef, PageMap, Source};
use crate::page::{MAX_PAGES, PAGE, PageRange};
use crate::{BaseId, Digest, Fault, ObjectId};

/// First bytes of the file.
const MAGIC: &[u8; 8] = b"WRENNMAP";
/// Version of the format.
const VERSION: u32 = 1;

const AT_VERSION: usize = 8;
const AT_PAGE_SIZE: usize = 12;
const AT_PAGES: usize = 16;
const AT_GENERATIONS: usize = 24;
const AT_EXTENTS: usize = 28;
const AT_HAS_BASE: usize = 32;
const AT_RESERVED: usize = 36;
const AT_BASE: usize = 40;
const AT_BODY_DIGEST: usize = 72;
const AT_HEADER_DIGEST: usize = 104;
/// Bytes before the generations.
const HEADER: usize = 136;
/// Bytes of a generation: digest, pages, reserved.
const GENERATION: usize = 40;
/// Bytes of an extent: first page, pages, source, page in the source.
const EXTENT: usize = 16;

/// Values of an extent's source field; generation `n` is `FIRST_GENERATION + n`.
const SOURCE_BASE: u32 = 0;
const SOURCE_ZERO: u32 = 1;
const FIRST_GENERATION: u32 = 2;

/// Bytes of the largest index of a memory of `pages` pages: an extent for each page, each of
/// another generation.
pub(crate) fn largest(pages: u64) -> u64 {
    HEADER as u64 + pages.saturating_mul((GENERATION + EXTENT) as u64)
}

impl PageMap {
    /// The map as the bytes of a `memory.index`. The same map always gives the same bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let body_bytes = self.generations().len() * GENERATION + self.extents().len() * EXTENT;
        let mut bytes = vec![0; HEADER];
        bytes.reserve_exact(body_bytes);
        for generation in self.generations() {
            bytes.extend_from_slice(&generation.id.0);
            bytes.extend_from_slice(&generation.pages.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
        }
        for extent in self.extents() {
            let (source, page) = match extent.source {
                Source::Base => (SOURCE_BASE, 0),
                Source::Zero => (SOURCE_ZERO, 0),
                Source::Data { generation, page } => (FIRST_GENERATION + generation, page),
            };
            // A map has at most MAX_PAGES pages, which a u32 holds.
            for field in [
                extent.range.first as u32,
                extent.range.count as u32,
                source,
                page,
            ] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        let body = Digest::of(&bytes[HEADER..]);
        let base = self.base().map_or([0; 32], |base| base.0);
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, AT_VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, AT_PAGE_SIZE, &(PAGE as u32).to_le_bytes());
        put(&mut bytes, AT_PAGES, &self.pages().to_le_bytes());
        let generations = self.generations().len() as u32;
        put(&mut bytes, AT_GENERATIONS, &generations.to_le_bytes());
        let extents = self.extents().len() as u32;
        put(&mut bytes, AT_EXTENTS, &extents.to_le_bytes());
        let has_base = u32::from(self.base().is_some());
        put(&mut bytes, AT_HAS_BASE, &has_base.to_le_bytes());
        put(&mut bytes, AT_BASE, &base);
        put(&mut bytes, AT_BODY_DIGEST, &body.0);
        let header = Digest::of(&bytes[..AT_HEADER_DIGEST]);
        put(&mut bytes, AT_HEADER_DIGEST, &header.0);
        bytes
    }

    /// Reads a `memory.index`, believing nothing in it: checksums, sizes, and that every page
    /// is covered exactly once. Allocates no more than a small multiple of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<PageMap, Fault> {
        if bytes.len() < HEADER || bytes[..8] != MAGIC[..] {
            return Err(Fault::at(0, "not the index of a memory"));
        }
        let stored = array::<32>(bytes, AT_HEADER_DIGEST);
        if Digest::of(&bytes[..AT_HEADER_DIGEST]).0 != stored {
            return Err(Fault::at(0, "the header does not match its checksum"));
        }
        let version = u32_at(bytes, AT_VERSION);
        if version != VERSION {
            return Err(Fault::Version {
                found: version,
                known: VERSION,
            });
        }
        if u32_at(bytes, AT_PAGE_SIZE) != PAGE as u32 || u32_at(bytes, AT_RESERVED) != 0 {
            return Err(Fault::at(
                AT_PAGE_SIZE as u64,
                "an unknown page size or flag",
            ));
        }
        let pages = u64_at(bytes, AT_PAGES);
        if pages > MAX_PAGES {
            return Err(Fault::at(AT_PAGES as u64, format!("{pages} pages")));
        }
        let generation_count = u64::from(u32_at(bytes, AT_GENERATIONS));
        let extent_count = u64::from(u32_at(bytes, AT_EXTENTS));
        // Counts are 32 bits, so these cannot overflow.
        let generations_bytes = generation_count * GENERATION as u64;
        let expected = HEADER as u64 + generations_bytes + extent_count * EXTENT as u64;
        if bytes.len() as u64 != expected {
            return Err(Fault::at(
                bytes.len().min(expected as usize) as u64,
                format!("the file has {} bytes, not {expected}", bytes.len()),
            ));
        }
        let base_bytes = array::<32>(bytes, AT_BASE);
        let base = match u32_at(bytes, AT_HAS_BASE) {
            0 if base_bytes == [0; 32] => None,
            1 => Some(BaseId(base_bytes)),
            _ => return Err(Fault::at(AT_HAS_BASE as u64, "an unknown kind of base")),
        };
        let body = &bytes[HEADER..];
        if Digest::of(body).0 != array::<32>(bytes, AT_BODY_DIGEST) {
            return Err(Fault::at(
                HEADER as u64,
                "the map does not match its checksum",
            ));
        }
        let (generations, extents) = body.split_at(generations_bytes as usize);
        let generations = parse_generations(generations)?;
        let extents = parse_extents(extents, HEADER as u64 + generations_bytes)?;
        PageMap::checked(pages, base, generations, extents).map_err(|fault| match fault {
            Fault::Damaged { offset, problem } => {
                Fault::at(HEADER as u64, format!("entry {offset}: {problem}"))
            }
            version @ Fault::Version { .. } => version,
        })
    }
}

fn parse_generations(bytes: &[u8]) -> Result<Vec<GenerationRef>, Fault> {
    bytes
        .chunks_exact(GENERATION)
        .enumerate()
        .map(|(index, entry)| {
            if u32_at(entry, 36) != 0 {
                let offset = HEADER + index * GENERATION + 36;
                return Err(Fault::at(offset as u64, "an unknown flag of a generation"));
            }
            Ok(GenerationRef {
                id: ObjectId(array(entry, 0)),
                pages: u32_at(entry, 32),
            })
        })
        .collect()
}

fn parse_extents(bytes: &[u8], at: u64) -> Result<Vec<Extent>, Fault> {
    bytes
        .chunks_exact(EXTENT)
        .enumerate()
        .map(|(index, entry)| {
            let page = u32_at(entry, 12);
            let source = match (u32_at(entry, 8), page) {
                (SOURCE_BASE, 0) => Source::Base,
                (SOURCE_ZERO, 0) => Source::Zero,
                (SOURCE_BASE | SOURCE_ZERO, _) => {
                    let offset = at + (index * EXTENT) as u64 + 12;
                    return Err(Fault::at(offset, "a position in no generation"));
                }
                (number, page) => Source::Data {
                    generation: number - FIRST_GENERATION,
                    page,
                },
            };
            Ok(Extent {
                range: PageRange {
                    first: u64::from(u32_at(entry, 0)),
                    count: u64::from(u32_at(entry, 4)),
                },
                source,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::tests::arbitrary;
    use proptest::prelude::*;

    /// Makes the checksums right again after a change, as an attacker would.
    fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let body = Digest::of(&bytes[HEADER..]);
        put(&mut bytes, AT_BODY_DIGEST, &body.0);
        let header = Digest::of(&bytes[..AT_HEADER_DIGEST]);
        put(&mut bytes, AT_HEADER_DIGEST, &header.0);
        bytes
    }

    proptest! {
        #[test]
        fn an_index_is_read_as_it_was_written((map, _) in arbitrary()) {
            prop_assert_eq!(PageMap::parse(&map.to_bytes()), Ok(map));
        }

        #[test]
        fn g16_no_flipped_bit_and_no_cut_of_an_index_passes(
            (map, _) in arbitrary(), at in any::<prop::sample::Index>(), bit in 0u8..8
        ) {
            let bytes = map.to_bytes();
            let mut flipped = bytes.clone();
            flipped[at.index(bytes.len())] ^= 1 << bit;
            prop_assert!(PageMap::parse(&flipped).is_err());
            prop_assert!(PageMap::parse(&bytes[..at.index(bytes.len())]).is_err());
        }

        /// What passes in spite of hostile changes under right checksums is a valid map, and
        /// has exactly one spelling.
        #[test]
        fn resealed_changes_never_panic_and_never_pass_as_another_spelling(
            (map, _) in arbitrary(),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
        ) {
            let mut bytes = map.to_bytes();
            let length = bytes.len();
            for (at, value) in changes {
                bytes[at.index(length)] = value;
            }
            let bytes = resealed(bytes);
            if let Ok(map) = PageMap::parse(&bytes) {
                prop_assert_eq!(map.to_bytes(), bytes);
                for page in 0..map.pages().min(100) {
                    prop_assert!(map.lookup(page).is_some());
                }
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(PageMap::parse(&bytes).is_err());
            let mut with_magic = bytes;
            if with_magic.len() >= HEADER {
                put(&mut with_magic, 0, MAGIC);
                put(&mut with_magic, AT_VERSION, &VERSION.to_le_bytes());
                put(&mut with_magic, AT_PAGE_SIZE, &(PAGE as u32).to_le_bytes());
                prop_assert!(PageMap::parse(&resealed(with_magic)).is_err());
            }
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = PageMap::untouched(4, None).to_bytes();
        put(&mut bytes, AT_VERSION, &7u32.to_le_bytes());
        assert_eq!(
            PageMap::parse(&resealed(bytes)),
            Err(Fault::Version { found: 7, known: 1 })
        );
    }

    /// The page of the format describes these bytes; a change of them is a new version.
    #[test]
    fn the_format_is_the_documented_one() {
        let bytes = PageMap::untouched(256, Some(BaseId([0xab; 32]))).to_bytes();
        assert_eq!(bytes.len(), HEADER + EXTENT);
        assert_eq!(
            Digest::of(&bytes).to_string(),
            "8df458ff46610400264586403aede4e9cf94afa061edbf7cdb893cfbb55c1de5",
            "the bytes of format version 1 have changed"
        );
    }
}
