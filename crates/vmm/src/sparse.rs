//! Where a sparse file has data, in pages.

use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;

use crate::PageRange;
use crate::memory::PAGE;

/// The parts of a sparse file between pages `first` and `end` that are not holes; ascending,
/// not adjacent.
pub(crate) fn data_in(file: &File, first: u64, end: u64) -> io::Result<Vec<PageRange>> {
    let count = end.saturating_sub(first);
    DataParts::of(file).within(PageRange { first, count })
}

/// The parts of a sparse file that are not holes, for ranges that are asked for in ascending order.
/// The kernel walks through a part page by page to tell where it ends, so each is looked for once,
/// however many ranges are in it: of a large memory whose every other page is zero, asking for each
/// took seconds.
#[derive(Debug)]
pub(crate) struct DataParts<'a> {
    file: &'a File,
    /// What was found last; up to its end all is known.
    last: PageRange,
}

impl DataParts<'_> {
    pub(crate) fn of(file: &File) -> DataParts<'_> {
        DataParts {
            file,
            last: PageRange { first: 0, count: 0 },
        }
    }

    /// The parts in `range`; ascending, not adjacent.
    pub(crate) fn within(&mut self, range: PageRange) -> io::Result<Vec<PageRange>> {
        let mut parts = Vec::new();
        let mut at = range.first;
        while at < range.end() {
            if at >= self.last.end() {
                self.last = self.next(at)?;
            }
            let first = self.last.first.max(at);
            let end = self.last.end().min(range.end());
            if first >= end {
                break;
            }
            let count = end - first;
            parts.push(PageRange { first, count });
            at = end;
        }
        Ok(parts)
    }

    /// The first part at or behind a page; behind all pages if there is none.
    fn next(&self, at: u64) -> io::Result<PageRange> {
        let page = PAGE as u64;
        let data = match rustix::fs::seek(self.file, SeekFrom::Data(at.saturating_mul(page))) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => {
                return Ok(PageRange {
                    first: u64::MAX,
                    count: 0,
                });
            }
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(self.file, SeekFrom::Hole(data))?;
        let first = data / page;
        Ok(PageRange {
            first,
            count: hole.div_ceil(page) - first,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    proptest::proptest! {
        #[test]
        fn data_is_found_range_by_range_as_at_once(
            data in proptest::collection::btree_set(0u64..200, 0..60),
            mut cuts in proptest::collection::vec(0u64..210, 0..30),
        ) {
            let file = crate::memfd::new_memfd("parts").unwrap();
            file.set_len(200 * PAGE as u64).unwrap();
            for page in &data {
                file.write_all_at(&[1], page * PAGE as u64).unwrap();
            }
            cuts.sort_unstable();
            let mut parts = DataParts::of(&file);
            for pair in cuts.windows(2) {
                let (first, count) = (pair[0], pair[1] - pair[0]);
                let found = parts.within(PageRange { first, count }).unwrap();
                proptest::prop_assert_eq!(&found, &data_in(&file, first, pair[1]).unwrap());
                let pages = found.iter().flat_map(|part| part.first..part.end());
                proptest::prop_assert!(pages.eq(data.range(first..pair[1]).copied()));
                let adjacent = found.windows(2).any(|two| two[0].end() >= two[1].first);
                proptest::prop_assert!(!adjacent);
            }
        }
    }
}
