//! Header and table of a generation's file.

use crate::bytes::{array, put, u32_at, u64_at};
use crate::page::{MAX_PAGES, PAGE};
use crate::{Digest, Fault, ObjectId};

/// First bytes of the file.
const MAGIC: &[u8; 8] = b"WRENNGEN";
/// Version of the format.
const VERSION: u32 = 1;

/// Pages of a chunk, the unit of digests and compression: 64 KiB. The first access to a page
/// costs reading and hashing its chunk (about 20 µs, less than what a fault served through
/// userfaultfd costs), BLAKE3 already runs at full speed, zstd finds most of what it would
/// find in more, and the table is 0.06 % of the data.
pub const CHUNK_PAGES: u64 = 16;
/// Bytes of a full chunk.
pub(super) const CHUNK: usize = CHUNK_PAGES as usize * PAGE;

/// The header takes a page, so that uncompressed pages lie on page boundaries.
pub(super) const HEADER: usize = PAGE;
/// Bytes of a chunk's entry in the table.
pub(super) const ENTRY: usize = 40;

const AT_VERSION: usize = 8;
const AT_PAGE_SIZE: usize = 12;
const AT_CHUNK_PAGES: usize = 16;
const AT_RESERVED: usize = 20;
const AT_PAGES: usize = 24;
const AT_CHUNKS: usize = 32;
const AT_DATA_BYTES: usize = 40;
const AT_TABLE_DIGEST: usize = 48;
const AT_HEADER_DIGEST: usize = 80;
const AT_PADDING: usize = 112;

/// How a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// A chunk's entry in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes it takes in the file.
    pub stored: u32,
    /// How it is stored.
    pub encoding: Encoding,
    /// Digest of the stored bytes: nothing unchecked reaches the decompressor.
    pub digest: Digest,
}

/// What header and table say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pages: u64,
    chunks: Vec<Chunk>,
    /// Where each chunk begins, and behind them where the table does.
    offsets: Vec<u64>,
}

impl Layout {
    /// The layout of a file with these chunks. `pages` must fit them.
    pub(super) fn new(pages: u64, chunks: Vec<Chunk>) -> Layout {
        let mut offsets = Vec::with_capacity(chunks.len() + 1);
        let mut at = HEADER as u64;
        offsets.push(at);
        for chunk in &chunks {
            at += u64::from(chunk.stored);
            offsets.push(at);
        }
        Layout {
            pages,
            chunks,
            offsets,
        }
    }

    /// Number of pages in the generation.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The chunks, in the order of their pages.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Where chunk `index` begins in the file.
    pub(super) fn offset(&self, index: usize) -> u64 {
        self.offsets.get(index).copied().unwrap_or(HEADER as u64)
    }

    /// Bytes of chunk `index` once it is unpacked.
    pub(super) fn plain_bytes(&self, index: usize) -> usize {
        let before = index as u64 * CHUNK_PAGES;
        self.pages.saturating_sub(before).min(CHUNK_PAGES) as usize * PAGE
    }

    fn table_offset(&self) -> u64 {
        self.offset(self.chunks.len())
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.table_offset() + (self.chunks.len() * ENTRY) as u64
    }

    /// The header and the table as bytes, and the generation's name.
    pub fn to_bytes(&self) -> (Vec<u8>, Vec<u8>, ObjectId) {
        let mut table = Vec::with_capacity(self.chunks.len() * ENTRY);
        for chunk in &self.chunks {
            let encoding: u32 = match chunk.encoding {
                Encoding::Raw => 0,
                Encoding::Zstd => 1,
            };
            table.extend_from_slice(&chunk.stored.to_le_bytes());
            table.extend_from_slice(&encoding.to_le_bytes());
            table.extend_from_slice(&chunk.digest.0);
        }
        let mut header = vec![0; HEADER];
        put(&mut header, 0, MAGIC);
        put(&mut header, AT_VERSION, &VERSION.to_le_bytes());
        put(&mut header, AT_PAGE_SIZE, &(PAGE as u32).to_le_bytes());
        let chunk_pages = CHUNK_PAGES as u32;
        put(&mut header, AT_CHUNK_PAGES, &chunk_pages.to_le_bytes());
        put(&mut header, AT_PAGES, &self.pages.to_le_bytes());
        let chunks = self.chunks.len() as u64;
        put(&mut header, AT_CHUNKS, &chunks.to_le_bytes());
        let data = self.table_offset() - HEADER as u64;
        put(&mut header, AT_DATA_BYTES, &data.to_le_bytes());
        put(&mut header, AT_TABLE_DIGEST, &Digest::of(&table).0);
        let id = digest_without_itself(&header);
        put(&mut header, AT_HEADER_DIGEST, &id.0);
        (header, table, ObjectId(id.0))
    }

    /// Where the table of the file with this header lies, as offset and length, believing
    /// nothing: the file must have exactly `file_bytes` bytes. The first step of reading.
    pub fn table_of(header: &[u8], file_bytes: u64) -> Result<(u64, usize), Fault> {
        if header.len() != HEADER || header[..8] != MAGIC[..] {
            return Err(Fault::at(0, "not a generation of memory"));
        }
        if digest_without_itself(header).0 != array::<32>(header, AT_HEADER_DIGEST) {
            return Err(Fault::at(0, "the header does not match its checksum"));
        }
        let version = u32_at(header, AT_VERSION);
        if version != VERSION {
            return Err(Fault::Version {
                found: version,
                known: VERSION,
            });
        }
        let sizes = (
            u32_at(header, AT_PAGE_SIZE),
            u32_at(header, AT_CHUNK_PAGES),
            u32_at(header, AT_RESERVED),
        );
        if sizes != (PAGE as u32, CHUNK_PAGES as u32, 0)
            || header[AT_PADDING..].iter().any(|byte| *byte != 0)
        {
            return Err(Fault::at(
                AT_PAGE_SIZE as u64,
                "an unknown page size, chunk size or flag",
            ));
        }
        let pages = u64_at(header, AT_PAGES);
        let chunks = u64_at(header, AT_CHUNKS);
        if pages == 0 || pages > MAX_PAGES || chunks != pages.div_ceil(CHUNK_PAGES) {
            return Err(Fault::at(
                AT_PAGES as u64,
                format!("{pages} pages in {chunks} chunks"),
            ));
        }
        let table = chunks * ENTRY as u64;
        let expected = (HEADER as u64)
            .checked_add(u64_at(header, AT_DATA_BYTES))
            .and_then(|offset| Some((offset, offset.checked_add(table)?)));
        match expected {
            Some((offset, end)) if end == file_bytes => Ok((offset, table as usize)),
            Some((_, end)) => Err(Fault::at(
                file_bytes.min(end),
                format!("the file has {file_bytes} bytes, not {end}"),
            )),
            None => Err(Fault::at(AT_DATA_BYTES as u64, "impossible sizes")),
        }
    }

    /// The second step: checks `table`, read from where [`Layout::table_of`] said, and that
    /// the file is the one called `id`.
    pub fn parse(
        header: &[u8],
        table: &[u8],
        file_bytes: u64,
        id: ObjectId,
    ) -> Result<Self, Fault> {
        let (offset, length) = Self::table_of(header, file_bytes)?;
        if array::<32>(header, AT_HEADER_DIGEST) != id.0 {
            let found = Digest(array(header, AT_HEADER_DIGEST));
            return Err(Fault::at(
                AT_HEADER_DIGEST as u64,
                format!("another generation, {found}, is in its place"),
            ));
        }
        if table.len() != length || Digest::of(table).0 != array::<32>(header, AT_TABLE_DIGEST) {
            return Err(Fault::at(offset, "the table does not match its checksum"));
        }
        let pages = u64_at(header, AT_PAGES);
        let chunks = table
            .chunks_exact(ENTRY)
            .enumerate()
            .map(|(index, entry)| parse_chunk(index, entry, pages, offset))
            .collect::<Result<Vec<_>, _>>()?;
        let layout = Layout::new(pages, chunks);
        if layout.table_offset() != offset {
            return Err(Fault::at(offset, "chunks that do not fill the file"));
        }
        Ok(layout)
    }
}

fn parse_chunk(index: usize, entry: &[u8], pages: u64, table: u64) -> Result<Chunk, Fault> {
    let stored = u32_at(entry, 0);
    let before = index as u64 * CHUNK_PAGES;
    let plain = pages.saturating_sub(before).min(CHUNK_PAGES) as u32 * PAGE as u32;
    let encoding = match u32_at(entry, 4) {
        0 if stored == plain => Encoding::Raw,
        1 if stored > 0 && stored < plain => Encoding::Zstd,
        _ => {
            return Err(Fault::at(
                table + (index * ENTRY) as u64,
                "a chunk of an unknown encoding or an impossible length",
            ));
        }
    };
    Ok(Chunk {
        stored,
        encoding,
        digest: Digest(array(entry, 8)),
    })
}

/// Digest of the header with zeros where the digest itself is.
fn digest_without_itself(header: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..AT_HEADER_DIGEST]);
    hasher.update(&[0; 32]);
    hasher.update(&header[AT_PADDING..]);
    Digest(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(pages: u64) -> Layout {
        let chunks = (0..pages.div_ceil(CHUNK_PAGES))
            .map(|index| {
                let plain = (pages - index * CHUNK_PAGES).min(CHUNK_PAGES) as u32 * PAGE as u32;
                let (stored, encoding) = match index % 2 {
                    0 => (plain, Encoding::Raw),
                    _ => (plain / 3, Encoding::Zstd),
                };
                Chunk {
                    stored,
                    encoding,
                    digest: Digest::of(&index.to_le_bytes()),
                }
            })
            .collect();
        Layout::new(pages, chunks)
    }

    fn resealed(mut header: Vec<u8>, table: &[u8]) -> (Vec<u8>, ObjectId) {
        put(&mut header, AT_TABLE_DIGEST, &Digest::of(table).0);
        let id = digest_without_itself(&header);
        put(&mut header, AT_HEADER_DIGEST, &id.0);
        (header, ObjectId(id.0))
    }

    proptest! {
        #[test]
        fn a_layout_is_read_as_it_was_written(pages in 1u64..200) {
            let layout = sample(pages);
            let (header, table, id) = layout.to_bytes();
            prop_assert_eq!(Layout::parse(&header, &table, layout.file_bytes(), id), Ok(layout));
        }

        #[test]
        fn g16_no_flipped_bit_of_header_or_table_passes(
            pages in 1u64..200, at in any::<prop::sample::Index>(), bit in 0u8..8
        ) {
            let layout = sample(pages);
            let (header, table, id) = layout.to_bytes();
            let mut all = [header, table].concat();
            let length = all.len();
            all[at.index(length)] ^= 1 << bit;
            let (header, table) = all.split_at(HEADER);
            prop_assert!(Layout::parse(header, table, layout.file_bytes(), id).is_err());
        }

        #[test]
        fn resealed_changes_never_panic_and_never_pass_as_another_spelling(
            pages in 1u64..100, file in any::<u64>(), real_size in any::<bool>(),
            in_header in proptest::collection::vec((0usize..AT_PADDING, any::<u8>()), 0..3),
            in_table in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        ) {
            let layout = sample(pages);
            let (mut header, mut table, _) = layout.to_bytes();
            for (at, value) in in_header {
                header[at] = value;
            }
            let length = table.len();
            for (at, value) in in_table {
                table[at.index(length)] = value;
            }
            let (header, id) = resealed(header, &table);
            let file = if real_size { layout.file_bytes() } else { file };
            if let Ok(read) = Layout::parse(&header, &table, file, id) {
                let (again, table_again, _) = read.to_bytes();
                prop_assert_eq!((again, table_again), (header, table));
            }
        }

        #[test]
        fn arbitrary_headers_are_refused(bytes in proptest::collection::vec(any::<u8>(), HEADER),
            file in any::<u64>()) {
            prop_assert!(Layout::table_of(&bytes, file).is_err());
            let mut bytes = bytes;
            put(&mut bytes, 0, MAGIC);
            put(&mut bytes, AT_VERSION, &VERSION.to_le_bytes());
            let (bytes, _) = resealed(bytes, &[]);
            prop_assert!(Layout::table_of(&bytes, file).is_err());
        }
    }

    #[test]
    fn another_generation_in_the_place_of_one_is_named() {
        let (header, table, _) = sample(20).to_bytes();
        let (_, _, other) = sample(21).to_bytes();
        let fault = Layout::parse(&header, &table, sample(20).file_bytes(), other).unwrap_err();
        assert!(fault.to_string().contains("another generation"), "{fault}");
    }

    /// The page of the format describes these bytes; a change of them is a new version.
    #[test]
    fn the_format_is_the_documented_one() {
        let (_, _, id) = sample(20).to_bytes();
        assert_eq!(
            id.to_string(),
            "ab9f1a23cadeba599fec54d362c2644694913ac4a860ca21aae909282e12ceb7"
        );
    }
}
