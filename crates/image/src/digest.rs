//! SHA-256 digests as a type, in one spelling.

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

/// A SHA-256 digest, written `sha256-` and 64 hexadecimal digits: also a folder's name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// A text that is no digest.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no digest: `sha256-` and 64 lower-case hexadecimal digits are expected")]
pub struct DigestError(String);

const PREFIX: &str = "sha256-";
/// How much of a file is read at once.
const CHUNK: usize = 1 << 20;

impl Digest {
    /// Digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Digest(Sha256::digest(bytes).into())
    }

    /// Digest of a file's whole content, holes included as zeros. Holes are not read: a root
    /// file system consists of them mostly, and each would be brought into the page cache.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let zeros = vec![0; CHUNK];
        let mut at = 0;
        while at < size {
            let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
                Ok(data) => data.min(size),
                // Nothing but a hole from here to the end.
                Err(Errno::NXIO) => size,
                Err(error) => return Err(error.into()),
            };
            while at < data {
                let length = (data - at).min(CHUNK as u64);
                hasher.update(zeros.get(..length as usize).unwrap_or_default());
                at += length;
            }
            let hole = if at < size {
                rustix::fs::seek(&file, SeekFrom::Hole(at))?.min(size)
            } else {
                size
            };
            while at < hole {
                let length = (hole - at).min(CHUNK as u64);
                let part = buffer.get_mut(..length as usize).unwrap_or_default();
                file.read_exact_at(part, at)?;
                hasher.update(&*part);
                at += length;
            }
        }
        Ok(Digest(hasher.finalize().into()))
    }

    /// Reads the bare hexadecimal form, as apt prints it.
    pub fn from_hex(text: &str) -> Result<Self, DigestError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| DigestError(text.to_owned()))?;
        Ok(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let wrong = || DigestError(text.to_owned());
        let digits = text.strip_prefix(PREFIX).ok_or_else(wrong)?;
        // One digest has one spelling: it is compared as a folder's name.
        if digits.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(wrong());
        }
        Digest::from_hex(digits).map_err(|_| wrong())
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn holes_count_as_zeros(
            parts in prop::collection::vec((0u64..3_000_000, prop::collection::vec(any::<u8>(), 1..50)), 0..4),
            size in 0u64..4_000_000,
        ) {
            let file = tempfile::NamedTempFile::new().unwrap();
            for (at, bytes) in &parts {
                file.as_file().write_all_at(bytes, *at).unwrap();
            }
            file.as_file().set_len(size).unwrap();
            let plain = std::fs::read(file.path()).unwrap();
            prop_assert_eq!(Digest::of_file(file.path()).unwrap(), Digest::of(&plain));
        }
    }

    proptest! {
        #[test]
        fn text_and_back(bytes in any::<[u8; 32]>()) {
            let digest = Digest(bytes);
            prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        }

        #[test]
        fn other_texts_are_refused(text in "(sha256-)?[0-9a-fA-F]{0,63}") {
            prop_assert!(text.parse::<Digest>().is_err());
        }
    }
}
