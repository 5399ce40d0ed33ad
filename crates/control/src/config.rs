//! What a control plane is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use wrenn_types::ShapeLimits;

/// The domain of sandbox hosts where none is configured. Browsers, curl and systemd-resolved
/// take every name below `localhost` for this machine.
pub const DEFAULT_DOMAIN: &str = "localhost";

/// What a control plane is told when it starts.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// Holds the database and the first API key; made if missing.
    pub data_dir: PathBuf,
    /// Where the API listens; shown in the OpenAPI document's server list.
    pub listen: SocketAddr,
    /// Sandboxes are reached as `{port}-{id}.{domain}`; may carry `:port`. E2B's clients are told of
    /// it unless it is [`DEFAULT_DOMAIN`].
    pub domain: String,
    /// The API's address as clients see it, when that is not `http://{listen}`.
    pub public_url: Option<String>,
    /// The largest sandbox; `None`: what the host has.
    pub limits: Option<ShapeLimits>,
    /// How often rows are compared with what the host runs.
    pub reconcile_every: Duration,
}

impl ControlConfig {
    /// The embedded default for a data folder and an address.
    pub fn new(data_dir: impl Into<PathBuf>, listen: SocketAddr) -> Self {
        Self {
            data_dir: data_dir.into(),
            listen,
            domain: DEFAULT_DOMAIN.to_owned(),
            public_url: None,
            limits: None,
            reconcile_every: Duration::from_secs(2),
        }
    }

    /// The API's address as clients see it, without a slash at its end.
    pub fn url(&self) -> String {
        match &self.public_url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => format!("http://{}", self.listen),
        }
    }
}
