//! `POST /files`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State as Extract};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use http::{HeaderMap, header};
use tokio::task::JoinHandle;

use super::encoding::{self, Coding, GunzipError};
use super::metadata::{self, Metadata};
use super::multipart::{Multipart, Part, Piece};
use super::staged::Staged;
use super::{FileQuery, HttpError, Written, resolve};
use crate::auth::Operation;
use crate::filesystem::error::FsError;
use crate::filesystem::identity;
use crate::state::State;
use crate::users::User;

/// An upload of which nothing arrives for so long is given up.
const IDLE: Duration = Duration::from_secs(600);
/// What is gathered before a blocking thread writes it, while the next is gathered.
const BATCH: usize = 1 << 20;
/// Small chunks of a slow client each hold on to a larger buffer, so few are gathered.
const BATCH_CHUNKS: usize = 64;
/// Files of one request that may stay open; further ones wait under hidden names.
const MAX_OPEN: usize = 64;

type Chunks = BoxStream<'static, Result<Bytes, HttpError>>;

/// Writes one file (octet stream) or several (multipart), which appear when all are whole.
///
/// # Errors
/// 400 for a request that is wrong and for a body that breaks off, 401, 403, 408, 415, 507.
pub async fn upload(
    Extract(state): Extract<Arc<State>>,
    query: Result<Query<FileQuery>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Vec<Written>>, HttpError> {
    let Query(query) = query?;
    let user = query.admit(&state, &headers, Operation::Write)?;
    let metadata = Arc::new(metadata::from_headers(&headers)?);
    let chunks = body_of(&headers, body)?;
    let content_type = match headers.get(header::CONTENT_TYPE) {
        Some(value) => value.to_str().unwrap_or(""),
        None => "",
    };
    let path = query.path.as_deref().filter(|path| !path.is_empty());
    let mut request = Upload {
        state: &state,
        user,
        metadata,
        path,
        files: Vec::new(),
        targets: HashSet::new(),
    };
    if let Some(parser) = Multipart::of_type(content_type)? {
        request.multipart(parser, chunks).await?;
    } else if is_octet_stream(content_type) {
        request.octets(chunks).await?;
    } else {
        return Err(HttpError::BadRequest(format!(
            "unsupported Content-Type '{content_type}': send multipart/form-data with parts named 'file', or application/octet-stream with the query's path"
        )));
    }
    Ok(Json(request.commit().await?))
}

fn is_octet_stream(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or("").trim();
    kind.eq_ignore_ascii_case("application/octet-stream")
}

fn body_of(headers: &HeaderMap, body: Body) -> Result<Chunks, HttpError> {
    let chunks = arriving(body.into_data_stream());
    match encoding::of_body(headers).map_err(HttpError::Coding)? {
        Coding::Identity => Ok(chunks),
        Coding::Gzip => {
            let plain = encoding::gunzip(chunks).map_err(|error| match error {
                GunzipError::Source(error) => error,
                corrupt @ GunzipError::Corrupt(_) => HttpError::BadRequest(corrupt.to_string()),
            });
            Ok(plain.boxed())
        }
    }
}

/// The body's chunks, as long as they keep coming.
fn arriving(body: BodyDataStream) -> Chunks {
    stream::try_unfold(body, |mut body| async move {
        match tokio::time::timeout(IDLE, body.next()).await {
            Ok(Some(Ok(chunk))) => Ok(Some((chunk, body))),
            Ok(Some(Err(error))) => Err(HttpError::Broken(chain(&error))),
            Ok(None) => Ok(None),
            Err(_) => Err(HttpError::Silent(IDLE.as_secs())),
        }
    })
    .boxed()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

struct Upload<'a> {
    state: &'a State,
    user: Arc<User>,
    metadata: Arc<Metadata>,
    path: Option<&'a str>,
    /// Complete ones, with their paths as asked for.
    files: Vec<(PathBuf, Staged)>,
    targets: HashSet<PathBuf>,
}

impl Upload<'_> {
    async fn octets(&mut self, mut chunks: Chunks) -> Result<(), HttpError> {
        let path = self.path.ok_or_else(|| {
            HttpError::BadRequest(
                "an application/octet-stream upload needs the query's path".into(),
            )
        })?;
        let mut sink = self.begin(path).await?;
        while let Some(chunk) = chunks.try_next().await? {
            sink.write(chunk).await?;
        }
        self.complete(sink).await
    }

    async fn multipart(
        &mut self,
        mut parser: Multipart,
        mut chunks: Chunks,
    ) -> Result<(), HttpError> {
        let mut sink = None;
        while let Some(chunk) = chunks.try_next().await? {
            parser.push(chunk);
            while let Some(piece) = parser.next_piece()? {
                match (piece, &mut sink) {
                    (Piece::Begin(part), _) => sink = self.begin_part(part).await?,
                    (Piece::Data(data), Some(sink)) => sink.write(data).await?,
                    (Piece::End, Some(_)) => {
                        if let Some(sink) = sink.take() {
                            self.complete(sink).await?;
                        }
                    }
                    // A field that is no file.
                    (Piece::Data(_) | Piece::End, None) => {}
                }
            }
        }
        parser.finish()?;
        if self.files.is_empty() {
            return Err(HttpError::BadRequest(
                "the multipart body has no part named 'file'".into(),
            ));
        }
        Ok(())
    }

    async fn begin_part(&mut self, part: Part) -> Result<Option<Sink>, HttpError> {
        if part.name.as_deref() != Some("file") {
            return Ok(None);
        }
        let name = part.filename.filter(|name| !name.is_empty());
        let path = match (self.path, &name) {
            (Some(path), _) => path,
            (None, Some(name)) => name,
            (None, None) => {
                return Err(HttpError::BadRequest(
                    "a part named 'file' has no filename, and the query has no path".into(),
                ));
            }
        };
        self.begin(path).await.map(Some)
    }

    async fn begin(&mut self, path: &str) -> Result<Sink, HttpError> {
        let path = resolve(path, &self.user, self.state)?;
        let _open = self.state.enter().await?;
        let at = path.clone();
        let metadata = Arc::clone(&self.metadata);
        let staged = identity::run(&self.user, move || {
            let mut staged = Staged::create(&at)?;
            staged.label(&metadata)?;
            Ok(staged)
        })
        .await?;
        if !self.targets.insert(staged.target().to_owned()) {
            return Err(HttpError::BadRequest(format!(
                "the path '{}' is uploaded more than once in one request",
                path.display()
            )));
        }
        Ok(Sink::new(Arc::clone(&self.user), path, staged))
    }

    async fn complete(&mut self, sink: Sink) -> Result<(), HttpError> {
        let park = self.files.len() >= MAX_OPEN;
        let (path, mut staged) = sink.finish().await?;
        let staged = identity::run(&self.user, move || {
            staged.seal()?;
            if park {
                staged.park()?;
            }
            Ok(staged)
        })
        .await?;
        self.files.push((path, staged));
        Ok(())
    }

    /// Everything has arrived: makes it visible. A freeze waits for that.
    async fn commit(self) -> Result<Vec<Written>, HttpError> {
        let _open = self.state.enter().await?;
        let written = self
            .files
            .iter()
            .map(|(path, _)| Written::new(path, &self.metadata))
            .collect();
        let files = self.files;
        identity::run(&self.user, move || {
            files
                .into_iter()
                .try_for_each(|(_, staged)| staged.commit())
        })
        .await?;
        Ok(written)
    }
}

/// Writes to a staged file on blocking threads while the next bytes arrive.
struct Sink {
    user: Arc<User>,
    path: PathBuf,
    batch: Vec<Bytes>,
    batched: usize,
    file: Place,
}

enum Place {
    Here(Staged),
    Writing(JoinHandle<Result<Staged, FsError>>),
    Lost,
}

impl Sink {
    fn new(user: Arc<User>, path: PathBuf, staged: Staged) -> Sink {
        Sink {
            user,
            path,
            batch: Vec::new(),
            batched: 0,
            file: Place::Here(staged),
        }
    }

    async fn write(&mut self, chunk: Bytes) -> Result<(), FsError> {
        self.batched += chunk.len();
        self.batch.push(chunk);
        if self.batched >= BATCH || self.batch.len() >= BATCH_CHUNKS {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), FsError> {
        let mut staged = self.settle().await?;
        let batch = std::mem::take(&mut self.batch);
        self.batched = 0;
        let user = Arc::clone(&self.user);
        self.file = Place::Writing(tokio::task::spawn_blocking(move || {
            let _assumed = identity::assume(&user)?;
            staged.write(&batch)?;
            Ok(staged)
        }));
        Ok(())
    }

    /// Waits for the write under way.
    async fn settle(&mut self) -> Result<Staged, FsError> {
        match std::mem::replace(&mut self.file, Place::Lost) {
            Place::Here(staged) => Ok(staged),
            Place::Writing(write) => write
                .await
                .map_err(|error| FsError::Internal(format!("file work broke off: {error}")))?,
            Place::Lost => Err(lost(&self.path)),
        }
    }

    async fn finish(mut self) -> Result<(PathBuf, Staged), FsError> {
        self.flush().await?;
        let staged = self.settle().await?;
        Ok((self.path, staged))
    }
}

fn lost(path: &Path) -> FsError {
    FsError::Internal(format!("writing '{}' failed before", path.display()))
}
