//! Pausing and resuming, forks, checkpoints and rollback; `/v1/snapshots`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use wrenn_store::{SnapshotKind, SnapshotPage, SnapshotRow};

use super::ErrorBody;
use super::sandboxes::SandboxBody;
use crate::app::{
    App, Certificate, Failure, Fork, ListedTemplate, Moved, Resume, Take, TemplateKey, TemplateKind,
};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Json, Query, idempotency_key};
use crate::http::page::{self, Asked};
use crate::http::timing::with_timing;

/// Most children of one fork.
const MAX_CHILDREN: u32 = 100;

/// What was done to a restored sandbox before its first instruction counted. If one step had
/// failed there would be no sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RestoreCertificate {
    /// How often this line of memory was restored.
    generation: u64,
    /// The kernel's random number generator was given fresh entropy.
    entropy_reseeded: bool,
    /// By how much the guest's clock was ahead of the host's before it was set.
    clock_offset_micros: i64,
    /// Machine id, host name, ids and access token are its own.
    ids_rotated: bool,
    /// Everything that was read of the snapshot was checked against its digests.
    digests_verified: bool,
    /// It was booted from its disk: there was no memory, or it was not wanted.
    booted: bool,
    /// How long each step took, in order.
    steps: Vec<CertifiedStep>,
}

/// A step of a restore.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CertifiedStep {
    name: String,
    micros: u64,
}

impl From<Certificate> for RestoreCertificate {
    fn from(given: Certificate) -> Self {
        let step = |phase: wrenn_wire::wrenn::host::v1::Phase| CertifiedStep {
            name: phase.name,
            micros: phase.micros,
        };
        RestoreCertificate {
            generation: given.generation,
            entropy_reseeded: given.entropy_reseeded,
            clock_offset_micros: given.clock_offset_micros,
            ids_rotated: given.ids_rotated,
            digests_verified: given.digests_verified,
            booted: given.booted,
            steps: given.phases.into_iter().map(step).collect(),
        }
    }
}

/// A sandbox, and how it was restored if it was just now.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct RestoredBody {
    #[serde(flatten)]
    sandbox: SandboxBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    restore_certificate: Option<RestoreCertificate>,
}

fn restored(moved: Moved) -> Response {
    let body = RestoredBody {
        sandbox: moved.sandbox.into(),
        restore_certificate: moved.certificate.map(Into::into),
    };
    with_timing(StatusCode::OK, body, &moved.phases)
}

/// Whether memory counts.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryBody {
    /// `false`: only the disk does, and the sandbox boots when it is resumed. `true` by default.
    memory: Option<bool>,
}

/// Pause a sandbox
///
/// Its memory, processes and disk are saved and its machine is given back; it then holds
/// nothing but disk. If it cannot be saved it runs on. With `memory: false` its file system is
/// synced and its disk saved; its programs end.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/pause", tag = "snapshots", request_body = MemoryBody,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "It is paused", body = SandboxBody),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It does not run; the error has its state", body = ErrorBody),
    )
)]
pub(super) async fn pause(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<MemoryBody>,
) -> Result<Response, ApiError> {
    let moved = app
        .pause(principal.team, id, body.memory == Some(false))
        .await?;
    let body = SandboxBody::from(moved.sandbox);
    Ok(with_timing(StatusCode::OK, body, &moved.phases))
}

/// Resume a paused sandbox
///
/// Its programs go on where they stood. One that was paused without its memory boots, and with
/// `memory: false` any does, from its disk. One that runs stays as it is.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/resume", tag = "snapshots", request_body = MemoryBody,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "It runs", body = RestoredBody),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It is not paused; the error has its state", body = ErrorBody),
        (status = 503, description = "No room", body = ErrorBody),
    )
)]
pub(super) async fn resume(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<MemoryBody>,
) -> Result<Response, ApiError> {
    let resume = Resume {
        boot: body.memory == Some(false),
        ..Resume::default()
    };
    Ok(restored(app.resume(principal.team, id, resume).await?))
}

/// How to fork.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ForkBody {
    /// How many children; 1 by default, at most 100.
    #[schema(minimum = 1, maximum = 100)]
    count: Option<u32>,
    /// What to call the child; several are called `name-1`, `name-2` and so on. No two living
    /// sandboxes of a team have the same name.
    #[schema(example = "attempt")]
    name: Option<String>,
}

/// A child of a fork: a sandbox, or why there is none.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum ChildBody {
    /// It runs.
    Born(Box<RestoredBody>),
    /// It could not be started.
    Failed {
        /// Why.
        error: String,
    },
}

/// Fork a sandbox
///
/// Starts new sandboxes in the state this one is in, running programs and all; it goes on
/// itself. Each child has its own id, host name, randomness and access token.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/fork", tag = "snapshots", request_body = ForkBody,
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("Idempotency-Key" = Option<String>, Header,
            description = "The same key and body within 24 hours fork once"),
    ),
    responses(
        (status = 201, description = "The children; `Server-Timing` has `frozen`, for how long the parent stood", body = [ChildBody]),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It neither runs nor is paused, a name is taken, or the key was used for another request", body = ErrorBody),
        (status = 503, description = "No room", body = ErrorBody),
    )
)]
pub(super) async fn fork(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    headers: HeaderMap,
    Json(body, hash): Json<ForkBody>,
) -> Result<Response, ApiError> {
    let count = match body.count.unwrap_or(1) {
        count @ 1..=MAX_CHILDREN => count,
        count => {
            return Err(Failure::invalid(format!(
                "`count` must be 1 to {MAX_CHILDREN}, not {count}"
            ))
            .into());
        }
    };
    let fork = Fork {
        count,
        name: body.name,
        secs: None,
        idempotency: idempotency_key(&headers)?.map(|key| (key, hash)),
    };
    let (children, phases) = app.fork(principal.team, id, fork).await?;
    let child = |child: Result<_, Failure>| match child {
        Ok((sandbox, certificate)) => ChildBody::Born(Box::new(RestoredBody {
            sandbox: SandboxBody::from(sandbox),
            restore_certificate: Option::map(certificate, RestoreCertificate::from),
        })),
        Err(failure) => ChildBody::Failed {
            error: failure.message,
        },
    };
    let body: Vec<_> = children.into_iter().map(child).collect();
    Ok(with_timing(StatusCode::CREATED, body, &phases))
}

/// How to take a checkpoint.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CheckpointRequest {
    /// Its name; made up where none is given.
    name: Option<String>,
}

/// A point that a sandbox can go back to.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct CheckpointBody {
    name: String,
    sandbox_id: String,
    size_bytes: u64,
    #[schema(format = DateTime)]
    created_at: String,
}

impl From<SnapshotRow> for CheckpointBody {
    fn from(row: SnapshotRow) -> Self {
        CheckpointBody {
            name: row.name,
            sandbox_id: row.sandbox.to_string(),
            size_bytes: row.size_bytes,
            created_at: row.created_at.to_string(),
        }
    }
}

/// Take a checkpoint
///
/// The sandbox goes on; `Server-Timing` has `frozen`, for how long it stood. Checkpoints end
/// with their sandbox.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/checkpoints", tag = "snapshots",
    request_body = CheckpointRequest,
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("Idempotency-Key" = Option<String>, Header,
            description = "The same key and body within 24 hours take one checkpoint"),
    ),
    responses(
        (status = 201, description = "It is taken", body = CheckpointBody),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It neither runs nor is paused, or the name is taken", body = ErrorBody),
    )
)]
pub(super) async fn checkpoint(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    headers: HeaderMap,
    Json(body, hash): Json<CheckpointRequest>,
) -> Result<Response, ApiError> {
    let take = Take {
        kind: SnapshotKind::Checkpoint,
        name: body.name,
        overwrite: false,
        disk_only: false,
        idempotency: idempotency_key(&headers)?.map(|key| (key, hash)),
    };
    let (row, phases) = app.take_snapshot(principal.team, id, take).await?;
    let body = CheckpointBody::from(row);
    Ok(with_timing(StatusCode::CREATED, body, &phases))
}

/// List a sandbox's checkpoints
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/checkpoints", tag = "snapshots",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("limit" = Option<u32>, Query, description = "1 to 1000, 100 by default"),
        ("cursor" = Option<String>, Query, description = "What `X-Next-Cursor` said before"),
    ),
    responses(
        (status = 200, description = "Newest first, with `X-Next-Cursor` if there are more", body = [CheckpointBody]),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
    )
)]
pub(super) async fn checkpoints(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<Response, ApiError> {
    query.only(&["limit", "cursor"], None)?;
    let asked = Asked::<Uuid>::read(&query, &page::NATIVE)?;
    app.row(principal.team, id).await?;
    let page = SnapshotPage {
        after: asked.after,
        limit: asked.look_for(),
    };
    let found = app.store.checkpoints(id, page).await;
    let body = |row| Some(CheckpointBody::from(row));
    Ok(asked.answer(found.map_err(Failure::from)?, |row| row.id, body))
}

/// Where to go back to.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RollbackBody {
    /// Name of one of its checkpoints.
    checkpoint: String,
}

/// Roll a sandbox back to a checkpoint
///
/// What it did since is lost; its programs go on where they stood then. If it cannot be
/// restored it runs on as it was.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/rollback", tag = "snapshots", request_body = RollbackBody,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "It runs as it was then", body = RestoredBody),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox or checkpoint", body = ErrorBody),
        (status = 409, description = "It neither runs nor is paused", body = ErrorBody),
    )
)]
pub(super) async fn rollback(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<RollbackBody>,
) -> Result<Response, ApiError> {
    let moved = app.roll_back(principal.team, id, &body.checkpoint).await?;
    Ok(restored(moved))
}

/// What to make a template of.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SnapshotRequest {
    /// The sandbox; it stays as it is.
    sandbox_id: String,
    /// The template's name; made up where none is given.
    name: Option<String>,
    /// `false`: only the disk counts, and what is made of the template boots. `true` by default.
    memory: Option<bool>,
}

/// A template.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SnapshotBody {
    name: String,
    /// `snapshot`, or `base` for an image's.
    #[serde(rename = "type")]
    #[schema(example = "snapshot")]
    kind: &'static str,
    vcpus: u32,
    memory_mb: u32,
    /// Of a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
    /// Of a snapshot.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    /// Everybody's, not the team's.
    platform: bool,
    /// It cannot be deleted here.
    protected: bool,
}

impl From<SnapshotRow> for SnapshotBody {
    fn from(row: SnapshotRow) -> Self {
        SnapshotBody {
            name: row.name,
            kind: "snapshot",
            vcpus: row.shape.vcpus.0,
            memory_mb: row.shape.memory.0,
            size_bytes: Some(row.size_bytes),
            created_at: Some(row.created_at.to_string()),
            platform: false,
            protected: false,
        }
    }
}

impl From<ListedTemplate> for SnapshotBody {
    fn from(template: ListedTemplate) -> Self {
        match template {
            ListedTemplate::Snapshot(row) => row.into(),
            ListedTemplate::Image(name, shape) => SnapshotBody {
                name,
                kind: "base",
                vcpus: shape.vcpus.0,
                memory_mb: shape.memory.0,
                size_bytes: None,
                created_at: None,
                platform: true,
                protected: true,
            },
        }
    }
}

/// Make a template of a sandbox
///
/// With its memory, unless that is not wanted: sandboxes made from it start in its very state.
/// The sandbox stays as it is.
#[utoipa::path(
    post, path = "/v1/snapshots", tag = "snapshots", request_body = SnapshotRequest,
    params(
        ("overwrite" = Option<bool>, Query, description = "Take the name from the template that has it"),
        ("Idempotency-Key" = Option<String>, Header,
            description = "The same key and body within 24 hours make one template"),
    ),
    responses(
        (status = 201, description = "It can be started from", body = SnapshotBody),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "The name is taken or reserved, or it neither runs nor is paused", body = ErrorBody),
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
    headers: HeaderMap,
    Json(body, hash): Json<SnapshotRequest>,
) -> Result<Response, ApiError> {
    query.only(&["overwrite"], None)?;
    let overwrite = match query.get("overwrite") {
        None | Some("false") => false,
        Some("true" | "") => true,
        Some(_) => return Err(Failure::invalid("`overwrite` must be true or false").into()),
    };
    let parsed = body.sandbox_id.parse();
    let id = parsed.map_err(|e: wrenn_types::IdError| Failure::invalid(e.to_string()))?;
    let take = Take {
        kind: SnapshotKind::Template,
        name: body.name,
        overwrite,
        disk_only: body.memory == Some(false),
        idempotency: idempotency_key(&headers)?.map(|key| (key, hash)),
    };
    let (row, phases) = app.take_snapshot(principal.team, id, take).await?;
    let body = SnapshotBody::from(row);
    Ok(with_timing(StatusCode::CREATED, body, &phases))
}

/// List templates
///
/// The team's snapshots, newest first, and after them the images' templates by name.
#[utoipa::path(
    get, path = "/v1/snapshots", tag = "snapshots",
    params(
        ("type" = Option<String>, Query, description = "Only `snapshot` or only `base`, the images'"),
        ("limit" = Option<u32>, Query, description = "1 to 1000, 100 by default"),
        ("cursor" = Option<String>, Query, description = "What `X-Next-Cursor` said before"),
    ),
    responses(
        (status = 200, description = "With `X-Next-Cursor` if there are more", body = [SnapshotBody]),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 503, description = "The host does not answer", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
) -> Result<Response, ApiError> {
    query.only(&["type", "limit", "cursor"], None)?;
    let kind = match query.get("type") {
        None | Some("") => None,
        Some("snapshot") => Some(TemplateKind::Snapshot),
        Some("base") => Some(TemplateKind::Base),
        Some(_) => return Err(Failure::invalid("`type` must be `snapshot` or `base`").into()),
    };
    let asked = Asked::<TemplateKey>::read(&query, &page::NATIVE)?;
    let (after, limit) = (asked.after.as_ref(), asked.look_for());
    let found = app.list_templates(principal.team, kind, after, limit);
    let found = found.await?;
    let body = |template| Some(SnapshotBody::from(template));
    Ok(asked.answer(found, ListedTemplate::key, body))
}

/// Delete a template that is a snapshot
///
/// Sandboxes that were made from it live on.
#[utoipa::path(
    delete, path = "/v1/snapshots/{name}", tag = "snapshots",
    params(("name" = String, Path, description = "Its name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such snapshot", body = ErrorBody),
    )
)]
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    principal: Principal,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.delete_template(principal.team, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
