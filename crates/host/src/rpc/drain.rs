//! Draining: nothing is started any more.

use connectrpc::ConnectError;
use wrenn_types::SandboxState;
use wrenn_wire::wrenn::host::v1 as rpc;

use super::HostRpc;
use crate::activity::unix_ms;
use crate::sandbox::{Handle, SandboxError};

impl HostRpc {
    /// What runs goes on; what is paused is not woken by a host that drains.
    pub(super) fn admit_start_of(&self, handle: &Handle) -> Result<(), SandboxError> {
        match handle.view().state {
            SandboxState::Paused => self.0.manager.admit(),
            _ => Ok(()),
        }
    }

    pub(super) async fn set_draining(
        &self,
        draining: bool,
    ) -> Result<rpc::SetDrainingResponse, ConnectError> {
        let drain = self.0.drain.clone();
        let set = tokio::task::spawn_blocking(move || drain.set(draining))
            .await
            .unwrap_or_else(|join| Err(std::io::Error::other(join)));
        let since = set.map_err(|error| {
            tracing::error!(draining, %error, "whether this host drains could not be written down");
            ConnectError::internal(format!(
                "whether this host drains could not be written down: {error}"
            ))
        })?;
        tracing::info!(draining, "draining was set");
        Ok(rpc::SetDrainingResponse {
            draining_since_unix_ms: since.map_or(0, unix_ms),
            ..Default::default()
        })
    }
}
