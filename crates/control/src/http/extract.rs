//! Reading requests, with our own answers to what cannot be read.

use std::collections::BTreeMap;

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, RawQuery, Request};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use wrenn_store::RequestHash;
use wrenn_types::SandboxId;

use super::ApiError;
use crate::app::{Code, Failure};

/// A JSON body; none at all means an empty object. With it comes the hash of its meaning, for
/// idempotency.
pub(crate) struct Json<T>(pub(crate) T, pub(crate) RequestHash);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let target = request.uri().path_and_query().map(ToString::to_string);
        let too_large = || {
            let mib = super::BODY_LIMIT >> 20;
            Failure::new(Code::TooLarge, format!("the body is larger than {mib} MiB"))
        };
        // One that says so itself is not waited for.
        let announced = http_body::Body::size_hint(request.body()).lower();
        if announced > super::BODY_LIMIT as u64 {
            return Err(ApiError(too_large()));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|e| {
            ApiError(if e.status() == StatusCode::PAYLOAD_TOO_LARGE {
                too_large()
            } else {
                Failure::invalid(format!("the body could not be read: {}", e.body_text()))
            })
        })?;
        let bytes = if bytes.trim_ascii().is_empty() {
            Bytes::from_static(b"{}")
        } else {
            bytes
        };
        let wrong =
            |e: serde_json::Error| Failure::invalid(format!("the body is not as expected: {e}"));
        let value: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|e| Failure::invalid(format!("the body is not JSON: {e}")))?;
        // Maps are sorted, so the same meaning has the same text.
        let hash = Sha256::new()
            .chain_update(target.unwrap_or_default())
            .chain_update(value.to_string())
            .finalize();
        // From the text, since that error can say where.
        let body = serde_json::from_slice(&bytes).map_err(wrong)?;
        Ok(Json(body, RequestHash(hash.into())))
    }
}

/// The sandbox in the path.
pub(crate) struct Id(pub(crate) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_param(parts, state, "id").await?;
        let id = text
            .parse()
            .map_err(|e: wrenn_types::IdError| Failure::invalid(e.to_string()))?;
        Ok(Id(id))
    }
}

/// One parameter of the path, decoded.
pub(crate) async fn path_param<S: Send + Sync>(
    parts: &mut Parts,
    state: &S,
    name: &str,
) -> Result<String, ApiError> {
    let params = RawPathParams::from_request_parts(parts, state)
        .await
        .map_err(|e| Failure::invalid(format!("the path cannot be read: {}", e.body_text())))?;
    let found = params
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, value)| value.to_owned());
    // Every route that asks for a parameter has it in its path.
    Ok(found.unwrap_or_default())
}

/// The query, in order, decoded.
pub(crate) struct Query(pub(crate) Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Ok(RawQuery(query)) = RawQuery::from_request_parts(parts, state).await;
        Ok(Query(pairs(query.as_deref().unwrap_or_default())))
    }
}

impl Query {
    /// The last value of this name.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .rev()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// A number within bounds.
    pub(crate) fn number(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, Failure> {
        let Some(text) = self.get(name) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(Failure::invalid(format!(
                "`{name}` must be a number from {min} to {max}"
            ))),
        }
    }

    /// Refuses what is in none of these, so that a typing error is not taken for "no filter".
    pub(crate) fn only(&self, known: &[&str], prefix: Option<&str>) -> Result<(), Failure> {
        for (name, _) in &self.0 {
            let fits = prefix.is_some_and(|p| name.starts_with(p));
            if !fits && !known.contains(&name.as_str()) {
                let name: String = name.chars().take(60).collect();
                return Err(Failure::invalid(format!(
                    "there is no parameter `{name}` here"
                )));
            }
        }
        Ok(())
    }
}

/// `a=b&c=d` as pairs (application/x-www-form-urlencoded).
pub(crate) fn pairs(text: &str) -> Vec<(String, String)> {
    let decode = |part: &str| {
        let spaced = part.replace('+', " ");
        percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
    };
    text.split('&')
        .filter(|part| !part.is_empty())
        .map(|part| match part.split_once('=') {
            Some((name, value)) => (decode(name), decode(value)),
            None => (decode(part), String::new()),
        })
        .collect()
}

/// The request's `Idempotency-Key`, if it has one.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get("idempotency-key") else {
        return Ok(None);
    };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.len()) && key.bytes().all(|c| c.is_ascii_graphic()) => {
            Ok(Some(key.to_owned()))
        }
        _ => Err(Failure::invalid(
            "`Idempotency-Key` must be 1 to 255 visible ASCII characters without spaces",
        )),
    }
}

/// Labels within these bounds: how many, the longest value, and whether their names are restricted.
pub(crate) fn check_metadata(
    metadata: &BTreeMap<String, String>,
    most: usize,
    longest: usize,
) -> Result<(), Failure> {
    if metadata.len() > most {
        let count = metadata.len();
        return Err(Failure::invalid(format!(
            "`metadata` has {count} entries; at most {most} are allowed"
        )));
    }
    for (name, value) in metadata {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let starts = name
            .chars()
            .next()
            .is_some_and(|c| c.is_ascii_alphanumeric());
        let shown: String = name.chars().take(64).collect();
        if !starts || name.len() > 64 || !name.chars().all(plain) {
            return Err(Failure::invalid(format!(
                "`{shown}` cannot be a name in `metadata`: use 1 to 64 letters, digits, `.`, `_` and `-`, \
                 a letter or digit first"
            )));
        }
        if value.chars().count() > longest {
            return Err(Failure::invalid(format!(
                "the value of `{shown}` in `metadata` is longer than {longest} characters"
            )));
        }
    }
    Ok(())
}
