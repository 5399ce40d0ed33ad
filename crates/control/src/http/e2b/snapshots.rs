//! Pausing and resuming, forks and snapshots, in E2B's words. A snapshot's id is the name of
//! the template it is.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use wrenn_store::{SnapshotKind, SnapshotPage, SnapshotRow};
use wrenn_types::{SandboxId, SandboxState};

use super::model::{E2bErrorBody, SandboxModel};
use super::sandboxes::{Body, DEFAULT_TIMEOUT_V1, Id, as_conflict, as_missing, seconds};
use crate::app::{self, App, Code, Failure, Take};
use crate::auth::Principal;
use crate::http::error::E2bError;
use crate::http::extract::{Query, idempotency_key};
use crate::http::page::{self, Asked};
use crate::http::timing::{timed, with_timing};

/// Most children of one fork.
const MAX_CHILDREN: i64 = 100;

/// How to pause.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = E2bPause)]
pub(crate) struct Pause {
    /// `false`: only its disk is saved, and it boots when it is resumed.
    memory: Option<bool>,
    /// Always so: a guest that does not answer cannot be paused, and the sandbox runs on.
    #[allow(dead_code, reason = "either value asks for what is done anyway")]
    require_healthy_guest: Option<bool>,
}

/// Pause a sandbox
#[utoipa::path(
    post, path = "/sandboxes/{id}/pause", tag = "e2b", request_body = Pause,
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "It is paused"),
        (status = 400, body = E2bErrorBody, description = "An option that is not offered"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
        (status = 409, body = E2bErrorBody, description = "It was paused"),
        (status = 503, body = E2bErrorBody, description = "Its guest agent does not answer; it runs on"),
        (status = 507, body = E2bErrorBody, description = "The host's disk is full; it runs on"),
    )
)]
pub(super) async fn pause(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<Pause>,
) -> Result<Response, E2bError> {
    let disk_only = body.memory == Some(false);
    let paused = app.pause(principal.team, id, disk_only).await;
    let moved = paused.map_err(|mut failure| {
        // To these clients 409 means that it was paused before, and 503 that it runs on.
        if failure.code == Code::GuestUnresponsive {
            failure.code = Code::HostUnavailable;
            failure.e2b = None;
        }
        as_conflict(id, failure)
    })?;
    Ok(timed(StatusCode::NO_CONTENT.into_response(), &moved.phases))
}

/// How to resume.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = E2bResume)]
pub(crate) struct Resume {
    /// Seconds from now until it ends.
    timeout: Option<i64>,
    /// `true`: from now on it is paused when its time is over, not ended. `false` keeps what was
    /// said before, so that nothing is lost.
    auto_pause: Option<bool>,
}

/// Resume a sandbox
#[utoipa::path(
    post, path = "/sandboxes/{id}/resume", tag = "e2b", request_body = Resume,
    params(("id" = String, Path)),
    responses(
        (status = 201, body = SandboxModel, description = "It runs"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
        (status = 409, body = E2bErrorBody, description = "It ran"),
    )
)]
pub(super) async fn resume(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<Resume>,
) -> Result<Response, E2bError> {
    let secs = seconds(body.timeout.unwrap_or(DEFAULT_TIMEOUT_V1), 1)?;
    // Asked first, for it would live longer by being resumed again.
    let known = app.get(principal.team, id).await;
    let known = known.map_err(|e| as_missing(id, e))?.row;
    let running = known.state == SandboxState::Running;
    let moved = match running {
        true => None,
        false => {
            let resume = app::Resume {
                secs: Some(secs),
                boot: false,
                pause_at_end: body.auto_pause == Some(true),
            };
            Some(app.resume(principal.team, id, resume).await)
        }
    };
    let moved = moved.transpose().map_err(|e| as_conflict(id, e))?;
    let Some(moved) = moved.filter(|moved| moved.now) else {
        let message = format!("sandbox {id} is already running");
        return Err(Failure::new(Code::Conflict, message).into());
    };
    let model = SandboxModel::new(&app.config, moved.sandbox);
    Ok(with_timing(StatusCode::CREATED, model, &moved.phases))
}

/// How to fork.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = E2bFork)]
pub(crate) struct Fork {
    /// Seconds from now until each child ends; 15 by default.
    timeout: Option<i64>,
    /// How many children; 1 by default.
    count: Option<i64>,
}

/// A child of a fork.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bForked)]
pub(crate) struct Forked {
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<SandboxModel>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ForkError>,
}

/// Why a child could not be started.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bForkError)]
pub(crate) struct ForkError {
    code: u16,
    message: String,
}

/// Fork a sandbox
#[utoipa::path(
    post, path = "/sandboxes/{id}/fork", tag = "e2b", request_body = Fork,
    params(("id" = String, Path)),
    responses(
        (status = 201, body = [Forked], description = "The children"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
        (status = 503, body = E2bErrorBody, description = "No room"),
    )
)]
pub(super) async fn fork(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    headers: HeaderMap,
    Body(body, hash): Body<Fork>,
) -> Result<Response, E2bError> {
    let secs = seconds(body.timeout.unwrap_or(DEFAULT_TIMEOUT_V1), 1)?;
    let count = match body.count.unwrap_or(1) {
        count @ 1..=MAX_CHILDREN => u32::try_from(count).unwrap_or(1),
        _ => {
            let message = format!("count must be 1 to {MAX_CHILDREN}");
            return Err(Failure::invalid(message).into());
        }
    };
    let fork = app::Fork {
        count,
        name: None,
        secs: Some(secs),
        idempotency: idempotency_key(&headers)?.map(|key| (key, hash)),
    };
    let forked = app.fork(principal.team, id, fork).await;
    let (children, phases) = forked.map_err(|e| as_conflict(id, e))?;
    let child = |child: Result<_, Failure>| match child {
        Ok((sandbox, _)) => Forked {
            sandbox: Some(SandboxModel::new(&app.config, sandbox)),
            error: None,
        },
        Err(failure) => Forked {
            sandbox: None,
            error: Some(ForkError {
                code: failure.code.status(),
                message: failure.message,
            }),
        },
    };
    let body: Vec<Forked> = children.into_iter().map(child).collect();
    Ok(with_timing(StatusCode::CREATED, body, &phases))
}

/// How to take a snapshot.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[schema(as = E2bNewSnapshot)]
pub(crate) struct NewSnapshot {
    name: Option<String>,
    /// `false`: only the disk is saved, and what is made of it boots.
    memory: Option<bool>,
}

/// A snapshot.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bSnapshot)]
pub(crate) struct SnapshotInfo {
    /// What sandboxes are created from, and what is deleted.
    #[serde(rename = "snapshotID")]
    snapshot_id: String,
    names: Vec<String>,
}

impl From<SnapshotRow> for SnapshotInfo {
    fn from(row: SnapshotRow) -> Self {
        SnapshotInfo {
            names: vec![row.name.clone()],
            snapshot_id: row.name,
        }
    }
}

/// Take a snapshot of a sandbox, which goes on
#[utoipa::path(
    post, path = "/sandboxes/{id}/snapshots", tag = "e2b", request_body = NewSnapshot,
    params(("id" = String, Path)),
    responses(
        (status = 201, body = SnapshotInfo),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
        (status = 409, body = E2bErrorBody, description = "The name is reserved, or its guest agent does not answer"),
        (status = 507, body = E2bErrorBody, description = "The host's disk is full"),
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    headers: HeaderMap,
    Body(body, hash): Body<NewSnapshot>,
) -> Result<Response, E2bError> {
    // A name is a new version of what had it before, as with templates.
    let take = Take {
        kind: SnapshotKind::Template,
        name: body.name,
        overwrite: true,
        disk_only: body.memory == Some(false),
        idempotency: idempotency_key(&headers)?.map(|key| (key, hash)),
    };
    let taken = app.take_snapshot(principal.team, id, take).await;
    let (row, phases) = taken.map_err(|e| as_conflict(id, e))?;
    let body = SnapshotInfo::from(row);
    Ok(with_timing(StatusCode::CREATED, body, &phases))
}

/// List snapshots
#[utoipa::path(
    get, path = "/snapshots", tag = "e2b",
    params(
        ("sandboxID" = Option<String>, Query, description = "Only of this sandbox"),
        ("name" = Option<String>, Query, description = "Only of this name"),
        ("limit" = Option<u32>, Query, description = "1 to 100"),
        ("nextToken" = Option<String>, Query, description = "What `X-Next-Token` said before"),
    ),
    responses(
        (status = 200, body = [SnapshotInfo], description = "With `X-Next-Token` if there are more"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
    )
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
) -> Result<Response, E2bError> {
    let asked = Asked::<Uuid>::read(&query, &page::E2B)?;
    let given = |name| query.get(name).filter(|text: &&str| !text.is_empty());
    // What cannot be an id names no sandbox, and so no snapshot of it.
    let of = given("sandboxID").map(|of| of.parse::<SandboxId>().ok());
    let found = match of {
        Some(None) => Vec::new(),
        None | Some(Some(_)) => {
            let page = SnapshotPage {
                after: asked.after,
                limit: asked.look_for(),
            };
            app.store
                .template_snapshots(principal.team, of.flatten(), given("name"), page)
                .await
                .map_err(Failure::from)?
        }
    };
    let body = |row| Some(SnapshotInfo::from(row));
    Ok(asked.answer(found, |row| row.id, body))
}

/// Delete a snapshot
#[utoipa::path(
    delete, path = "/templates/{template}", tag = "e2b", params(("template" = String, Path)),
    responses(
        (status = 204, description = "It is gone; what was made from it lives on"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such snapshot"),
    )
)]
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    principal: Principal,
    Path(template): Path<String>,
) -> Result<StatusCode, E2bError> {
    let name = crate::app::template_name(&template);
    app.delete_template(principal.team, name).await?;
    Ok(StatusCode::NO_CONTENT)
}
