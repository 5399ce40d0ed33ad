//! The pages a machine needs first, in the order in which it asked for them: recorded once,
//! read before the machine asks in later runs. A hint: it is never wrong, only more or less
//! useful, so a damaged one is refused and the machine does without.
//!
//! ```text
//!  0  magic "WRENNWKS"
//!  8  u32  version, 1              12  u32  bytes of a page, 4096
//! 16  u64  pages of the memory     24  u32  runs         28  u32  0
//! 32  BLAKE3 of the runs           64  BLAKE3 of the 64 bytes before
//! 96  runs, each: u32 first page, u32 pages; no page twice
//! ```
//!
//! All numbers are little-endian.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use wrenn_snapshot::{Digest, MAX_PAGES, PAGE, PageRange};

use crate::settled::Settled;

const MAGIC: &[u8; 8] = b"WRENNWKS";
const VERSION: u32 = 1;
const AT_BODY_DIGEST: usize = 32;
const AT_HEADER_DIGEST: usize = 64;
const HEADER: usize = 96;
const RUN: usize = 8;

/// Why a working set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// Bytes that are not what was written.
    #[error("{path} is no working set: {problem}; it is not used, and may be deleted")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The operating system refused something.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Pages in the order in which they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkingSet {
    pages: u64,
    runs: Vec<PageRange>,
}

impl WorkingSet {
    /// Of a memory of `pages` pages. Pages outside it, and those that come again, are left out.
    pub fn new(pages: u64, order: impl IntoIterator<Item = u64>) -> WorkingSet {
        let pages = pages.min(MAX_PAGES);
        let seen = Settled::none_of(pages);
        let mut runs: Vec<PageRange> = Vec::new();
        for first in order {
            if first >= pages || seen.has(first) {
                continue;
            }
            let one = PageRange { first, count: 1 };
            seen.add(one);
            match runs.last_mut() {
                Some(last) if last.end() == first => last.count += 1,
                _ => runs.push(one),
            }
        }
        WorkingSet { pages, runs }
    }

    /// Pages of the memory it is about.
    pub fn memory_pages(&self) -> u64 {
        self.pages
    }

    /// The pages, in order.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// How many pages it has.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// As the bytes of a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.runs.len() * RUN);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(PAGE as u32).to_le_bytes());
        bytes.extend_from_slice(&self.pages.to_le_bytes());
        // At most as many as there are pages, which a u32 holds.
        bytes.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let mut body = Vec::with_capacity(self.runs.len() * RUN);
        for run in &self.runs {
            body.extend_from_slice(&(run.first as u32).to_le_bytes());
            body.extend_from_slice(&(run.count as u32).to_le_bytes());
        }
        bytes.extend_from_slice(&Digest::of(&body).0);
        let header = Digest::of(&bytes);
        bytes.extend_from_slice(&header.0);
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads the bytes of a file, believing nothing in them. Allocates no more than a small
    /// multiple of them.
    pub fn parse(bytes: &[u8]) -> Result<WorkingSet, String> {
        let wrong = |problem: &str| Err(problem.to_owned());
        let (Some(header), Some(body)) = (bytes.get(..HEADER), bytes.get(HEADER..)) else {
            return wrong("it ends inside its header");
        };
        if !header.starts_with(MAGIC) {
            return wrong("it does not begin as one");
        }
        if Digest::of(&header[..AT_HEADER_DIGEST]).0 != header[AT_HEADER_DIGEST..] {
            return wrong("its header does not match its checksum");
        }
        let version = number(header, 8, 4);
        if version != u64::from(VERSION) {
            return Err(format!(
                "it has format version {version}, this program knows {VERSION}"
            ));
        }
        let pages = number(header, 16, 8);
        if number(header, 12, 4) != PAGE as u64
            || number(header, 28, 4) != 0
            || !(1..=MAX_PAGES).contains(&pages)
        {
            return wrong("it has an unknown page size or flag, or too many pages");
        }
        let count = number(header, 24, 4);
        if body.len() as u64 != count * RUN as u64 {
            return Err(format!("it has {} bytes for {count} runs", body.len()));
        }
        if Digest::of(body).0 != header[AT_BODY_DIGEST..AT_HEADER_DIGEST] {
            return wrong("its content does not match its checksum");
        }
        let runs: Vec<_> = body
            .chunks_exact(RUN)
            .map(|entry| PageRange {
                first: number(entry, 0, 4),
                count: number(entry, 4, 4),
            })
            .collect();
        let mut ascending = runs.clone();
        ascending.sort_unstable();
        let overlap = ascending
            .windows(2)
            .any(|pair| pair[0].end() > pair[1].first);
        if overlap || runs.iter().any(|run| run.count == 0 || run.end() > pages) {
            return wrong("it has a run that is empty, outside the memory or there twice");
        }
        Ok(WorkingSet { pages, runs })
    }

    /// Reads a file; `None` if there is none. Blocking.
    pub fn load(path: &Path) -> Result<Option<WorkingSet>, WorkingSetError> {
        let failed = |source| WorkingSetError::Io {
            doing: "read",
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        // Enough for a run for every other page of 1 TiB; a longer file is found to be cut.
        const MOST: u64 = HEADER as u64 + (1 << 30);
        file.take(MOST).read_to_end(&mut bytes).map_err(failed)?;
        let parsed = WorkingSet::parse(&bytes);
        parsed
            .map(Some)
            .map_err(|problem| WorkingSetError::Damaged {
                path: path.to_owned(),
                problem,
            })
    }

    /// Makes it the content of a file, which then is there whole or as it was before, also
    /// after a power cut. Blocking.
    pub fn save(&self, path: &Path) -> Result<(), WorkingSetError> {
        replace(path, &self.to_bytes(), true).map_err(|source| WorkingSetError::Io {
            doing: "write",
            path: path.to_owned(),
            source,
        })
    }
}

/// Replaces a file's content in one step; `durable`: so that it survives a power cut.
pub(crate) fn replace(path: &Path, content: &[u8], durable: bool) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let staged = folder.join(name);
    let written = (|| {
        let mut file = File::create(&staged)?;
        file.write_all(content)?;
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&staged, path)?;
        if durable {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    })();
    if written.is_err() {
        // Its failure says no more than the one that is reported.
        let _ = std::fs::remove_file(&staged);
    }
    written
}

/// A little-endian number of `bytes` bytes; zero outside.
fn number(from: &[u8], at: usize, bytes: usize) -> u64 {
    from.get(at..at + bytes)
        .unwrap_or_default()
        .iter()
        .rev()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> WorkingSet {
        WorkingSet::new(1000, [5, 6, 7, 900, 3, 4, 901, 0, 5, 2000])
    }

    #[test]
    fn the_order_is_kept_and_no_page_is_there_twice() {
        let set = sample();
        let runs: Vec<_> = set
            .runs()
            .iter()
            .map(|run| (run.first, run.count))
            .collect();
        assert_eq!(runs, [(5, 3), (900, 1), (3, 2), (901, 1), (0, 1)]);
        assert_eq!(set.len(), 8);
    }

    #[test]
    fn a_file_that_is_there_is_replaced_and_one_that_is_not_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        assert_eq!(WorkingSet::load(&path).unwrap(), None);
        std::fs::write(&path, b"other").unwrap();
        let error = WorkingSet::load(&path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        sample().save(&path).unwrap();
        assert_eq!(WorkingSet::load(&path).unwrap(), Some(sample()));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn g16_every_flipped_bit_and_every_cut_of_a_working_set_is_detected() {
        let bytes = sample().to_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(WorkingSet::parse(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(WorkingSet::parse(&bytes[..length]).is_err(), "{length}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(WorkingSet::parse(&longer).is_err());
    }

    /// A file with right checksums and any runs.
    fn sealed(pages: u64, runs: &[(u32, u32)]) -> Vec<u8> {
        WorkingSet {
            pages,
            runs: runs
                .iter()
                .map(|(first, count)| PageRange {
                    first: u64::from(*first),
                    count: u64::from(*count),
                })
                .collect(),
        }
        .to_bytes()
    }

    #[test]
    fn runs_that_cannot_be_are_refused_though_their_checksums_are_right() {
        assert!(WorkingSet::parse(&sealed(10, &[(9, 1), (0, 9)])).is_ok());
        for runs in [
            &[(0, 0)][..],
            &[(9, 2)],
            &[(10, 1)],
            &[(u32::MAX, u32::MAX)],
            &[(0, 2), (1, 1)],
            &[(5, 1), (4, 3)],
        ] {
            assert!(WorkingSet::parse(&sealed(10, runs)).is_err(), "{runs:?}");
        }
        assert!(WorkingSet::parse(&sealed(0, &[])).is_err());
        assert!(WorkingSet::parse(&sealed(MAX_PAGES + 1, &[])).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(pages in 1u64..5000, order in proptest::collection::vec(0u64..6000, 0..200)) {
            let set = WorkingSet::new(pages, order);
            prop_assert_eq!(WorkingSet::parse(&set.to_bytes()), Ok(set));
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), magic in any::<bool>()) {
            let mut bytes = bytes;
            if magic && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(MAGIC);
            }
            prop_assert!(WorkingSet::parse(&bytes).is_err());
        }

        #[test]
        fn any_runs_are_read_or_refused_without_a_panic(pages in 0u64..100, runs in proptest::collection::vec((0u32..120, 0u32..120), 0..5)) {
            if let Ok(set) = WorkingSet::parse(&sealed(pages, &runs)) {
                prop_assert!(set.len() <= pages);
            }
        }
    }
}
