//! The host agent's RPC service: requests are checked and turned into our own types here,
//! and into nothing else.

mod diff;
mod drain;
mod exec;
mod files;
mod history;
mod network;
mod sandboxes;
mod service;
mod snapshots;

pub use service::HostRpc;

use std::io;
use std::sync::Arc;

use connectrpc::ConnectError;
use wrenn_snapshot::SnapshotError;
use wrenn_types::{SandboxId, ShapeError};

use crate::guest::chain;
use crate::sandbox::SandboxError;
use crate::template::TemplateError;

/// Trailer that says that it is the sandbox that is missing, not a file or process in it.
pub const REASON_HEADER: &str = "wrenn-reason";

fn sandbox_id(text: &str) -> Result<SandboxId, ConnectError> {
    text.parse()
        .map_err(|e: wrenn_types::IdError| ConnectError::invalid_argument(e.to_string()))
}

fn bad_shape(error: ShapeError) -> ConnectError {
    ConnectError::invalid_argument(error.to_string())
}

fn with_reason(mut error: ConnectError, reason: &'static str) -> ConnectError {
    let value = http::HeaderValue::from_static(reason);
    error.response_headers_mut().insert(REASON_HEADER, value);
    error
}

fn snapshot_failure(error: SnapshotError) -> ConnectError {
    let text = chain(&error);
    match &error {
        SnapshotError::NotFound { .. } => {
            with_reason(ConnectError::not_found(text), "snapshot_not_found")
        }
        SnapshotError::Shape { .. } => ConnectError::invalid_argument(text),
        SnapshotError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            with_reason(ConnectError::resource_exhausted(text), "no_space")
        }
        _ => {
            tracing::error!(error = %text, "a request failed");
            ConnectError::internal(text)
        }
    }
}

impl From<SandboxError> for ConnectError {
    fn from(error: SandboxError) -> Self {
        let text = chain(&error);
        let refused = match &error {
            SandboxError::NotFound(_) => {
                return with_reason(ConnectError::not_found(text), "sandbox_not_found");
            }
            SandboxError::NotRunning { .. } => {
                return with_reason(ConnectError::failed_precondition(text), "not_running");
            }
            SandboxError::NotComparable(..) => return ConnectError::failed_precondition(text),
            SandboxError::Template(TemplateError::Unknown { .. }) => {
                return with_reason(ConnectError::not_found(text), "template_not_found");
            }
            SandboxError::Capacity(_) => {
                return with_reason(ConnectError::resource_exhausted(text), "no_capacity");
            }
            SandboxError::ForeignSnapshot { .. } => {
                return with_reason(ConnectError::not_found(text), "snapshot_not_found");
            }
            SandboxError::Network(_) => return ConnectError::invalid_argument(text),
            SandboxError::Draining => {
                return with_reason(ConnectError::unavailable(text), "draining");
            }
            SandboxError::Ending => ConnectError::unavailable(text.clone()),
            _ => ConnectError::internal(text.clone()),
        };
        match error {
            SandboxError::Guest(guest) => guest.into(),
            SandboxError::Snapshot(error) => snapshot_failure(error),
            SandboxError::Ending => refused,
            _ => {
                tracing::error!(error = %text, "a request failed");
                refused.with_source(Arc::new(error))
            }
        }
    }
}
