//! Who may ask, and as which user.
//!
//! A request is judged by the sandbox's access token ([`check`]), or for `/files` by a
//! signature made with it ([`signature_allows`]). It names the user it acts as by
//! `Authorization: Basic base64("user:")` (RPC) or by the query's `username` (`/files`);
//! where it names none, the state's default user is meant.

mod signature;
pub(crate) mod token;

use std::sync::Arc;

use axum::extract::{Request, State as Extract};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use connectrpc::ConnectError;
use http::{HeaderMap, Method, StatusCode, header};

pub use self::signature::{Operation, Signature, sign};
pub use self::token::AccessToken;
use crate::state::State;
use crate::users::{self, User, UserError};

/// The header that carries the token.
pub const TOKEN_HEADER: &str = "x-access-token";

/// Why a request is refused. The texts are those that E2B's clients compare.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// No token, or a wrong one.
    #[error(
        "unauthorized access, please provide a valid access token or method signing if supported"
    )]
    Unauthorized,
    /// Neither token nor signature.
    #[error("missing signature query parameter")]
    SignatureMissing,
    /// The signature was not made with our token for this request.
    #[error("invalid signature")]
    SignatureInvalid,
    /// The signature was good once.
    #[error("signature is already expired")]
    SignatureExpired,
    /// A token came, and it is not ours, whatever the signature says.
    #[error("access token present in header but does not match")]
    TokenMismatch,
    /// `Authorization: Basic` holds something that is no user name.
    #[error("the Authorization header is not `Basic` with base64 of a user name and a colon")]
    Malformed,
    /// The user does not exist or cannot be looked up.
    #[error(transparent)]
    User(#[from] UserError),
}

impl AuthError {
    /// HTTP status: 401, or 500 when the user database cannot be read.
    pub fn status(&self) -> StatusCode {
        match self {
            AuthError::User(UserError::Database { .. }) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::UNAUTHORIZED,
        }
    }
}

impl From<AuthError> for ConnectError {
    fn from(error: AuthError) -> Self {
        match error.status() {
            StatusCode::UNAUTHORIZED => ConnectError::unauthenticated(error.to_string()),
            _ => ConnectError::internal(error.to_string()),
        }
    }
}

impl IntoResponse for AuthError {
    fn into_response(self) -> Response {
        crate::server::error_response(self.status(), &self.to_string())
    }
}

/// The user a request names, or the default one.
pub fn user_from_name(name: Option<&str>, state: &State) -> Result<User, AuthError> {
    match name.filter(|n| !n.is_empty()) {
        Some(name) => Ok(users::lookup(name)?),
        None => Ok(users::lookup(&state.config().default_user)?),
    }
}

/// The user that `Authorization: Basic` names, or the default one. Other schemes name no
/// user.
pub fn user_from_headers(headers: &HeaderMap, state: &State) -> Result<User, AuthError> {
    user_from_name(basic_user(headers)?.as_deref(), state)
}

fn basic_user(headers: &HeaderMap) -> Result<Option<String>, AuthError> {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return Ok(None);
    };
    let value = value.to_str().map_err(|_| AuthError::Malformed)?;
    let Some((scheme, rest)) = value.split_once(' ') else {
        return Ok(None);
    };
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let bytes = BASE64_STANDARD
        .decode(rest.trim())
        .map_err(|_| AuthError::Malformed)?;
    let text = String::from_utf8(bytes).map_err(|_| AuthError::Malformed)?;
    let (name, _password) = text.split_once(':').ok_or(AuthError::Malformed)?;
    Ok(Some(name.to_owned()))
}

/// Whether the token in the header is ours. `Ok` where no token is set, unless this is a
/// guest that has not been initialised: it has no token *yet*.
pub fn token_allows(headers: &HeaderMap, state: &State) -> Result<(), AuthError> {
    let config = state.config();
    let Some(token) = &config.access_token else {
        let open = config.initialised || !state.settings.in_vm;
        return if open {
            Ok(())
        } else {
            Err(AuthError::Unauthorized)
        };
    };
    let given = headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes);
    match given {
        Some(given) if token.matches(given) => Ok(()),
        _ => Err(AuthError::Unauthorized),
    }
}

/// Judges a request for `/files`: by the token where one was sent, else by its signature.
/// `now` is Unix time in seconds.
pub fn signature_allows(
    state: &State,
    headers: &HeaderMap,
    operation: Operation,
    path: &str,
    username: &str,
    signature: Signature<'_>,
    now: i64,
) -> Result<(), AuthError> {
    let config = state.config();
    let Some(token) = &config.access_token else {
        return token_allows(headers, state);
    };
    if let Some(given) = headers.get(TOKEN_HEADER) {
        return if token.matches(given.as_bytes()) {
            Ok(())
        } else {
            Err(AuthError::TokenMismatch)
        };
    }
    signature::verify(token, operation, path, username, signature, now)
}

/// Whether a route judges its requests itself or is open to all: the health check, the
/// restore hook and what is asked before it (which take the machine's own token too) and
/// `/files` (token or signature).
fn judged_elsewhere(method: &Method, path: &str) -> bool {
    matches!(
        (method.as_str(), path),
        ("GET" | "HEAD", "/health")
            | (
                "POST",
                "/init" | "/snapshot/inventory" | "/snapshot/digests"
            )
            | ("GET" | "HEAD" | "POST", "/files")
    )
}

/// Middleware: every route but those that must be open demands the token.
pub async fn check(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !judged_elsewhere(request.method(), path)
        && let Err(error) = token_allows(request.headers(), &state)
    {
        tracing::info!(method = %request.method(), path, "refused: wrong or missing access token");
        if crate::server::is_rpc(path) {
            return crate::server::rpc_error(&error.into());
        }
        return error.into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn a_user_comes_from_basic_credentials_only() {
        assert_eq!(basic_user(&HeaderMap::new()).unwrap(), None);
        assert_eq!(
            basic_user(&with("Basic dXNlcjo=")).unwrap().as_deref(),
            Some("user")
        );
        assert_eq!(
            basic_user(&with("basic cm9vdDp4")).unwrap().as_deref(),
            Some("root")
        );
        assert_eq!(basic_user(&with("Bearer abc")).unwrap(), None);
        for wrong in ["Basic ???", "Basic dXNlcg==", "Basic /w=="] {
            assert!(
                matches!(basic_user(&with(wrong)), Err(AuthError::Malformed)),
                "{wrong}"
            );
        }
    }

    #[test]
    fn g33_only_five_routes_are_judged_elsewhere() {
        for (method, path) in [
            ("GET", "/metrics"),
            ("GET", "/envs"),
            ("GET", "/ports"),
            ("POST", "/snapshot/prepare"),
            ("POST", "/snapshot/rehearse"),
            ("POST", "/files/compose"),
            ("POST", "/process.Process/Start"),
            ("GET", "/init"),
            ("POST", "/health"),
            ("GET", "/health/"),
            ("GET", "//health"),
        ] {
            assert!(
                !judged_elsewhere(&method.parse().unwrap(), path),
                "{method} {path}"
            );
        }
        assert!(judged_elsewhere(&Method::GET, "/health"));
    }
}
