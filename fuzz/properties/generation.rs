//! Files with pages of memory: what passes is the one spelling of what is read from it.

use wrenn_snapshot::{Digest, GenerationRef, ObjectId, PAGE, generation_pages};

/// Fields before the header's digests.
const FIELDS: usize = 48;
const AT_TABLE_DIGEST: usize = 48;
const AT_OWN_DIGEST: usize = 80;
const AT_PADDING: usize = 112;
const ENTRY: usize = 40;
const CHUNK: usize = 16 * PAGE;

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let digits = bytes[at..at + length].iter().rev();
    digits.fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// Bytes of the table, as the header says.
fn table_bytes(fields: &[u8]) -> usize {
    let chunks = usize::try_from(number(fields, 32, 8)).unwrap_or(usize::MAX);
    chunks.saturating_mul(ENTRY)
}

/// Gives each entry of the table the digest of the bytes that it is about.
fn seal_chunks(data: &[u8], table: &mut [u8]) {
    let mut left = data;
    for entry in table.chunks_exact_mut(ENTRY) {
        let stored = number(entry, 0, 4) as usize;
        let (chunk, behind) = left.split_at(stored.min(left.len()));
        entry[8..].copy_from_slice(&Digest::of(chunk).0);
        left = behind;
    }
}

/// The first 48 bytes of a generation, then all of it behind its header. The digests are put
/// in, of the chunks too if the first byte is even.
pub fn check(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else {
        return;
    };
    let Some((fields, rest)) = data.split_at_checked(FIELDS) else {
        return;
    };
    let mut rest = rest.to_vec();
    let table_at = rest.len() - table_bytes(fields).min(rest.len());
    let (chunks, table) = rest.split_at_mut(table_at);
    if flags % 2 == 0 {
        seal_chunks(chunks, table);
    }
    let mut header = vec![0; PAGE];
    header[..FIELDS].copy_from_slice(fields);
    header[AT_TABLE_DIGEST..AT_OWN_DIGEST].copy_from_slice(&Digest::of(table).0);
    let id = Digest::of(&header);
    header[AT_OWN_DIGEST..AT_PADDING].copy_from_slice(&id.0);
    let file = [&header[..], chunks, table].concat();
    let expected = GenerationRef {
        id: ObjectId(id.0),
        pages: number(&header, 24, 4) as u32,
    };
    let other = GenerationRef {
        id: ObjectId([0; 32]),
        ..expected
    };
    let other = generation_pages(file.clone(), other);
    assert!(other.is_err(), "another's name");
    let Ok(pages) = generation_pages(file, expected) else {
        return;
    };
    // Everything in the file follows from these, so there is no other file of this name.
    assert_eq!(pages.len() as u64, number(&header, 24, 8) * PAGE as u64);
    assert_eq!(table.len(), pages.len().div_ceil(CHUNK) * ENTRY);
    assert_eq!(chunks.len() as u64, number(&header, 40, 8));
    let mut left = &*chunks;
    for (entry, plain) in table.chunks_exact(ENTRY).zip(pages.chunks(CHUNK)) {
        let (chunk, behind) = left.split_at(number(entry, 0, 4) as usize);
        match number(entry, 4, 4) {
            0 => assert_eq!(chunk, plain),
            encoding => assert!(encoding == 1 && chunk.len() < plain.len()),
        }
        left = behind;
    }
    assert!(left.is_empty(), "bytes that nothing is about");
}
