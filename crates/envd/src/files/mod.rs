//! Bytes of files over HTTP.
//!
//! ```text
//!   GET  /files ─ download ─ conditions (ETag, Range)    ─┐
//!   POST /files ─ upload ─┬─ multipart                    ├─ encoding (gzip)
//!                         ├─ metadata (extended attributes)│
//!   POST /files/compose ──┴─ staged (invisible until whole)┘
//! ```
//!
//! Who may ask is judged here for `/files` (token or signature) and by the server's
//! middleware for `/files/compose`. File work happens with the named user's rights; see
//! [`crate::filesystem::identity`].

pub mod compose;
pub mod conditions;
pub mod download;
pub mod encoding;
pub mod metadata;
pub mod multipart;
pub mod staged;
pub mod upload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::rejection::QueryRejection;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use self::metadata::{Metadata, MetadataError};
use self::multipart::MultipartError;
use crate::auth::{self, AuthError, Operation, Signature};
use crate::filesystem::error::FsError;
use crate::filesystem::path;
use crate::server::error_response;
use crate::state::{Frozen, State};
use crate::users::User;

/// The routes `/files` and `/files/compose`.
pub fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/files", get(download::download).post(upload::upload))
        .route("/files/compose", post(compose::compose))
        // Uploads stream to disk, so that only the disk limits them.
        .layer(DefaultBodyLimit::disable())
        .with_state(state)
}

/// The query of `/files`.
#[derive(Debug, Default, Deserialize)]
pub struct FileQuery {
    path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    signature_expiration: Option<String>,
}

impl FileQuery {
    /// Judges the request, and finds whom it acts as.
    fn admit(
        &self,
        state: &State,
        headers: &HeaderMap,
        operation: Operation,
    ) -> Result<Arc<User>, HttpError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
            });
        let signature = Signature {
            value: self.signature.as_deref(),
            expiration: self.signature_expiration.as_deref(),
        };
        let path = self.path.as_deref().unwrap_or("");
        let username = self.username.as_deref().unwrap_or("");
        auth::signature_allows(state, headers, operation, path, username, signature, now)?;
        Ok(Arc::new(auth::user_from_name(Some(username), state)?))
    }
}

fn resolve(path: &str, user: &User, state: &State) -> Result<PathBuf, FsError> {
    path::resolve(path, user, state.config().default_workdir.as_deref())
}

/// One written file, as clients read it.
#[derive(Debug, Serialize)]
pub struct Written {
    path: String,
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    metadata: std::collections::BTreeMap<String, String>,
}

impl Written {
    fn new(path: &Path, metadata: &Metadata) -> Written {
        let name = path.file_name().unwrap_or_default();
        Written {
            path: path.to_string_lossy().into_owned(),
            name: name.to_string_lossy().into_owned(),
            kind: "file",
            metadata: metadata.iter().cloned().collect(),
        }
    }
}

/// Why a request for files is not answered.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Not allowed, or an unknown user.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// File work failed.
    #[error(transparent)]
    File(#[from] FsError),
    /// The guest is being frozen.
    #[error(transparent)]
    Frozen(#[from] Frozen),
    /// The query cannot be read.
    #[error("the query cannot be read: {0}")]
    Query(#[from] QueryRejection),
    /// Metadata headers are wrong.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The multipart body is wrong.
    #[error(transparent)]
    Multipart(#[from] MultipartError),
    /// The request is wrong.
    #[error("{0}")]
    BadRequest(String),
    /// No coding is acceptable to the client.
    #[error("no acceptable encoding for Accept-Encoding: we have identity and gzip")]
    NotAcceptable,
    /// The body's coding is unknown.
    #[error("unsupported Content-Encoding '{0}': we take identity and gzip")]
    Coding(String),
    /// The body did not arrive.
    #[error("the upload broke off: {0}")]
    Broken(String),
    /// The body stopped arriving.
    #[error("the upload was silent for {0} s")]
    Silent(u64),
}

impl HttpError {
    fn status(&self) -> StatusCode {
        match self {
            HttpError::Auth(error) => error.status(),
            HttpError::File(error) => error.status(),
            HttpError::Frozen(_) => StatusCode::SERVICE_UNAVAILABLE,
            HttpError::Query(_)
            | HttpError::Metadata(_)
            | HttpError::Multipart(_)
            | HttpError::BadRequest(_)
            | HttpError::Broken(_) => StatusCode::BAD_REQUEST,
            HttpError::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            HttpError::Coding(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            HttpError::Silent(_) => StatusCode::REQUEST_TIMEOUT,
        }
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::warn!(%status, error = %self, "a request for files failed");
        }
        error_response(status, &self.to_string())
    }
}
