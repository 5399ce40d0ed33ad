//! HTTP: two translations of the same use cases, and the proxy in front of both.
//!
//! ```text
//! request ─┬─ for a sandbox's port ──▶ wrenn_proxy
//!          └─ for us ─┬─ /v1/…  native ──┐
//!                     ├─ /…     E2B ─────┼─▶ app
//!                     └─ /health, /docs ─┘
//! ```

mod e2b;
mod error;
mod extract;
mod native;
mod openapi;
mod page;
mod prometheus;
mod timing;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::Response;
use http::{StatusCode, Uri};
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) use error::{ApiError, refuse};
pub(crate) use openapi::document;

use crate::app::{App, Code, Failure};
use crate::auth::{key_if_any, key_now_or_first, require_key};

/// Largest body that is not a file: 2 MiB.
const BODY_LIMIT: usize = 2 * 1024 * 1024;

/// The path under which the published native client knows sandboxes.
const CAPSULES: &str = "/v1/capsules";
const SANDBOXES: &str = "/v1/sandboxes";

/// The routes of the API with their description: closed ones, WebSockets, open ones.
struct Routes {
    closed: OpenApiRouter<Arc<App>>,
    sockets: OpenApiRouter<Arc<App>>,
    /// Without a key they say less.
    watched: OpenApiRouter<Arc<App>>,
    open: OpenApiRouter<Arc<App>>,
}

fn routes() -> Routes {
    Routes {
        closed: OpenApiRouter::new()
            .merge(native::routes())
            .merge(e2b::routes()),
        sockets: native::sockets(),
        watched: OpenApiRouter::new().routes(routes!(prometheus::metrics)),
        open: native::open_routes(),
    }
}

/// Everything that this server answers, proxied requests included.
pub(crate) fn router(app: Arc<App>) -> Router {
    let Routes {
        closed,
        sockets,
        watched,
        open,
    } = routes();
    let closed = Router::from(closed)
        .merge(e2b::unsupported())
        .route_layer(from_fn_with_state(Arc::clone(&app), require_key));
    let sockets =
        Router::from(sockets).route_layer(from_fn_with_state(Arc::clone(&app), key_now_or_first));
    let watched =
        Router::from(watched).route_layer(from_fn_with_state(Arc::clone(&app), key_if_any));
    let inner = Router::from(open)
        .merge(watched)
        .merge(closed)
        .merge(sockets)
        .with_state(Arc::clone(&app))
        .merge(openapi::routes())
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(log));
    Router::new().fallback_service(tower::service_fn(move |request: Request| {
        let (app, inner) = (Arc::clone(&app), inner.clone());
        async move { front(app, inner, request).await }
    }))
}

/// Tells requests for sandboxes' ports from those for the API.
async fn front(
    app: Arc<App>,
    inner: Router,
    request: Request,
) -> Result<Response, std::convert::Infallible> {
    let (mut parts, body) = request.into_parts();
    if let Some(target) = app.proxy.target(&parts) {
        if let Err(failure) = app.admit() {
            return Ok(refuse("/", failure));
        }
        return Ok(app
            .proxy
            .handle(target, Request::from_parts(parts, body))
            .await);
    }
    if let Some(uri) = as_sandboxes(&parts.uri) {
        parts.uri = uri;
    }
    inner.oneshot(Request::from_parts(parts, body)).await
}

/// The same under `/v1/sandboxes`, for what is under `/v1/capsules`.
fn as_sandboxes(uri: &Uri) -> Option<Uri> {
    let rest = uri.path().strip_prefix(CAPSULES)?;
    if !(rest.is_empty() || rest.starts_with('/')) {
        return None;
    }
    let path = match uri.query() {
        Some(query) => format!("{SANDBOXES}{rest}?{query}"),
        None => format!("{SANDBOXES}{rest}"),
    };
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(path.parse().ok()?);
    Uri::from_parts(parts).ok()
}

async fn unknown_route(request: Request) -> Response {
    let path = request.uri().path();
    let shown: String = path.chars().take(100).collect();
    let message = format!(
        "there is nothing at {} {shown}; /docs describes the API",
        request.method()
    );
    refuse(path, Failure::not_found(message))
}

async fn wrong_method(request: Request) -> Response {
    let path = request.uri().path();
    let message = format!(
        "{} cannot be done to {path}; /docs describes the API",
        request.method()
    );
    refuse(path, Failure::new(Code::MethodNotAllowed, message))
}

/// One request's panic is that request's failure.
fn panicked(cause: Box<dyn std::any::Any + Send>) -> http::Response<Body> {
    let text = cause
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| cause.downcast_ref::<&str>().copied())
        .unwrap_or("of unknown cause");
    tracing::error!(panic = text, "a request handler panicked");
    let message = "the server failed at this request; its log says why";
    refuse("/v1/", Failure::new(Code::InternalError, message))
}

async fn log(request: Request, next: axum::middleware::Next) -> Response {
    let begun = Instant::now();
    // The path only: queries may hold what is nobody's business.
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let (status, ms) = (response.status(), begun.elapsed().as_millis());
    // That it is not ready is what was asked for.
    let failed = status >= StatusCode::INTERNAL_SERVER_ERROR
        && status != StatusCode::NOT_IMPLEMENTED
        && path != "/ready";
    if failed {
        tracing::warn!(%method, path, status = status.as_u16(), ms, "request");
    } else {
        tracing::debug!(%method, path, status = status.as_u16(), ms, "request");
    }
    response
}
