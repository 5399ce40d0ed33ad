//! Runs of pages that are zero or not, and a digest over those that are not.

use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::memory::{MemoryError, PAGE, SavedMemory};

/// Calls `found` with each run of pages in `chunk` that are all zero, or that are not.
pub(crate) fn for_runs(
    chunk: &[u8],
    zero: bool,
    mut found: impl FnMut(usize, &[u8]) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut start = None;
    for (index, page) in chunk.chunks(PAGE).enumerate() {
        let at = index * PAGE;
        match (is_zero(page) == zero, start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                found(from, &chunk[from..at])?;
                start = None;
            }
            _ => {}
        }
    }
    match start {
        Some(from) => found(from, &chunk[from..]),
        None => Ok(()),
    }
}

/// Whether all bytes are zero, in blocks that the compiler turns into vector instructions.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// The digest under way: joins what is adjacent, so that the chunks read do not show in it.
/// A run's length is only known at its end, so each run is hashed on its own and the outer
/// digest takes offset, length and that hash.
pub(crate) struct Runs {
    outer: Sha256,
    inner: Sha256,
    start: u64,
    end: u64,
    data_bytes: u64,
}

impl Runs {
    pub(crate) fn new(bytes: u64) -> Runs {
        let mut outer = Sha256::new();
        outer.update(bytes.to_le_bytes());
        Runs {
            outer,
            inner: Sha256::new(),
            start: 0,
            end: 0,
            data_bytes: 0,
        }
    }

    pub(crate) fn add(&mut self, offset: u64, data: &[u8]) {
        if offset != self.end {
            self.close();
            self.start = offset;
        }
        self.inner.update(data);
        self.end = offset + data.len() as u64;
        self.data_bytes += data.len() as u64;
    }

    fn close(&mut self) {
        if self.end > self.start {
            self.outer.update(self.start.to_le_bytes());
            self.outer.update((self.end - self.start).to_le_bytes());
            self.outer.update(self.inner.finalize_reset());
        }
        self.start = self.end;
    }

    pub(crate) fn finish(mut self) -> SavedMemory {
        self.close();
        SavedMemory {
            digest: Digest(self.outer.finalize().into()),
            data_bytes: self.data_bytes,
        }
    }
}
