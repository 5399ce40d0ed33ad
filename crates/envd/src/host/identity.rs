//! What the host says of this machine beside its memory: QEMU's fw_cfg, or where there is
//! none, Firecracker's metadata service.
//!
//! Memory and disk of a clone are those of its template; the file
//! `opt/wrenn/restore` is the clone's own. It is the one thing that a restored agent can
//! believe, so it is read anew each time. See docs/architecture.md, "Identity of a restored
//! machine".

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;

use super::mmds;

use crate::auth::token::hash_matches;

/// There on every QEMU whose fw_cfg the kernel knows. The folder alone comes with the module.
const FW_CFG_DEVICE: &str = "/sys/firmware/qemu_fw_cfg/rev";
const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/wrenn/restore/raw";
/// Bytes at first; the file is padded with NULs, and reading it is slow under emulation.
const HEAD: usize = 512;
/// Its whole size.
const SIZE: usize = 4096;

/// Who this machine is.
#[derive(Clone, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    /// Random and new with each restore. The metadata service may lack it: there the token's
    /// hash is as new.
    #[serde(rename = "restoreID", default)]
    pub restore_id: String,
    /// The sandbox, as far as the host knew it then.
    #[serde(rename = "instanceID", default)]
    pub instance_id: String,
    /// The template.
    #[serde(rename = "envID", default)]
    pub env_id: String,
    /// SHA-512 in hexadecimal of the token that may call `/init`.
    #[serde(default)]
    access_token_hash: String,
}

impl Identity {
    fn with_restore_id(mut self) -> Option<Identity> {
        if self.restore_id.is_empty() {
            self.restore_id.clone_from(&self.access_token_hash);
        }
        // Without either, nothing tells this restore from another.
        (!self.restore_id.is_empty()).then_some(self)
    }

    /// Whether this token may initialise the machine.
    pub fn trusts(&self, token: &[u8]) -> bool {
        !self.access_token_hash.is_empty() && hash_matches(token, &self.access_token_hash)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("restore_id", &self.restore_id)
            .finish_non_exhaustive()
    }
}

/// Where the identity is read.
#[derive(Debug)]
pub(super) struct Source {
    channel: Channel,
}

#[derive(Debug)]
enum Channel {
    /// Outside a VM.
    None,
    FwCfg(FwCfg),
    Mmds(SocketAddr),
}

impl Source {
    pub(super) fn new(in_vm: bool) -> Source {
        let channel = if !in_vm {
            Channel::None
        } else if Path::new(FW_CFG_DEVICE).exists() {
            Channel::FwCfg(FwCfg::new(PathBuf::from(FW_CFG)))
        } else {
            Channel::Mmds(mmds::ADDRESS)
        };
        Source { channel }
    }

    /// The identity now; `None` where the machine has none.
    pub(super) fn read(&self) -> Option<Identity> {
        let read = match &self.channel {
            Channel::None => return None,
            Channel::FwCfg(file) => file.read(),
            Channel::Mmds(address) => mmds::document(*address)
                .and_then(|json| serde_json::from_slice(&json).map_err(io::Error::other)),
        };
        match read {
            Ok(identity) => identity.with_restore_id(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::error!(channel = ?self.channel, %error, "cannot read this machine's identity");
                None
            }
        }
    }
}

/// QEMU's file, which is asked anew at each read of a descriptor. So that is kept: finding the
/// file takes longer than reading it, and a restore waits for both.
#[derive(Debug)]
struct FwCfg {
    path: PathBuf,
    kept: Mutex<Option<File>>,
}

impl FwCfg {
    fn new(path: PathBuf) -> FwCfg {
        FwCfg {
            path,
            kept: Mutex::default(),
        }
    }

    fn read(&self) -> io::Result<Identity> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // One whose module was taken away and came back reads no more.
        if let Some(Ok(bytes)) = kept.as_ref().map(head) {
            return parse(&bytes);
        }
        let file = kept.insert(File::open(&self.path)?);
        parse(&head(file)?)
    }
}

fn head(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; HEAD];
    let mut length = file.read_at(&mut bytes, 0)?;
    if length == HEAD && !bytes.contains(&0) {
        bytes.resize(SIZE, 0);
        length += file.read_at(&mut bytes[HEAD..], HEAD as u64)?;
    }
    bytes.truncate(length);
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> io::Result<Identity> {
    let json = bytes.split(|&b| b == 0).next().unwrap_or_default();
    serde_json::from_slice(json).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha512};

    #[test]
    fn an_identity_is_json_padded_with_nuls() {
        let dir = std::env::temp_dir().join(format!("envd-identity-{}", std::process::id()));
        let hash = hex::encode(Sha512::digest(b"token"));
        for pad in [0, 600] {
            let filler = "x".repeat(pad);
            let text = format!(
                r#"{{"restoreID":"r1","instanceID":"sb-1","envID":"{filler}","accessTokenHash":"{hash}"}}"#
            );
            let mut bytes = text.into_bytes();
            bytes.resize(SIZE, 0);
            std::fs::write(&dir, &bytes).unwrap();
            let source = Source {
                channel: Channel::FwCfg(FwCfg::new(dir.clone())),
            };
            let identity = source.read().unwrap();
            assert_eq!(
                (identity.restore_id.as_str(), identity.env_id.len()),
                ("r1", pad)
            );
            assert!(
                identity.trusts(b"token") && !identity.trusts(b"other") && !identity.trusts(b"")
            );
        }
        let source = || Source {
            channel: Channel::FwCfg(FwCfg::new(dir.clone())),
        };
        let kept = source();
        assert!(kept.read().is_some());
        let stale = FwCfg::new(dir.clone());
        // A folder can be opened and not read, like a file whose module is gone.
        *stale.kept.lock().unwrap() = Some(File::open("/").unwrap());
        assert!(stale.read().is_ok(), "it is opened anew");
        std::fs::write(&dir, b"{}").unwrap();
        assert!(kept.read().is_none(), "it is read anew");
        std::fs::remove_file(&dir).unwrap();
        assert!(source().read().is_none());
        assert!(Source::new(false).read().is_none());
    }

    #[test]
    fn firecracker_tells_by_its_metadata_service() {
        let address = super::super::mmds::tests::fake(
            r#"{"instanceID":"sb-2","envID":"minimal","accessTokenHash":"9f8c5a0e","other":{"a":1}}"#,
        );
        let source = Source {
            channel: Channel::Mmds(address),
        };
        let identity = source.read().unwrap();
        assert_eq!(
            (identity.instance_id.as_str(), identity.restore_id.as_str()),
            ("sb-2", "9f8c5a0e")
        );
        assert!(!identity.trusts(b"token"), "another token's hash");
        let address = super::super::mmds::tests::fake(r#"{"envID":"minimal"}"#);
        let source = Source {
            channel: Channel::Mmds(address),
        };
        assert!(source.read().is_none(), "nothing tells its restores apart");
    }
}
