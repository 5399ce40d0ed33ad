//! Why a control plane could not start or go on.

use std::path::PathBuf;

/// Why a control plane could not start or go on. What goes wrong in one request is an
/// answer to that request instead.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A file or folder of the data folder.
    #[error("{what} {} failed", path.display())]
    File {
        /// What was done: "creating", "writing".
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The database could not be opened, migrated or asked.
    #[error(transparent)]
    Store(#[from] wrenn_store::StoreError),
    /// No random bytes for a key.
    #[error(transparent)]
    Secret(#[from] wrenn_types::SecretError),
    /// The listener failed.
    #[error("serving the API failed")]
    Serve(#[source] std::io::Error),
    /// The rows could not be compared with the host.
    #[error("comparing the sandboxes with their host failed: {0}")]
    Reconcile(String),
}
