//! `…/files`: files in and out of a sandbox.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError, MultipartRejection};
use axum::extract::{DefaultBodyLimit, Multipart, State};
use axum::response::Response;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use wrenn_types::{SandboxId, TeamId};

use super::ErrorBody;
use crate::app::{App, Code, Failure, Upload, chain};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Json, Query};

/// Largest upload in one request.
const UPLOAD_LIMIT: usize = 16 << 30;

/// Bytes copied at a time from a file that waited on this machine's disk.
const COPY: usize = 256 * 1024;

/// How long the next piece of an upload that has failed may take before that is answered.
const SENDS_WITHIN: Duration = Duration::from_secs(2);
/// Longest text field of an upload.
const FIELD_LIMIT: usize = 8 * 1024;

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    let writes = OpenApiRouter::new()
        .routes(routes!(write))
        .routes(routes!(stream_write))
        .layer(DefaultBodyLimit::max(UPLOAD_LIMIT));
    OpenApiRouter::new()
        .routes(routes!(read))
        .routes(routes!(stream_read))
        .merge(writes)
}

/// A file to read.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReadBody {
    /// Absolute, or relative to the user's home.
    #[schema(example = "/etc/hostname")]
    path: String,
    /// With whose rights; the sandbox's default user's by default.
    user: Option<String>,
}

/// A file to write.
#[derive(ToSchema)]
#[allow(dead_code, reason = "describes the parts that `receive` reads")]
pub(crate) struct WriteParts {
    /// Absolute, or relative to the user's home; may also be a parameter of the query.
    path: String,
    /// With whose rights; must come before `file`, or in the query.
    user: Option<String>,
    /// The content.
    #[schema(format = Binary, content_media_type = "application/octet-stream")]
    file: String,
}

/// A file that was written.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Written {
    path: String,
    /// In bytes.
    size: u64,
}

/// Read a file
///
/// Streamed. A transfer that breaks is seen as broken: the connection ends before `Content-Length`.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/read", tag = "files", request_body = ReadBody,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "Its bytes", body = String, content_type = "application/octet-stream"),
        (status = 400, description = "Malformed, or no regular file", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox or file", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
    )
)]
async fn read(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<ReadBody>,
) -> Result<Response, ApiError> {
    send(&app, principal.team, id, body).await
}

/// Read a large file
///
/// The same as `files/read`, which streams too.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/stream/read", tag = "files", request_body = ReadBody,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "Its bytes", body = String, content_type = "application/octet-stream"),
        (status = 400, description = "Malformed, or no regular file", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox or file", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
    )
)]
async fn stream_read(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<ReadBody>,
) -> Result<Response, ApiError> {
    send(&app, principal.team, id, body).await
}

async fn send(
    app: &App,
    team: TeamId,
    id: SandboxId,
    body: ReadBody,
) -> Result<Response, ApiError> {
    let download = app.read_file(team, id, body.path, body.user).await?;
    let size = download.size;
    // An error in the middle breaks the connection off, so that nobody takes half a file for all.
    let chunks = futures::stream::try_unfold(download, |mut download| async move {
        match download.next().await {
            Ok(Some(chunk)) => Ok(Some((chunk, download))),
            Ok(None) => Ok(None),
            Err(e) => {
                tracing::warn!(error = %e, "a download broke off");
                Err(std::io::Error::other(e))
            }
        }
    });
    let mut response = Response::new(Body::from_stream(chunks));
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, size.into());
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    Ok(response)
}

/// Write a file
///
/// Streamed, and seen by readers only when it is whole.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/write", tag = "files",
    request_body(content = WriteParts, content_type = "multipart/form-data"),
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "It is there", body = Written),
        (status = 400, description = "Malformed, or the path is a directory", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
        (status = 413, description = "Larger than 16 GiB", body = ErrorBody),
        (status = 507, description = "The sandbox's disk is full", body = ErrorBody),
    )
)]
async fn write(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
    parts: Result<Multipart, MultipartRejection>,
) -> Result<axum::Json<Written>, ApiError> {
    receive(&app, principal.team, id, &query, parts).await
}

/// Write a large file
///
/// The same as `files/write`, which streams too.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/files/stream/write", tag = "files",
    request_body(content = WriteParts, content_type = "multipart/form-data"),
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "It is there", body = Written),
        (status = 400, description = "Malformed, or the path is a directory", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
        (status = 413, description = "Larger than 16 GiB", body = ErrorBody),
        (status = 507, description = "The sandbox's disk is full", body = ErrorBody),
    )
)]
async fn stream_write(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
    parts: Result<Multipart, MultipartRejection>,
) -> Result<axum::Json<Written>, ApiError> {
    receive(&app, principal.team, id, &query, parts).await
}

/// What an upload has shown so far.
struct Receiving<'a> {
    app: &'a App,
    team: TeamId,
    id: SandboxId,
    path: Option<String>,
    user: Option<String>,
    upload: Option<Upload>,
    /// A file that came before its path.
    waiting: Option<tokio::fs::File>,
}

async fn receive(
    app: &App,
    team: TeamId,
    id: SandboxId,
    query: &Query,
    parts: Result<Multipart, MultipartRejection>,
) -> Result<axum::Json<Written>, ApiError> {
    query.only(&["path", "user"], None)?;
    let mut parts =
        parts.map_err(|e| Failure::invalid(format!("not an upload: {}", e.body_text())))?;
    // Before anything is read: what can be refused now should be.
    app.running(team, id).await?;
    let mut this = Receiving {
        app,
        team,
        id,
        path: query.get("path").map(str::to_owned),
        user: query.get("user").map(str::to_owned),
        upload: None,
        waiting: None,
    };
    while let Some(field) = parts.next_field().await.map_err(broken)? {
        this.part(field).await?;
    }
    Ok(axum::Json(this.finish().await?))
}

impl Receiving<'_> {
    async fn part(&mut self, field: Field<'_>) -> Result<(), Failure> {
        let late = self.upload.is_some();
        match field.name().unwrap_or_default() {
            "path" if late => Err(Failure::invalid("there are two paths")),
            "path" => {
                self.path = Some(text(field).await?);
                Ok(())
            }
            "user" | "username" if late || self.waiting.is_some() => {
                Err(Failure::invalid("`user` must come before `file`"))
            }
            "user" | "username" => {
                self.user = Some(text(field).await?);
                Ok(())
            }
            "file" if late || self.waiting.is_some() => Err(Failure::invalid(
                "one file at a time: there are two parts named `file`",
            )),
            "file" => self.content(field).await,
            other => {
                let other: String = other.chars().take(60).collect();
                Err(Failure::invalid(format!(
                    "there is no part `{other}`: send `path` and `file`"
                )))
            }
        }
    }

    async fn content(&mut self, mut field: Field<'_>) -> Result<(), Failure> {
        let Some(path) = self.path.clone() else {
            let mut file = scratch(self.app).await?;
            while let Some(chunk) = field.chunk().await.map_err(broken)? {
                file.write_all(&chunk).await.map_err(scratch_failed)?;
            }
            file.flush().await.map_err(scratch_failed)?;
            self.waiting = Some(file);
            return Ok(());
        };
        let mut upload = self.open(path).await?;
        let mut given_up = false;
        loop {
            let chunk = match given_up {
                false => tokio::select! {
                    chunk = field.chunk() => chunk,
                    () = upload.given_up() => {
                        given_up = true;
                        continue;
                    }
                },
                // Most clients read an answer when they have sent everything. One that waits
                // itself is not waited for.
                true => match tokio::time::timeout(SENDS_WITHIN, field.chunk()).await {
                    Ok(chunk) => chunk,
                    Err(_) => return upload.finish(self.app).await.map(drop),
                },
            };
            match chunk.map_err(broken)? {
                Some(chunk) if !given_up => upload.write(&chunk).await,
                Some(_) => {}
                None => break,
            }
        }
        self.upload = Some(upload);
        Ok(())
    }

    async fn open(&mut self, path: String) -> Result<Upload, Failure> {
        self.app
            .write_file(self.team, self.id, path, self.user.take())
            .await
    }

    /// All parts were there up to the closing boundary.
    async fn finish(mut self) -> Result<Written, Failure> {
        let upload = match (self.upload.take(), self.waiting.take()) {
            (Some(upload), _) => upload,
            (None, Some(mut file)) => {
                let path = self.path.take().ok_or_else(|| {
                    Failure::invalid("the part `path` is missing: where should the file go?")
                })?;
                let mut upload = self.open(path).await?;
                file.rewind().await.map_err(scratch_failed)?;
                let mut buffer = vec![0; COPY];
                loop {
                    match file.read(&mut buffer).await.map_err(scratch_failed)? {
                        0 => break,
                        n => upload.write(&buffer[..n]).await,
                    }
                }
                upload
            }
            (None, None) => return Err(Failure::invalid("the part `file` is missing")),
        };
        let done = upload.finish(self.app).await?;
        Ok(Written {
            path: done.path,
            size: done.size,
        })
    }
}

async fn text(mut field: Field<'_>) -> Result<String, Failure> {
    let name = field.name().unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(broken)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > FIELD_LIMIT {
            return Err(Failure::invalid(format!(
                "`{name}` is longer than {FIELD_LIMIT} bytes"
            )));
        }
    }
    String::from_utf8(bytes).map_err(|_| Failure::invalid(format!("`{name}` is not UTF-8")))
}

fn broken(error: MultipartError) -> Failure {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let gib = UPLOAD_LIMIT >> 30;
        return Failure::new(
            Code::TooLarge,
            format!("the upload is larger than {gib} GiB"),
        );
    }
    Failure::invalid(format!(
        "the upload broke off or is malformed: {}",
        error.body_text()
    ))
}

/// A file without a name on this machine's disk, gone with its descriptor.
async fn scratch(app: &App) -> Result<tokio::fs::File, Failure> {
    let path = app
        .config
        .data_dir
        .join(format!("upload-{}", uuid::Uuid::new_v4()));
    let file = tokio::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .await
        .map_err(scratch_failed)?;
    tokio::fs::remove_file(&path)
        .await
        .map_err(scratch_failed)?;
    Ok(file)
}

fn scratch_failed(error: std::io::Error) -> Failure {
    tracing::error!(error = %chain(&error), "an upload could not be kept on the server's disk");
    Failure::new(
        Code::InternalError,
        format!(
            "the server could not keep the upload ({error}); send `path` before `file`, then it need not"
        ),
    )
}
