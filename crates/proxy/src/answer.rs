//! What the proxy says by itself: JSON for programs, in the words E2B's clients compare, and a page
//! for browsers.

use axum::body::Body;
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde::Serialize;
use wrenn_types::SandboxId;

use crate::{DialError, TargetError};

/// E2B's body: its clients compare `message` word for word.
#[derive(Serialize)]
struct Refusal<'a> {
    #[serde(rename = "sandboxId", skip_serializing_if = "Option::is_none")]
    sandbox: Option<String>,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    code: u16,
}

/// The answer to a request whose sandbox or port could not be reached.
pub(crate) fn unreachable(error: &DialError, headers: &HeaderMap) -> Response<Body> {
    let (sandbox, port, message) = match error {
        DialError::NotFound(sandbox) | DialError::NotRunning { sandbox, .. } => {
            (*sandbox, None, "The sandbox was not found")
        }
        DialError::PortClosed { sandbox, port } => (
            *sandbox,
            Some(*port),
            "The sandbox is running but port is not open",
        ),
        DialError::Io { sandbox, port, .. } => {
            (*sandbox, Some(*port), "The sandbox could not be reached")
        }
    };
    refuse(
        StatusCode::BAD_GATEWAY,
        Some(sandbox),
        port,
        message,
        headers,
    )
}

/// The answer to a request that was sent to the guest and got none.
pub(crate) fn broke_off(sandbox: SandboxId, port: u16, headers: &HeaderMap) -> Response<Body> {
    let message = "The program in the sandbox closed the connection without an answer";
    refuse(
        StatusCode::BAD_GATEWAY,
        Some(sandbox),
        Some(port),
        message,
        headers,
    )
}

/// The answer to a request that names no sandbox though it is meant for one.
pub(crate) fn malformed(error: &TargetError, headers: &HeaderMap) -> Response<Body> {
    refuse(
        StatusCode::BAD_REQUEST,
        None,
        None,
        &error.to_string(),
        headers,
    )
}

/// The answer to a route of the guest agent that is the host's own.
pub(crate) fn host_route(sandbox: SandboxId, headers: &HeaderMap) -> Response<Body> {
    refuse(
        StatusCode::NOT_FOUND,
        Some(sandbox),
        None,
        "Not found",
        headers,
    )
}

fn refuse(
    status: StatusCode,
    sandbox: Option<SandboxId>,
    port: Option<u16>,
    message: &str,
    headers: &HeaderMap,
) -> Response<Body> {
    let sandbox = sandbox.map(|id| id.to_string());
    let (kind, body) = if wants_page(headers) {
        (
            "text/html; charset=utf-8",
            page(status, sandbox.as_deref(), port, message),
        )
    } else {
        let code = status.as_u16();
        let refusal = Refusal {
            sandbox,
            message,
            port,
            code,
        };
        // Text and numbers always have a JSON form.
        (
            "application/json",
            serde_json::to_string(&refusal).unwrap_or_default(),
        )
    };
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Browsers name HTML among what they accept, programs do not.
fn wants_page(headers: &HeaderMap) -> bool {
    headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .any(|v| v.contains("text/html"))
}

fn page(status: StatusCode, sandbox: Option<&str>, port: Option<u16>, message: &str) -> String {
    let what = match (sandbox, port) {
        (Some(sandbox), Some(port)) => format!("<p>Port {port} of <code>{sandbox}</code></p>"),
        (Some(sandbox), None) => format!("<p><code>{sandbox}</code></p>"),
        (None, _) => String::new(),
    };
    let hint = match port {
        Some(port) => format!("<p>Is a program in the sandbox listening on port {port}?</p>"),
        None => String::new(),
    };
    // Part of it is what a stranger sent.
    let message = message.replace('&', "&amp;").replace('<', "&lt;");
    let code = status.as_u16();
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{code} · Wrenn</title>\
         <body style=\"font:16px/1.5 system-ui;max-width:36rem;margin:15vh auto;padding:0 1rem\">\
         <h1 style=\"font-size:1.3rem\">{message}</h1>{what}{hint}</body></html>\n"
    )
}
