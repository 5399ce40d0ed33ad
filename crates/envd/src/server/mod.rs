//! Accept loop, connections, routes.

pub mod connections;
mod listen;
mod routes;

use axum::response::{IntoResponse, Response};
use connectrpc::ConnectError;
use http::StatusCode;

pub use self::listen::serve;
pub use self::routes::{Services, router};

/// An error of a plain HTTP route: `{"code": 401, "message": "…"}`.
pub fn error_response(status: StatusCode, message: &str) -> Response {
    let body = serde_json::json!({ "code": status.as_u16(), "message": message });
    (status, axum::Json(body)).into_response()
}

/// Whether a path belongs to an RPC service.
pub fn is_rpc(path: &str) -> bool {
    path.starts_with("/process.Process/") || path.starts_with("/filesystem.Filesystem/")
}

/// An error before an RPC is dispatched, as Connect clients read it.
pub fn rpc_error(error: &ConnectError) -> Response {
    let headers = [(http::header::CONTENT_TYPE, "application/json")];
    (error.http_status(), headers, error.to_json()).into_response()
}
