//! Pages, and the memory a snapshot is laid over.

use std::io;

use crate::{BaseId, Result, SnapshotError};

/// Bytes of a page: the unit in which memory is tracked, and the smallest a processor has.
pub const PAGE: usize = 4096;

/// Most pages a memory may have: page numbers are 32 bits on disk (16 TiB).
pub const MAX_PAGES: u64 = u32::MAX as u64;

/// Consecutive pages of a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRange {
    /// The page behind the last.
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// The pages of a buffer that begins at page `first`; it must be whole pages inside a
    /// memory of `pages` pages.
    pub(crate) fn of_bytes(first: u64, bytes: &[u8], pages: u64) -> Result<PageRange> {
        if !bytes.len().is_multiple_of(PAGE) {
            return Err(SnapshotError::Size(bytes.len() as u64));
        }
        PageRange {
            first,
            count: (bytes.len() / PAGE) as u64,
        }
        .inside(pages)
    }

    /// The same range, if it lies inside a memory of `pages` pages.
    pub(crate) fn inside(self, pages: u64) -> Result<PageRange> {
        if self.end() > pages {
            return Err(SnapshotError::Range {
                first: self.first,
                end: self.end(),
                pages,
            });
        }
        Ok(self)
    }
}

/// Number of pages of a memory of `bytes` bytes.
pub fn pages_of(bytes: u64) -> Result<u64> {
    let pages = bytes / PAGE as u64;
    if pages == 0 || pages > MAX_PAGES || !bytes.is_multiple_of(PAGE as u64) {
        return Err(SnapshotError::Size(bytes));
    }
    Ok(pages)
}

/// Whether all bytes are zero. In blocks that the compiler turns into vector instructions;
/// ends at the first block that is not, which is the usual case.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Memory that snapshots are laid over: a template's, immutable.
pub trait Base: Sync {
    /// Its name. A snapshot is only read over the base it was written over.
    fn id(&self) -> BaseId;

    /// Number of its pages.
    fn pages(&self) -> u64;

    /// Fills `into` (whole pages) with the content from page `first` on.
    fn read(&self, first: u64, into: &mut [u8]) -> io::Result<()>;
}

/// A base that is mapped, or was read, into this process.
#[derive(Debug, Clone, Copy)]
pub struct BaseBytes<'a> {
    /// Its name.
    pub id: BaseId,
    /// Its content.
    pub bytes: &'a [u8],
}

impl Base for BaseBytes<'_> {
    fn id(&self) -> BaseId {
        self.id
    }

    fn pages(&self) -> u64 {
        (self.bytes.len() / PAGE) as u64
    }

    fn read(&self, first: u64, into: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(first)
            .ok()
            .and_then(|first| first.checked_mul(PAGE))
            .and_then(|start| self.bytes.get(start..))
            .and_then(|rest| rest.get(..into.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(from);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_is_not_zero_wherever_it_is() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page));
        for at in 0..PAGE {
            page[at] = 1 << (at % 8);
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }

    #[test]
    fn sizes_and_ranges_are_checked_without_overflow() {
        for bytes in [0, 1, 4095, 4097, 1 << 44, u64::MAX, u64::MAX - 4095] {
            assert!(pages_of(bytes).is_err(), "{bytes}");
        }
        assert_eq!(pages_of(4096).ok(), Some(1));
        let wild = PageRange {
            first: u64::MAX,
            count: u64::MAX,
        };
        assert!(wild.inside(1).is_err());
    }
}
