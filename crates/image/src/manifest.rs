//! What an image is made of and what it consists of.

use crate::digest::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the manifest's format.
pub(crate) const FORMAT: u32 = 1;

/// One Debian package of an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    /// Name.
    pub name: String,
    /// Version, epoch included.
    pub version: String,
    /// `amd64` or `all`.
    pub architecture: String,
    /// Bytes of the `.deb` file.
    pub size: u64,
    /// Digest of the `.deb` file.
    pub sha256: Digest,
}

impl LockedPackage {
    /// The name under which apt keeps the file: the epoch's colon is escaped.
    pub(crate) fn file_name(&self) -> String {
        format!(
            "{}_{}_{}.deb",
            self.name,
            self.version.replace(':', "%3a"),
            self.architecture
        )
    }
}

/// Everything that goes into an image. Its digest is the image's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputLock {
    /// Digest of the recipe: package list, files written, options of the tools.
    pub recipe: Digest,
    /// Packages of the root file system, sorted.
    pub packages: Vec<LockedPackage>,
    /// The kernel's package.
    pub kernel: LockedPackage,
    /// Digest of our init.
    pub init: Digest,
    /// Digest of our guest agent.
    pub envd: Digest,
}

impl InputLock {
    /// The image's name.
    pub fn digest(&self) -> Digest {
        // Field order is that of the structs, and lists are sorted: one text per lock. A
        // struct of strings and numbers always serialises.
        Digest::of(&serde_json::to_vec(self).unwrap_or_default())
    }
}

/// Size and digest of one file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Bytes.
    pub size: u64,
    /// Digest of the content, holes as zeros.
    pub sha256: Digest,
}

/// The `manifest.json` of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// The image's name: digest of `lock`.
    pub digest: Digest,
    /// When it was built, seconds since 1970.
    pub created: u64,
    /// Debian's release that the packages are from.
    pub suite: String,
    /// `uname -r` of the kernel.
    pub kernel_release: String,
    /// What it was made of.
    pub lock: InputLock,
    /// What it consists of, by file name.
    pub files: BTreeMap<String, FileEntry>,
}

/// The manifest as written: its body and the body's digest, so that any changed byte shows.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    manifest: Manifest,
    sha256: Digest,
}

impl Manifest {
    /// The bytes of `manifest.json`.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let sha256 = Digest::of(&serde_json::to_vec(self)?);
        let mut bytes = serde_json::to_vec_pretty(&Sealed {
            manifest: self.clone(),
            sha256,
        })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads `manifest.json`; the error says what is wrong with it.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let sealed: Sealed =
            serde_json::from_slice(bytes).map_err(|error| format!("cannot be read: {error}"))?;
        let manifest = sealed.manifest;
        if manifest.format != FORMAT {
            return Err(format!(
                "has format {}, this program knows {FORMAT}",
                manifest.format
            ));
        }
        // One manifest has one spelling, so even a changed blank is noticed.
        match manifest.to_bytes() {
            Ok(expected) if expected == bytes => {}
            Ok(_) | Err(_) => return Err("does not match its own checksum".into()),
        }
        if manifest.lock.digest() != manifest.digest {
            return Err("has a lock that does not belong to its digest".into());
        }
        Ok(manifest)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Manifest {
        let package = LockedPackage {
            name: "libc6".into(),
            version: "1:2.36-9".into(),
            architecture: "amd64".into(),
            size: 5,
            sha256: Digest::of(b"libc"),
        };
        let lock = InputLock {
            recipe: Digest::of(b"recipe"),
            packages: vec![package.clone()],
            kernel: package,
            init: Digest::of(b"init"),
            envd: Digest::of(b"envd"),
        };
        Manifest {
            format: FORMAT,
            digest: lock.digest(),
            created: 1_800_000_000,
            suite: "bookworm".into(),
            kernel_release: "6.1.0-1-cloud-amd64".into(),
            lock,
            files: BTreeMap::from([(
                "vmlinuz".into(),
                FileEntry {
                    size: 3,
                    sha256: Digest::of(b"abc"),
                },
            )]),
        }
    }

    #[test]
    fn g16_any_changed_byte_of_a_manifest_is_noticed() {
        let bytes = sample().to_bytes().unwrap();
        assert_eq!(Manifest::from_bytes(&bytes).unwrap(), sample());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(
                Manifest::from_bytes(&damaged).is_err(),
                "byte {at} changed unnoticed"
            );
            assert!(
                Manifest::from_bytes(&bytes[..at]).is_err(),
                "cut at {at} unnoticed"
            );
        }
    }

    #[test]
    fn g19_every_input_changes_the_name() {
        let lock = sample().lock;
        let mut others = vec![lock.clone(); 4];
        others[0].recipe = Digest::of(b"another recipe");
        others[1].packages[0].version = "1:2.36-10".into();
        others[2].init = Digest::of(b"another init");
        others[3].envd = Digest::of(b"another envd");
        for other in others {
            assert_ne!(other.digest(), lock.digest());
        }
    }

    #[test]
    fn files_of_packages_are_named_as_apt_names_them() {
        assert_eq!(
            sample().lock.kernel.file_name(),
            "libc6_1%3a2.36-9_amd64.deb"
        );
    }
}
