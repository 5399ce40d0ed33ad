//! Who a request comes from.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::header::{AUTHORIZATION, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName};
use wrenn_store::{KeyRow, Timestamp};
use wrenn_types::{ApiKey, TeamId};

use crate::app::{App, Code, Failure};
use crate::http::{ApiError, refuse};

/// Where clients put their key.
const KEY_HEADER: HeaderName = HeaderName::from_static("x-api-key");

/// So much of what was sent as a key is logged when it is refused: no more than a key's prefix.
const LOGGED: usize = 12;

/// Who a request comes from: a valid key, and thereby its team.
#[derive(Debug, Clone)]
pub(crate) struct Principal {
    pub(crate) team: TeamId,
}

/// What a request shows as its credential.
fn credential(headers: &HeaderMap) -> Option<Result<&str, ()>> {
    let value = headers
        .get(KEY_HEADER)
        .or_else(|| headers.get(AUTHORIZATION))?;
    let Ok(text) = value.to_str() else {
        return Some(Err(()));
    };
    let text = text.trim();
    Some(Ok(match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
        _ => text,
    }))
}

impl App {
    /// Whom a credential belongs to. Everything wrong with it is one answer, so that nobody
    /// learns from it which keys there are.
    pub(crate) async fn authenticate(
        &self,
        given: &str,
        peer: Option<SocketAddr>,
    ) -> Result<Principal, Failure> {
        let found = match given.parse::<ApiKey>() {
            Ok(key) => self.store.key_by_hash(key.hash()).await?,
            Err(_) => None,
        };
        let Some(row) = found else {
            let prefix: String = given
                .chars()
                .take(LOGGED.min(given.chars().count() / 2))
                .collect();
            let from = peer.map_or_else(|| "unknown".to_owned(), |p| p.ip().to_string());
            tracing::warn!(%from, ?prefix, "a credential was refused");
            return Err(Failure::new(
                Code::Unauthorized,
                "the API key is not valid; `wrenn up` keeps the first one in its data folder's `api-key`",
            ));
        };
        self.note_use(&row);
        Ok(Principal { team: row.team })
    }

    /// Off the request's path: nobody waits for it, and it may fail.
    fn note_use(&self, row: &KeyRow) {
        let (store, row) = (self.store.clone(), row.clone());
        tokio::spawn(async move {
            if let Err(e) = store.touch_key(&row, Timestamp::now()).await {
                tracing::warn!(key = %row.id, error = %crate::app::chain(&e), "its use was not noted");
            }
        });
    }
}

fn missing() -> Failure {
    Failure::new(
        Code::Unauthorized,
        "no API key: send one as `X-API-Key`, or as `Authorization: Bearer`",
    )
}

fn peer(request: &Request) -> Option<SocketAddr> {
    request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map(|ConnectInfo(peer)| *peer)
}

/// Lets only requests with a valid key pass.
pub(crate) async fn require_key(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path().to_owned();
    let shown = match credential(request.headers()) {
        None => Err(missing()),
        Some(Err(())) => app.authenticate("", peer(&request)).await,
        Some(Ok(given)) => app.authenticate(given, peer(&request)).await,
    };
    match shown {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            next.run(request).await
        }
        Err(failure) => refuse(&path, failure),
    }
}

/// For what everybody may ask, and who has a key is told more. One that is not valid is refused.
pub(crate) async fn key_if_any(state: State<Arc<App>>, request: Request, next: Next) -> Response {
    if credential(request.headers()).is_none() {
        return next.run(request).await;
    }
    require_key(state, request, next).await
}

/// For WebSockets, which browsers open without headers: a key on the upgrade request must be valid, and
/// without one the first message must carry it. What is no upgrade needs the key at once.
pub(crate) async fn key_now_or_first(
    state: State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let is_upgrade = request.headers().contains_key(UPGRADE);
    if is_upgrade && credential(request.headers()).is_none() {
        return next.run(request).await;
    }
    require_key(state, request, next).await
}

impl<S: Send + Sync> FromRequestParts<S> for Principal {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        // The layer above has put it there; a route without that layer is refused, not open.
        parts
            .extensions
            .get()
            .cloned()
            .ok_or_else(|| ApiError(missing()))
    }
}
