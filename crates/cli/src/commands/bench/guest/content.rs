//! What is moved about, and whether it came out as it went in.

use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;

/// Files are sent in pieces of this size, all of the same content.
pub(super) const PIECE: usize = 1 << 20;

/// Content in which a shift shows.
pub(super) fn piece() -> Bytes {
    (0..PIECE as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// Whether `data` is what a file of nothing but pieces has from `at` on.
pub(super) fn continues(piece: &[u8], at: u64, mut data: &[u8]) -> bool {
    let mut from = (at % PIECE as u64) as usize;
    while !data.is_empty() {
        let length = data.len().min(PIECE - from);
        if data[..length] != piece[from..from + length] {
            return false;
        }
        data = &data[length..];
        from = 0;
    }
    true
}

/// Reads back what the agent wrote.
pub(super) fn is_written(path: &Path, piece: &[u8], size: u64) -> io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0; PIECE];
    let mut left = size;
    while left > 0 {
        let length = left.min(PIECE as u64) as usize;
        file.read_exact(&mut buffer[..length])?;
        if buffer[..length] != piece[..length.min(piece.len())] {
            return Err(io::Error::other("it is not what was uploaded"));
        }
        left -= length as u64;
    }
    match file.read(&mut buffer)? {
        0 => Ok(()),
        _ => Err(io::Error::other("it is longer than what was uploaded")),
    }
}

/// How often `what` is in `bytes`.
pub(super) fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes
        .windows(what.len())
        .filter(|window| *window == what)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compared_can_differ() {
        let piece = piece();
        let mut twice = piece.to_vec();
        twice.extend_from_slice(&piece);
        assert!(continues(&piece, 0, &twice));
        assert!(continues(&piece, 7, &twice[7..]));
        assert!(continues(
            &piece,
            PIECE as u64 * 3 - 1,
            &twice[PIECE - 1..PIECE + 9]
        ));
        assert!(!continues(&piece, 1, &twice));
        assert_eq!(count(b"/a/entry-1 /a/entry-2", b"/a/entry-"), 2);
    }

    #[test]
    fn a_file_is_read_back_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let piece = piece();
        std::fs::write(file.path(), &piece).unwrap();
        let size = PIECE as u64;
        assert!(is_written(file.path(), &piece, size).is_ok());
        assert!(is_written(file.path(), &piece, size - 1).is_err());
        assert!(is_written(file.path(), &piece, size + 1).is_err());
        assert!(is_written(file.path(), &piece[1..], size).is_err());
    }
}
