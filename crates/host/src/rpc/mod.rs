//! The host agent's RPC service: requests are checked and turned into our own types here,
//! and into nothing else.

mod diff;
mod drain;
mod exec;
mod files;
mod history;
mod network;
mod program;
mod sandboxes;
mod service;
mod snapshots;

pub use service::HostRpc;

use std::io;
use std::sync::Arc;

use connectrpc::{ConnectError, ErrorCode};
use wrenn_snapshot::SnapshotError;
use wrenn_types::{SandboxId, ShapeError};
use wrenn_vmm::VmmError;

use crate::capacity::CapacityError;
use crate::guest::chain;
use crate::machine::MachineError;
use crate::sandbox::{Bond, SandboxError};
use crate::template::TemplateError;

/// Trailer that says that it is the sandbox that is missing, not a file or process in it.
pub const REASON_HEADER: &str = "wrenn-reason";

/// With the reason `sandbox_died`: the class of the cause, as in a death certificate.
pub const CAUSE_HEADER: &str = "wrenn-cause";

fn sandbox_id(text: &str) -> Result<SandboxId, ConnectError> {
    text.parse()
        .map_err(|e: wrenn_types::IdError| ConnectError::invalid_argument(e.to_string()))
}

fn bad_shape(error: ShapeError) -> ConnectError {
    ConnectError::invalid_argument(error.to_string())
}

/// Says more than the code does, also where a stream that has begun ends with it.
fn with_reason(error: ConnectError, reason: &'static str) -> ConnectError {
    with_header(error, REASON_HEADER, reason)
}

fn with_header(mut error: ConnectError, name: &'static str, value: &'static str) -> ConnectError {
    let value = http::HeaderValue::from_static(value);
    error.trailers_mut().insert(name, value.clone());
    error.response_headers_mut().insert(name, value);
    error
}

/// What the guest agent's refusal means to whoever asked the host: it knows the host's
/// token, so "unauthenticated" is about the user that the command names.
fn refused(mut error: ConnectError) -> ConnectError {
    if error.code == ErrorCode::Unauthenticated {
        error.code = ErrorCode::InvalidArgument;
    }
    error
}

/// The answer of a machine, or why there will be none.
async fn while_there<T, E: Into<ConnectError>>(
    bond: &mut Bond,
    asked: impl Future<Output = Result<T, E>>,
) -> Result<T, ConnectError> {
    tokio::select! {
        // An answer that has come counts.
        biased;
        answer = asked => answer.map_err(Into::into),
        lost = bond.lost() => Err(lost.into()),
    }
}

fn snapshot_failure(error: SnapshotError) -> ConnectError {
    let text = chain(&error);
    match &error {
        SnapshotError::NotFound { .. } => {
            with_reason(ConnectError::not_found(text), "snapshot_not_found")
        }
        SnapshotError::Shape { .. } => ConnectError::invalid_argument(text),
        _ if storage_full(&error) => disk_full(&text),
        _ => {
            tracing::error!(error = %text, "a request failed");
            ConnectError::internal(text)
        }
    }
}

/// The disk of this host is full, which no other request and no waiting changes.
fn disk_full(text: &str) -> ConnectError {
    tracing::error!(error = %text, "a request failed: the disk is full");
    let what = format!("the host's disk is full: {text}");
    with_reason(ConnectError::resource_exhausted(what), "host_disk_full")
}

/// Whether a full disk is behind this error.
fn storage_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::StorageFull) {
            return true;
        }
        next = error.source();
    }
    false
}

/// The same where the words of another process are all there is.
fn said_to_be_full(error: &SandboxError) -> bool {
    let SandboxError::Machine(MachineError::Vmm(error)) = error else {
        return false;
    };
    let own_words = matches!(
        error,
        VmmError::Keeper(_) | VmmError::State { .. } | VmmError::DiskLayer { .. }
    ) || matches!(error, VmmError::Qmp { .. } | VmmError::Api { .. });
    own_words && chain(error).contains("No space left on device")
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
            SandboxError::Capacity(CapacityError::Disk { .. }) => return disk_full(&text),
            SandboxError::Unresponsive(_) => {
                return with_reason(ConnectError::unavailable(text), "guest_unresponsive");
            }
            SandboxError::Capacity(_) => {
                return with_reason(ConnectError::resource_exhausted(text), "no_capacity");
            }
            SandboxError::ForeignSnapshot { .. } => {
                return with_reason(ConnectError::not_found(text), "snapshot_not_found");
            }
            SandboxError::Died { cause, .. } => {
                let error = with_reason(ConnectError::aborted(text), "sandbox_died");
                return with_header(error, CAUSE_HEADER, cause);
            }
            SandboxError::Over { .. } | SandboxError::PutAway(_) | SandboxError::Replaced(_) => {
                return with_reason(ConnectError::aborted(text), "interrupted");
            }
            SandboxError::Network(_) => return ConnectError::invalid_argument(text),
            SandboxError::Draining => {
                return with_reason(ConnectError::unavailable(text), "draining");
            }
            SandboxError::Ending => ConnectError::unavailable(text.clone()),
            _ if storage_full(&error) || said_to_be_full(&error) => return disk_full(&text),
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
