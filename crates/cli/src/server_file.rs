//! `server.json`: the note a server leaves in its data folder, `{"address", "pid",
//! "on_stop"}`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::settings::OnStop;

const NAME: &str = "server.json";

/// Why the note cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerFileError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no such note.
    #[error("{path} is damaged")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Who serves a data folder, and where.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ServerFile {
    /// `http://address:port` or `address:port`.
    pub(crate) address: String,
    /// The process.
    pub(crate) pid: i32,
    /// What it does with its sandboxes when it ends.
    #[serde(default)]
    pub(crate) on_stop: OnStop,
}

impl ServerFile {
    /// Where the note of this data folder is.
    pub(crate) fn path(data_dir: &Path) -> PathBuf {
        data_dir.join(NAME)
    }

    /// The note, if there is one. It may be of a server that is gone.
    pub(crate) fn read(data_dir: &Path) -> Result<Option<Self>, ServerFileError> {
        let path = Self::path(data_dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ServerFileError::Read { path, source }),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| ServerFileError::Parse { path, source })
    }

    /// The address as a client uses it: "all addresses" means this machine.
    pub(crate) fn url(&self) -> String {
        let bare = self
            .address
            .strip_prefix("http://")
            .unwrap_or(&self.address)
            .trim_end_matches('/');
        let bare = match bare.rsplit_once(':') {
            Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
            Some(("[::]", port)) => format!("[::1]:{port}"),
            _ => bare.to_owned(),
        };
        format!("http://{bare}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_urls_one_can_connect_to() {
        let url = |address: &str| {
            ServerFile {
                address: address.to_owned(),
                pid: 1,
                on_stop: OnStop::Keep,
            }
            .url()
        };
        assert_eq!(url("127.0.0.1:3000"), "http://127.0.0.1:3000");
        assert_eq!(url("http://127.0.0.1:3000/"), "http://127.0.0.1:3000");
        assert_eq!(url("0.0.0.0:3000"), "http://127.0.0.1:3000");
        assert_eq!(url("[::]:3000"), "http://[::1]:3000");
    }

    #[test]
    fn absence_is_no_error_but_damage_is() {
        let folder = tempfile::tempdir().unwrap();
        assert!(ServerFile::read(folder.path()).unwrap().is_none());
        fs::write(
            ServerFile::path(folder.path()),
            r#"{"address":"127.0.0.1:1","pid":7,"more":1}"#,
        )
        .unwrap();
        assert_eq!(ServerFile::read(folder.path()).unwrap().unwrap().pid, 7);
        fs::write(ServerFile::path(folder.path()), "{").unwrap();
        assert!(matches!(
            ServerFile::read(folder.path()),
            Err(ServerFileError::Parse { .. })
        ));
    }
}
