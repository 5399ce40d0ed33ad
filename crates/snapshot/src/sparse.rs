//! The digest of a disk layer, for which what is zero costs next to nothing.
//!
//! A raw disk is as long as the guest's disk and mostly empty. Its holes are not even read,
//! and since zeros that were written are the same content as a hole, pages of zeros are left out
//! wherever they are:
//!
//! ```text
//!   data = BLAKE3(all pages that are not zero, in order)
//!   runs = BLAKE3(for each run of such pages: first page, pages; both 8 bytes)
//!   id   = BLAKE3 with key context CONTEXT of (length in bytes, 8 bytes; runs; data)
//! ```
//!
//! Length and runs say where each byte of the data is, so that two files have one digest if and
//! only if every byte of them is equal, as it is of the plain digest.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::page::{PAGE, is_zero};
use crate::{Result, SnapshotError};

/// Keeps these digests apart from all others.
const CONTEXT: &str = "wrenn-snapshot 2026-11-26 sparse disk layer";
/// Bytes per read: enough for BLAKE3 to run at full speed, within the processor's cache.
const PIECE: usize = 256 << 10;

/// See the module.
pub(crate) struct SparseHasher {
    data: blake3::Hasher,
    runs: blake3::Hasher,
    /// The pages that are being gone through.
    run: Range<u64>,
}

impl SparseHasher {
    pub(crate) fn new() -> SparseHasher {
        SparseHasher {
            data: blake3::Hasher::new(),
            runs: blake3::Hasher::new(),
            run: 0..0,
        }
    }

    /// What is at `at`, the beginning of a page: whole pages, but for the end of the file.
    /// Pieces come in ascending order; what lies between them is zero.
    pub(crate) fn update(&mut self, at: u64, piece: &[u8]) {
        let first = at / PAGE as u64;
        let mut rest = piece;
        let mut page = first;
        while !rest.is_empty() {
            let zero = leading(rest, true);
            page += zero.div_ceil(PAGE) as u64;
            rest = &rest[zero..];
            let data = leading(rest, false);
            if data > 0 {
                let pages = data.div_ceil(PAGE) as u64;
                self.go_on(page..page + pages);
                self.data.update(&rest[..data]);
                page += pages;
                rest = &rest[data..];
            }
        }
    }

    fn go_on(&mut self, pages: Range<u64>) {
        if self.run.end != pages.start {
            self.end_run();
            self.run.start = pages.start;
        } else if self.run.is_empty() {
            self.run.start = pages.start;
        }
        self.run.end = pages.end;
    }

    fn end_run(&mut self) {
        if !self.run.is_empty() {
            let pages = self.run.end - self.run.start;
            self.runs.update(&self.run.start.to_le_bytes());
            self.runs.update(&pages.to_le_bytes());
        }
    }

    /// The digest of a file of so many bytes.
    pub(crate) fn finish(mut self, bytes: u64) -> [u8; 32] {
        self.end_run();
        let mut whole = blake3::Hasher::new_derive_key(CONTEXT);
        whole.update(&bytes.to_le_bytes());
        whole.update(self.runs.finalize().as_bytes());
        whole.update(self.data.finalize().as_bytes());
        *whole.finalize().as_bytes()
    }
}

/// Bytes of the pages at the beginning that are zero, or are not.
fn leading(bytes: &[u8], zero: bool) -> usize {
    let pages = bytes.chunks(PAGE).take_while(|page| is_zero(page) == zero);
    pages.map(<[u8]>::len).sum()
}

/// Reads what a file holds, piece by piece; `visit` gets each and its offset, the beginning of
/// a page. Holes are passed over. Returns the file's length.
pub(crate) fn read_data(
    file: &File,
    path: &Path,
    mut visit: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<u64> {
    let read = SnapshotError::io("read", path);
    let length = match file.metadata() {
        Ok(metadata) => metadata.len(),
        Err(error) => return Err(read(error)),
    };
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < length {
        let Some(data) = next_data(file, at, length).map_err(SnapshotError::io("read", path))?
        else {
            break;
        };
        at = data.start;
        while at < data.end {
            let left = usize::try_from(data.end - at).unwrap_or(usize::MAX);
            let piece = &mut piece[..left.min(PIECE)];
            file.read_exact_at(piece, at)
                .map_err(SnapshotError::io("read", path))?;
            visit(at, piece)?;
            at += piece.len() as u64;
        }
    }
    Ok(length)
}

/// The next stretch of the file, from `from` on, that is no hole, widened to whole pages; all that
/// is left where the file system does not know.
fn next_data(file: &File, from: u64, length: u64) -> io::Result<Option<Range<u64>>> {
    let page = PAGE as u64;
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start.min(length) / page * page,
        // Nothing but a hole is left.
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..length)),
        Err(error) => return Err(error.into()),
    };
    let start = start.max(from);
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    let end = end.next_multiple_of(page).clamp(start, length);
    Ok((start < end).then_some(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest_of(file: &File) -> [u8; 32] {
        let mut hasher = SparseHasher::new();
        let visit = |at, piece: &[u8]| {
            hasher.update(at, piece);
            Ok(())
        };
        let bytes = read_data(file, Path::new("test"), visit).unwrap();
        hasher.finish(bytes)
    }

    /// A file with this content, in which stretches of zeros are holes where `holes` says so.
    fn file(content: &[u8], holes: impl Fn(usize) -> bool) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(content.len() as u64).unwrap();
        for (page, bytes) in content.chunks(PAGE).enumerate() {
            if !is_zero(bytes) || !holes(page) {
                file.write_all_at(bytes, (page * PAGE) as u64).unwrap();
            }
        }
        file
    }

    /// Contents of pages that are often zero and often the same, of any length.
    fn content() -> impl Strategy<Value = Vec<u8>> {
        let page = prop_oneof![3 => Just(None), 2 => (0u16..4096, 1u8..4).prop_map(Some)];
        (proptest::collection::vec(page, 0..40), 0..PAGE).prop_map(|(pages, cut)| {
            let mut content = vec![0; pages.len() * PAGE];
            for (page, what) in pages.iter().enumerate() {
                if let Some((at, byte)) = what {
                    content[page * PAGE + usize::from(*at)] = *byte;
                }
            }
            content.truncate(content.len().saturating_sub(cut));
            content
        })
    }

    /// The rule of the module, without any cleverness.
    fn by_the_rule(content: &[u8]) -> [u8; 32] {
        let (mut data, mut runs) = (Vec::new(), Vec::<(u64, u64)>::new());
        for (page, bytes) in content.chunks(PAGE).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                data.extend_from_slice(bytes);
                match runs.last_mut() {
                    Some((first, pages)) if *first + *pages == page as u64 => *pages += 1,
                    _ => runs.push((page as u64, 1)),
                }
            }
        }
        let runs: Vec<u8> = runs
            .iter()
            .flat_map(|(first, pages)| [first.to_le_bytes(), pages.to_le_bytes()].concat())
            .collect();
        let mut whole = (content.len() as u64).to_le_bytes().to_vec();
        whole.extend_from_slice(blake3::hash(&runs).as_bytes());
        whole.extend_from_slice(blake3::hash(&data).as_bytes());
        blake3::derive_key(CONTEXT, &whole)
    }

    proptest! {
        #[test]
        fn g16_holes_and_zeros_are_one_and_all_else_shows(
            a in content(), b in content(), mask in any::<u64>(), at in any::<usize>(), cut in 0usize..9,
        ) {
            let digest = digest_of(&file(&a, |page| mask >> (page % 64) & 1 == 1));
            prop_assert_eq!(digest, by_the_rule(&a));
            prop_assert_eq!(digest, digest_of(&file(&a, |_| false)));
            // Exactly as the plain digest tells contents apart.
            let other = digest_of(&file(&b, |_| true));
            prop_assert_eq!(digest == other, blake3::hash(&a) == blake3::hash(&b));
            if !a.is_empty() {
                let mut flipped = a.clone();
                let at = at % a.len();
                flipped[at] ^= 1 << (at % 8);
                prop_assert_ne!(digest, digest_of(&file(&flipped, |_| true)));
                let shorter = &a[..a.len() - cut.clamp(1, a.len())];
                prop_assert_ne!(digest, digest_of(&file(shorter, |_| true)));
            }
        }

        #[test]
        fn pieces_may_be_cut_at_any_page(content in content(), cuts in proptest::collection::vec(1usize..9, 1..20)) {
            let mut hasher = SparseHasher::new();
            let (mut at, mut cuts) = (0, cuts.iter().cycle());
            while at < content.len() {
                let end = (at + cuts.next().unwrap() * PAGE).min(content.len());
                hasher.update(at as u64, &content[at..end]);
                at = end;
            }
            prop_assert_eq!(hasher.finish(content.len() as u64), by_the_rule(&content));
        }
    }

    #[test]
    fn two_pages_that_change_places_show() {
        let mut content = vec![0; 4 * PAGE];
        content[0] = 1;
        content[2 * PAGE] = 2;
        let mut moved = content.clone();
        moved.swap(0, 2 * PAGE);
        let mut apart = vec![0; 4 * PAGE];
        (apart[0], apart[3 * PAGE]) = (1, 2);
        let all = [content, moved, apart].map(|content| digest_of(&file(&content, |_| true)));
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
    }

    /// The format is fixed: see docs/snapshot-format.md.
    #[test]
    fn the_digest_is_what_the_documentation_says() {
        let mut content = vec![0; 3 * PAGE + 5];
        content[PAGE..2 * PAGE].fill(7);
        content[3 * PAGE + 4] = 1;
        assert_eq!(
            hex::encode(digest_of(&file(&content, |_| true))),
            "a1a71d273c9f802a878d55fda83e6d8d0a672a432a5e6f8023bb3bc443466a70"
        );
    }
}
