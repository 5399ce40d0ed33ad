//! Why the server did not do what it was asked for, and what to do about it.

use std::error::Error;
use std::io;
use std::path::PathBuf;

/// Where the key came from.
#[derive(Debug, Clone)]
pub(crate) enum KeyOrigin {
    /// A flag, a variable or the configuration file.
    Said(String),
    /// The data folder of the server on this machine.
    File(PathBuf),
}

/// What can go wrong between this program and the server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nothing answers there.
    #[error("no server at {url}")]
    NoServer {
        /// Where.
        url: String,
        /// What the system says.
        source: Box<dyn Error + Send + Sync>,
    },
    /// It does not answer in time.
    #[error("the server at {url} does not answer")]
    Timeout {
        /// Where.
        url: String,
    },
    /// The connection broke.
    #[error("the connection to the server at {url} broke")]
    Broken {
        /// Where.
        url: String,
        /// What the system says.
        source: Box<dyn Error + Send + Sync>,
    },
    /// It does not take the key.
    #[error("the server at {url} does not accept this API key")]
    Unauthorized {
        /// Where.
        url: String,
        /// Which key.
        origin: KeyOrigin,
    },
    /// It says no, in its own words.
    #[error("{message}")]
    Api {
        /// HTTP status.
        status: u16,
        /// Stable word.
        code: String,
        /// For people.
        message: String,
    },
    /// Something that is no Wrenn server.
    #[error("what answers at {url} is no Wrenn server (HTTP {status} without a Wrenn error)")]
    NotOurs {
        /// Where.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// An answer this program does not understand.
    #[error("the server's answer to {url} is not what this wrenn expects")]
    Answer {
        /// What was asked.
        url: String,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A stream that ended before its end.
    #[error("the stream from the server ended too early: {reason}")]
    StreamEnded {
        /// What was missing.
        reason: String,
    },
    /// No usable address.
    #[error("`{given}` is no server address: {reason}")]
    Address {
        /// What was said.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No key anywhere.
    #[error("no API key: none was given, and {path} cannot be read")]
    NoKey {
        /// The file of last resort.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A key file that holds none.
    #[error("{path} does not hold an API key: {reason}")]
    KeyFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An abbreviation that fits several sandboxes.
    #[error("`{given}` may be any of {}", candidates.join(", "))]
    Ambiguous {
        /// The abbreviation.
        given: String,
        /// What it fits.
        candidates: Vec<String>,
    },
    /// An abbreviation that fits none.
    #[error("no sandbox `{given}`")]
    UnknownSandbox {
        /// What was said.
        given: String,
    },
    /// A template the server does not have.
    #[error("no template `{given}`")]
    UnknownTemplate {
        /// What was said.
        given: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The HTTP client cannot be made.
    #[error("cannot set up the HTTP client")]
    Setup {
        /// Why.
        source: reqwest::Error,
    },
}

/// What to do about an error of the server's, by its stable word.
pub(crate) fn hint_for(code: &str) -> Option<&'static str> {
    match code {
        "draining" => Some("`wrenn drain --off` has it start sandboxes again"),
        "no_space" => Some("`wrenn gc` removes what nothing needs"),
        "host_disk_full" => {
            Some("free some space for its data folder; `wrenn gc` removes what nothing needs")
        }
        "sandbox_died" => Some("`wrenn sandbox why` shows its last words"),
        "sandbox_snapshot_guest_agent_unresponsive" => {
            Some("`wrenn sandbox logs` shows its console; a guest that is busy may answer later")
        }
        "host_unavailable" | "no_hosts_available" => {
            Some("`wrenn doctor` shows what this host can do")
        }
        _ => None,
    }
}

impl ClientError {
    /// The stable word for programs; the server's own where it gave one.
    pub(crate) fn code(&self) -> &str {
        match self {
            ClientError::NoServer { .. } => "no_server",
            ClientError::Timeout { .. } => "timeout",
            ClientError::Broken { .. } | ClientError::StreamEnded { .. } => "connection_broken",
            ClientError::Unauthorized { .. } => "unauthorized",
            ClientError::Api { code, .. } => code,
            ClientError::NotOurs { .. } | ClientError::Answer { .. } => "not_understood",
            ClientError::Address { .. } => "settings",
            ClientError::NoKey { .. } | ClientError::KeyFile { .. } => "no_api_key",
            ClientError::Ambiguous { .. } => "ambiguous_id",
            ClientError::UnknownSandbox { .. } | ClientError::UnknownTemplate { .. } => "not_found",
            ClientError::Setup { .. } => "failed",
        }
    }

    /// What to do about it.
    pub(crate) fn hints(&self) -> Vec<String> {
        let hint = match self {
            ClientError::NoServer { .. } => {
                "start one with `wrenn up`, or name another with --url or WRENN_URL".to_owned()
            }
            ClientError::Timeout { .. } => "its log says what it is doing".to_owned(),
            ClientError::Unauthorized { origin, .. } => match origin {
                KeyOrigin::Said(origin) => format!(
                    "the key came from {origin}; the server's first key is in its data folder, in the file api-key"
                ),
                KeyOrigin::File(path) => format!(
                    "the key came from {}; if the server runs on another data folder, name it with --data-dir, \
                     or give a key with WRENN_API_KEY",
                    path.display()
                ),
            },
            ClientError::NotOurs { .. } => "is the address right? See --url and WRENN_URL".to_owned(),
            ClientError::Answer { .. } => {
                "`wrenn version` shows whether server and program are of one version".to_owned()
            }
            ClientError::NoKey { path, source } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    format!("{} is for root: use sudo, or put the key into WRENN_API_KEY", path.display())
                }
                _ => "`wrenn up` makes the first key; for a server elsewhere put its key into WRENN_API_KEY".to_owned(),
            },
            ClientError::UnknownSandbox { .. } => "`wrenn sandbox list` shows those there are".to_owned(),
            ClientError::UnknownTemplate { known, .. } if known.is_empty() => {
                "there is none yet: `sudo wrenn image build minimal` makes the first".to_owned()
            }
            ClientError::UnknownTemplate { known, .. } => format!("there are: {}", known.join(", ")),
            ClientError::Api { code, .. } => match hint_for(code) {
                Some(hint) => hint.to_owned(),
                None => return Vec::new(),
            },
            ClientError::Broken { .. }
            | ClientError::StreamEnded { .. }
            | ClientError::Address { .. }
            | ClientError::KeyFile { .. }
            | ClientError::Ambiguous { .. }
            | ClientError::Setup { .. } => return Vec::new(),
        };
        vec![hint]
    }

    /// Whether the server says that there is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(
            self,
            ClientError::Api { status: 404, .. } | ClientError::UnknownSandbox { .. }
        )
    }
}
