//! The half of the agent that belongs to the host.

use std::sync::Arc;

use axum::routing::get;
use http::StatusCode;

use crate::server::connections::Connections;
use crate::state::State;

/// Version of the guest protocol as E2B's clients read it.
pub const ENVD_VERSION: &str = "0.6.13";

/// See the module.
pub struct Host {
    /// What all share.
    pub state: Arc<State>,
    /// Connections.
    pub connections: Arc<Connections>,
}

/// Routes.
pub fn router(host: Arc<Host>) -> axum::Router {
    axum::Router::new().route("/health", get(|| async { StatusCode::NO_CONTENT })).with_state(host)
}
