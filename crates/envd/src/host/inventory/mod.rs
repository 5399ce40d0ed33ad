//! `POST /snapshot/inventory` and `/snapshot/digests`: what is in this guest, for a host that
//! compares it with another.
//!
//! ```text
//!   inventory: {"processes": …, "ports": …}      first: they change fastest
//!              {"path": "/", "kind": …} …         a line for each file, in the tree's order
//!              {"end": true, "truncated": …}     last; without it the listing broke off
//! ```
//!
//! They are answered before `/init` too, when nothing of users runs: by the machine's own
//! token, for the agent does not know another one's yet.

mod digest;
mod mounts;
mod programs;
mod walk;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State as Extract};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::mounts::Mounts;
use super::Host;
use crate::auth::{AuthError, TOKEN_HEADER, token_allows};
use crate::server::error_response;

/// Bytes of a listing that are made at once, and how many such pieces may wait for the host.
const PIECE: usize = 64 << 10;
const PIECES: usize = 4;

/// A path that may be no UTF-8.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    /// As it is.
    Path(String),
    /// In base64.
    Raw(String),
}

impl Name {
    fn of(path: &Path) -> Name {
        match path.to_str() {
            Some(text) => Name::Path(text.to_owned()),
            None => Name::Raw(BASE64_STANDARD.encode(path.as_os_str().as_bytes())),
        }
    }

    fn path(&self) -> Option<PathBuf> {
        match self {
            Name::Path(text) => Some(text.into()),
            Name::Raw(text) => {
                let bytes = BASE64_STANDARD.decode(text).ok()?;
                Some(OsString::from_vec(bytes).into())
            }
        }
    }
}

/// Which files.
#[derive(Debug, Deserialize)]
pub(super) struct Which {
    #[serde(default = "root")]
    path: PathBuf,
}

fn root() -> PathBuf {
    "/".into()
}

/// Which files' contents.
#[derive(Debug, Deserialize)]
pub(super) struct Contents {
    paths: Vec<Name>,
}

impl Host {
    /// As for `/init` the machine's own token does, and else the one that all requests carry.
    fn may_look(&self, headers: &HeaderMap) -> Result<(), AuthError> {
        let refused = match token_allows(headers, &self.state) {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        let given = headers.get(TOKEN_HEADER).map(http::HeaderValue::as_bytes);
        let trusted = self
            .identity()
            .zip(given)
            .is_some_and(|(identity, given)| identity.trusts(given));
        if trusted { Ok(()) } else { Err(refused) }
    }
}

fn refused(error: &AuthError) -> Response {
    error_response(error.status(), &error.to_string())
}

fn bad(message: &str) -> Response {
    error_response(StatusCode::BAD_REQUEST, message)
}

/// Whether a path is absolute and goes down only.
fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// See the module.
pub(super) async fn inventory(
    Extract(host): Extract<Arc<Host>>,
    headers: HeaderMap,
    Query(which): Query<Which>,
) -> Response {
    if let Err(error) = host.may_look(&headers) {
        return refused(&error);
    }
    if !is_plain(&which.path) {
        return bad("the path must be absolute, without `.` and `..`");
    }
    let mounts = match Mounts::read() {
        Ok(mounts) if mounts.keeps(&which.path) => mounts,
        Ok(_) => {
            return bad("what is there is neither on a disk nor in memory: it cannot be compared");
        }
        Err(error) => return error_response(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    };
    let own_port = host.state.settings.port;
    let (pieces, mut waiting) = mpsc::channel::<io::Result<Bytes>>(PIECES);
    tokio::task::spawn_blocking(move || {
        let mut lines = Lines {
            piece: Vec::with_capacity(PIECE),
            pieces,
        };
        // A host that hangs up ends it; whatever else goes wrong breaks the listing off.
        if let Err(error) = list(&which.path, &mounts, own_port, &mut lines) {
            let _ = lines.pieces.blocking_send(Err(error));
        }
    });
    let body = Body::from_stream(stream::poll_fn(move |context| waiting.poll_recv(context)));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// Lines of JSON on their way to the host, in larger pieces.
struct Lines {
    piece: Vec<u8>,
    pieces: mpsc::Sender<io::Result<Bytes>>,
}

impl Lines {
    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.piece, value)?;
        self.piece.push(b'\n');
        if self.piece.len() >= PIECE {
            self.send()?;
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        let sent = self.pieces.blocking_send(Ok(piece.into()));
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn list(path: &Path, mounts: &Mounts, own_port: u16, lines: &mut Lines) -> io::Result<()> {
    lines.line(&programs::running(own_port)?)?;
    let truncated = walk::below(path, mounts, &mut |file| lines.line(file))?;
    lines.line(&serde_json::json!({ "end": true, "truncated": truncated }))?;
    lines.send()
}

/// The digests of what files and symbolic links hold, in the order they were asked for; `null`
/// where there is no such file any more, or it cannot be read.
pub(super) async fn digests(
    Extract(host): Extract<Arc<Host>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Err(error) = host.may_look(&headers) {
        return refused(&error);
    }
    let contents: Contents = match serde_json::from_slice(&body) {
        Ok(contents) => contents,
        Err(error) => return bad(&format!("the body is not what this takes: {error}")),
    };
    let read = tokio::task::spawn_blocking(move || {
        let one = |name: &Name| digest::of(&name.path()?);
        contents.paths.iter().map(one).collect::<Vec<_>>()
    });
    match read.await {
        Ok(digests) => axum::Json(serde_json::json!({ "digests": digests })).into_response(),
        Err(panic) => error_response(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("reading broke: {panic}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_comes_back_whatever_its_bytes() {
        for bytes in [&b"/etc/passwd"[..], b"/tmp/\xff\n\"", b"/"] {
            let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            let json = serde_json::to_string(&Name::of(&path)).unwrap();
            let name: Name = serde_json::from_str(&json).unwrap();
            assert_eq!(name.path().unwrap(), path, "{json}");
        }
    }

    #[test]
    fn a_path_goes_down_only() {
        for (path, plain) in [
            ("/", true),
            ("/home/user", true),
            ("/home/../etc", false),
            ("home", false),
            ("", false),
        ] {
            assert_eq!(is_plain(Path::new(path)), plain, "{path}");
        }
    }
}
