//! Failures in the two forms clients expect.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::json;

use crate::app::{Code, Failure};

/// `true` or `false`: whether E2B's clients should try again by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");

fn status(code: Code) -> StatusCode {
    StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// A failure as the native API tells it.
#[derive(Debug)]
pub(crate) struct ApiError(pub(crate) Failure);

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        ApiError(failure)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Failure {
            code,
            message,
            mut details,
            ..
        } = self.0;
        details.insert("code".to_owned(), code.as_str().into());
        details.insert("message".to_owned(), message.into());
        (status(code), Json(json!({ "error": details }))).into_response()
    }
}

/// A failure as E2B's clients read it.
#[derive(Debug)]
pub(crate) struct E2bError(pub(crate) Failure);

impl From<Failure> for E2bError {
    fn from(failure: Failure) -> Self {
        E2bError(failure)
    }
}

impl From<ApiError> for E2bError {
    fn from(ApiError(failure): ApiError) -> Self {
        E2bError(failure)
    }
}

impl IntoResponse for E2bError {
    fn into_response(self) -> Response {
        let failure = self.0;
        let mut body = json!({ "code": failure.code.status(), "message": failure.message });
        if let Some(word) = failure.e2b {
            body["error_code"] = word.into();
        }
        let mut response = (status(failure.code), Json(body)).into_response();
        // What a repetition can change is left to the clients' own rules.
        let passes = matches!(failure.code, Code::HostUnavailable | Code::NoHostsAvailable)
            || failure.e2b == Some("idempotency_request_in_progress");
        if !passes {
            let no = HeaderValue::from_static("false");
            response.headers_mut().insert(SHOULD_RETRY, no);
        }
        response
    }
}

/// A failure that was met before a route's own code, in the form that its path calls for.
pub(crate) fn refuse(path: &str, failure: Failure) -> Response {
    if path == "/v1" || path.starts_with("/v1/") {
        ApiError(failure).into_response()
    } else {
        E2bError(failure).into_response()
    }
}
