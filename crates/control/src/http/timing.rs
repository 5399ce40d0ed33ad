//! `Server-Timing` (W3C): where the time of an operation went.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;

use crate::app::Phase;

pub(crate) const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// The phases as a header; names are reduced to what a token may hold (RFC 9110, 5.6.2).
pub(crate) fn server_timing(phases: &[Phase]) -> Option<HeaderValue> {
    let entry = |phase: &Phase| {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        let name: String = phase
            .name
            .chars()
            .map(|c| if ok(c) { c } else { '_' })
            .collect();
        let ms = phase.took.as_secs_f64() * 1000.0;
        format!(
            "{};dur={ms:.3}",
            if name.is_empty() { "_" } else { name.as_str() }
        )
    };
    let text: Vec<String> = phases.iter().map(entry).collect();
    if text.is_empty() {
        return None;
    }
    HeaderValue::from_str(&text.join(", ")).ok()
}

/// An answer that says where its time went.
pub(crate) fn with_timing(status: StatusCode, body: impl Serialize, phases: &[Phase]) -> Response {
    timed((status, axum::Json(body)).into_response(), phases)
}

/// Adds to an answer where its time went.
pub(crate) fn timed(mut response: Response, phases: &[Phase]) -> Response {
    if let Some(timing) = server_timing(phases) {
        response.headers_mut().insert(SERVER_TIMING, timing);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn phases_become_tokens_with_milliseconds() {
        let phase = |name: &str, us| Phase {
            name: name.to_owned(),
            took: Duration::from_micros(us),
        };
        let value = server_timing(&[phase("restore", 55_123), phase("wait for it", 4)]);
        assert_eq!(value.unwrap(), "restore;dur=55.123, wait_for_it;dur=0.004");
        assert_eq!(server_timing(&[]), None);
    }
}
