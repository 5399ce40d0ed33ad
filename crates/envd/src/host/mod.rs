//! The half of the agent that belongs to the host: the restore hook, the quiescing before a
//! freeze, health and metrics.
//!
//! ```text
//!              /snapshot/prepare           freeze, restore           /init
//!   serving ───────────────────▶ prepared ─────────────────▶ restored ─────▶ serving
//!      ▲                            │  /snapshot/undo            │ /health: 503
//!      └────────────────────────────┘                           └ nothing of users runs
//! ```

mod certificate;
mod guest;
mod identity;
mod init;
mod inventory;
mod memory;
mod metrics;
mod mmds;
mod snapshot;
mod timestamp;

use std::sync::Arc;
use std::time::Instant;

use axum::extract::State as Extract;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

pub use self::certificate::RESTORED_HEADER;
pub use self::identity::Identity;
use self::identity::Source;
use self::init::Hook;
use self::metrics::CpuClock;
use self::snapshot::Freeze;
use crate::ports::Ports;
use crate::server::connections::Connections;
use crate::server::error_response;
use crate::state::State;

/// Version of the guest protocol as E2B's clients read it: what they may use depends on it.
pub const ENVD_VERSION: &str = "0.6.13";
/// Our own version.
pub const WRENN_VERSION: &str = env!("CARGO_PKG_VERSION");
/// The largest body of a host route.
const MAX_BODY: usize = 1 << 20;
/// The route of a rehearsal.
const REHEARSE: &str = "/snapshot/rehearse";

/// See the module.
#[derive(Debug)]
pub struct Host {
    state: Arc<State>,
    connections: Arc<Connections>,
    ports: Arc<Ports>,
    identity: Source,
    /// Serialises `/init`, `/snapshot/prepare` and `/snapshot/undo`, and holds what they leave.
    life: tokio::sync::Mutex<Life>,
    /// The identity for which the hook has run last.
    ready_for: std::sync::Mutex<Option<String>>,
    cpu: CpuClock,
}

#[derive(Debug, Default)]
struct Life {
    hook: Hook,
    freeze: Option<Freeze>,
}

impl Host {
    /// A host half that has not been initialised.
    pub fn new(state: Arc<State>, ports: Arc<Ports>) -> Arc<Host> {
        let identity = Source::new(state.settings.in_vm);
        let connections = Connections::new(identity.read().map(|i| i.restore_id));
        Arc::new(Host {
            state,
            connections,
            ports,
            identity,
            life: tokio::sync::Mutex::default(),
            ready_for: std::sync::Mutex::default(),
            cpu: CpuClock::default(),
        })
    }

    /// All connections of the agent.
    pub fn connections(&self) -> &Arc<Connections> {
        &self.connections
    }

    /// What machine this is now, as the host has written it beside our memory.
    pub fn identity(&self) -> Option<Identity> {
        self.identity.read()
    }

    fn ready_for(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.ready_for
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn versions() -> [(HeaderName, HeaderValue); 2] {
    [
        (
            HeaderName::from_static("x-envd-version"),
            HeaderValue::from_static(ENVD_VERSION),
        ),
        (
            HeaderName::from_static("x-wrenn-version"),
            HeaderValue::from_static(WRENN_VERSION),
        ),
    ]
}

async fn health(Extract(host): Extract<Arc<Host>>) -> Response {
    if let Some(identity) = host.identity()
        && *host.ready_for() != Some(identity.restore_id.clone())
    {
        // What needs no secret is done now: who still holds a connection from before the
        // restore learns it.
        host.connections.restored(None, Some(&identity.restore_id));
        let message = "the restore hook has not run for this machine: call /init";
        return (
            versions(),
            error_response(StatusCode::SERVICE_UNAVAILABLE, message),
        )
            .into_response();
    }
    (StatusCode::NO_CONTENT, versions()).into_response()
}

async fn envs(Extract(host): Extract<Arc<Host>>) -> Response {
    axum::Json(&host.state.config().envs).into_response()
}

async fn metrics(Extract(host): Extract<Arc<Host>>) -> Response {
    match metrics::read(&host.cpu) {
        Ok(metrics) => axum::Json(metrics).into_response(),
        Err(error) => error_response(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

async fn ports(Extract(host): Extract<Arc<Host>>) -> Response {
    axum::Json(host.ports.list()).into_response()
}

/// What became of an agent that crashed; see [`crate::handover`].
async fn restarts(Extract(host): Extract<Arc<Host>>) -> Response {
    let report = host.state.handover.as_ref().map(|h| h.report());
    axum::Json(report.unwrap_or_default()).into_response()
}

async fn init(
    Extract(host): Extract<Arc<Host>>,
    carrier: Option<axum::Extension<crate::server::connections::ConnectionId>>,
    headers: HeaderMap,
    body: axum::body::Bytes,
) -> Response {
    let token = headers
        .get(crate::auth::TOKEN_HEADER)
        .map(|v| v.as_bytes().to_vec());
    let carrier = carrier.map(|c| c.0);
    // On a task of its own: a host that hangs up in the middle leaves no half-run hook.
    let done = tokio::spawn(async move { host.init(token.as_deref(), carrier, &body).await }).await;
    match done {
        Ok(Ok(certificate)) => {
            let mut answer = (StatusCode::NO_CONTENT, versions()).into_response();
            if let Some(value) = certificate.header() {
                answer.headers_mut().insert(RESTORED_HEADER, value);
            }
            answer
        }
        Ok(Err(error)) => {
            if error.status().is_server_error() {
                tracing::error!(%error, "the restore hook failed");
            } else {
                tracing::warn!(%error, "refused to run the restore hook");
            }
            error_response(error.status(), &error.to_string())
        }
        Err(panic) => error_response(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("the restore hook broke: {panic}"),
        ),
    }
}

/// Both for a freeze and for its rehearsal; see [`Host::prepare`].
async fn prepare(
    Extract(host): Extract<Arc<Host>>,
    axum::extract::Query(query): axum::extract::Query<snapshot::Query>,
    uri: http::Uri,
) -> Response {
    let rehearsal = uri.path() == REHEARSE;
    finish(tokio::spawn(async move { host.prepare(&query, rehearsal).await }).await)
}

async fn undo(Extract(host): Extract<Arc<Host>>, body: axum::body::Bytes) -> Response {
    let at = Instant::now();
    match snapshot::told(&body, at) {
        Ok(told) => finish(tokio::spawn(async move { host.undo(told).await }).await),
        Err(error) => error_response(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

fn finish(done: Result<Result<(), snapshot::SnapshotError>, tokio::task::JoinError>) -> Response {
    match done {
        Ok(Ok(())) => StatusCode::NO_CONTENT.into_response(),
        Ok(Err(error)) => {
            tracing::error!(%error, "quiescing failed");
            error_response(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())
        }
        Err(panic) => error_response(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("quiescing broke: {panic}"),
        ),
    }
}

/// The host's routes, and the public ones beside them.
pub fn router(host: Arc<Host>) -> axum::Router {
    axum::Router::new()
        .route("/health", get(health))
        .route("/envs", get(envs))
        .route("/metrics", get(metrics))
        .route("/ports", get(ports))
        .route("/restarts", get(restarts))
        .route("/init", post(init))
        .route("/snapshot/prepare", post(prepare))
        .route("/snapshot/undo", post(undo))
        .route(REHEARSE, post(prepare))
        .route("/snapshot/inventory", post(inventory::inventory))
        .route("/snapshot/digests", post(inventory::digests))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(host)
}
