//! All routes of the agent.

use std::sync::Arc;

use axum::middleware;
use connectrpc::{ConnectRpcService, Limits};
use http::StatusCode;
use tower_http::catch_panic::CatchPanicLayer;
use wrenn_wire::filesystem::FilesystemExt;
use wrenn_wire::process::ProcessExt;

use super::error_response;
use crate::auth;
use crate::filesystem::FilesystemService;
use crate::host::Host;
use crate::process::ProcessService;
use crate::state::State;

/// Largest RPC request, in one message and as a whole. Streams of input have no end of
/// their own; each of their messages has this one.
const MAX_MESSAGE: usize = 16 << 20;

/// What the routes lead to.
pub struct Services {
    /// What all share.
    pub state: Arc<State>,
    /// The half that belongs to the host.
    pub host: Arc<Host>,
    /// Programs.
    pub processes: Arc<ProcessService>,
}

/// The whole agent as one router.
pub fn router(services: Services) -> axum::Router {
    let Services {
        state,
        host,
        processes,
    } = services;
    let rpc = processes.register(connectrpc::Router::new());
    let rpc = Arc::new(FilesystemService::new(Arc::clone(&state))).register(rpc);
    let limits = Limits::default()
        .with_max_request_body_size(MAX_MESSAGE)
        .with_max_message_size(MAX_MESSAGE);
    let rpc = ConnectRpcService::new(rpc).with_limits(limits);
    let rpc = axum::Router::new()
        .route_service("/process.Process/{method}", rpc.clone())
        .route_service("/filesystem.Filesystem/{method}", rpc);
    axum::Router::new()
        .merge(crate::host::router(host))
        .merge(crate::files::router(Arc::clone(&state)))
        .merge(rpc)
        .fallback(|| async { error_response(StatusCode::NOT_FOUND, "no such route") })
        .layer(middleware::from_fn_with_state(state, auth::check))
        .layer(CatchPanicLayer::new())
}
