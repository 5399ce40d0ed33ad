//! Which pages no longer come from the snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

use wrenn_snapshot::PageRange;

/// A bit for each page: set once the page was put in place or removed. Such a page is the
/// machine's own: if it is missing again, it was emptied, and reads as zeros.
///
/// Only the server sets bits; who reads ahead looks at them to save itself work, so that
/// nothing depends on when it sees them.
#[derive(Debug)]
pub(crate) struct Settled {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl Settled {
    pub(crate) fn none_of(pages: u64) -> Settled {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Settled {
            words: std::iter::repeat_with(AtomicU64::default)
                .take(words)
                .collect(),
            pages,
        }
    }

    pub(crate) fn has(&self, page: u64) -> bool {
        // The vector has a word for every page of a memory.
        let word = self.words.get((page / 64) as usize);
        word.is_none_or(|word| word.load(Ordering::Relaxed) & 1 << (page % 64) != 0)
    }

    pub(crate) fn add(&self, range: PageRange) {
        let end = range.end().min(self.pages);
        let mut page = range.first;
        while page < end {
            let (bits, count) = word_part(page, end);
            if let Some(word) = self.words.get((page / 64) as usize) {
                word.fetch_or(bits, Ordering::Relaxed);
            }
            page += count;
        }
    }

    /// The first run of pages in `range` that are not settled.
    pub(crate) fn first_open(&self, range: PageRange) -> Option<PageRange> {
        let end = range.end().min(self.pages);
        let first = self.next(range.first, end, false)?;
        let behind = self.next(first, end, true).unwrap_or(end);
        Some(PageRange {
            first,
            count: behind - first,
        })
    }

    /// The first page from `page` on, before `end`, whose bit is `wanted`.
    fn next(&self, mut page: u64, end: u64, wanted: bool) -> Option<u64> {
        while page < end {
            let (bits, count) = word_part(page, end);
            let word = self.words.get((page / 64) as usize)?;
            let word = word.load(Ordering::Relaxed);
            let found = match wanted {
                true => word & bits,
                false => !word & bits,
            };
            if found != 0 {
                return Some(page / 64 * 64 + u64::from(found.trailing_zeros()));
            }
            page += count;
        }
        None
    }
}

/// The bits of the pages from `page` to `end` that are in the first one's word, and how many
/// they are.
fn word_part(page: u64, end: u64) -> (u64, u64) {
    let skip = page % 64;
    let count = (64 - skip).min(end - page);
    ((u64::MAX >> (64 - count)) << skip, count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set(
            pages in 1u64..300,
            added in proptest::collection::vec((0u64..300, 0u64..150), 0..6),
            asked in (0u64..300, 0u64..300),
        ) {
            let settled = Settled::none_of(pages);
            let mut model = vec![false; pages as usize];
            for (first, count) in added {
                settled.add(PageRange { first, count });
                for page in first..(first + count).min(pages) {
                    model[page as usize] = true;
                }
            }
            for page in 0..pages {
                prop_assert_eq!(settled.has(page), model[page as usize]);
            }
            let range = PageRange { first: asked.0, count: asked.1 };
            let end = range.end().min(pages);
            let first = (range.first..end).find(|page| !model[*page as usize]);
            let expected = first.map(|first| {
                let behind = (first..end).find(|page| model[*page as usize]).unwrap_or(end);
                PageRange { first, count: behind - first }
            });
            prop_assert_eq!(settled.first_open(range), expected);
        }
    }
}
