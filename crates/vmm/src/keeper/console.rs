//! What a machine writes, kept within bounds: a guest can write without end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// After a cut so many of the newest bytes stay.
const KEEP: u64 = 256 << 10;

/// At this length the log is cut.
const CUT_AT: u64 = 2 * KEEP;

/// A file that holds the newest 256 to 512 KiB of what was written to it.
pub(super) struct BoundedLog {
    file: File,
    length: u64,
}

impl BoundedLog {
    /// Writes to `file`, which is empty and opened for reading too.
    pub(super) fn new(file: File) -> BoundedLog {
        BoundedLog { file, length: 0 }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.length + bytes.len() as u64 > CUT_AT {
            self.cut()?;
        }
        self.file.write_all_at(bytes, self.length)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Moves the newest part to the front. In one file, since the keeper may not create any.
    fn cut(&mut self) -> io::Result<()> {
        let keep = KEEP.min(self.length);
        let mut newest = vec![0; keep as usize];
        self.file.read_exact_at(&mut newest, self.length - keep)?;
        self.file.write_all_at(&newest, 0)?;
        self.file.set_len(keep)?;
        self.length = keep;
        Ok(())
    }
}

/// The last bytes of a stream, in memory.
pub(super) struct Tail {
    bytes: Vec<u8>,
    limit: usize,
}

impl Tail {
    pub(super) fn new(limit: usize) -> Tail {
        Tail {
            bytes: Vec::new(),
            limit,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(self.limit)..];
        let excess = (self.bytes.len() + newest.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess);
        self.bytes.extend_from_slice(newest);
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_stays_bounded_and_keeps_the_newest() {
        let file = tempfile::tempfile().unwrap();
        let mut log = BoundedLog::new(file.try_clone().unwrap());
        let mut all = Vec::new();
        for index in 0..40_000 {
            let line = format!("line {index} of the guest\n");
            log.write(line.as_bytes()).unwrap();
            all.extend_from_slice(line.as_bytes());
            assert!(file.metadata().unwrap().len() <= CUT_AT);
        }
        let length = file.metadata().unwrap().len();
        assert!(length >= KEEP);
        let mut kept = vec![0; length as usize];
        file.read_exact_at(&mut kept, 0).unwrap();
        assert!(all.ends_with(&kept));
    }

    #[test]
    fn a_tail_is_the_end_of_all_that_was_pushed() {
        let mut tail = Tail::new(5);
        for part in ["", "ab", "cdef", "g", "hijklmnop", "q"] {
            tail.push(part.as_bytes());
        }
        assert_eq!(tail.text(), "mnopq");
    }
}
