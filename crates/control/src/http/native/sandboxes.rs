//! `/v1/sandboxes`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_store::{Page, SandboxFilter};
use wrenn_types::{SandboxId, SandboxState};

use super::ErrorBody;
use super::network::Network;
use crate::app::{App, Clock, CreateSpec, Failure, Sandbox};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Json, Query, check_metadata, idempotency_key};
use crate::http::page::{self, Asked};
use crate::http::timing::with_timing;

/// Longest lifetime that may be asked for: 30 days.
pub(in crate::http) const MAX_TIMEOUT_SECS: i64 = 30 * 24 * 3600;

const MAX_METADATA: usize = 20;
const MAX_METADATA_VALUE: usize = 64;

/// What to create. Everything has a default.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateSandbox {
    /// Name of a template; `minimal` by default, which `minimal-ubuntu` and `base` mean too.
    #[schema(example = "minimal")]
    template: Option<String>,
    /// Virtual processors; the template's by default.
    #[schema(minimum = 1)]
    vcpus: Option<i64>,
    /// Memory in MiB; the template's by default.
    #[schema(minimum = 128, example = 512)]
    memory_mb: Option<i64>,
    /// Ends after so many seconds without use; 0, the default: never.
    #[schema(minimum = 0, maximum = 2_592_000)]
    timeout_sec: Option<i64>,
    /// Labels: at most 20, values of at most 64 characters.
    metadata: Option<BTreeMap<String, String>>,
    /// Environment of every program in it.
    #[serde(alias = "envs")]
    env: Option<BTreeMap<String, String>>,
    /// What happens when `timeout_sec` is over: `kill`, the default, or `pause`.
    #[schema(example = "kill")]
    on_timeout: Option<String>,
    /// While it is paused, traffic to one of its ports resumes it; no by default.
    auto_resume: Option<bool>,
    /// What it may reach.
    network: Option<Network>,
}

/// A sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SandboxBody {
    #[schema(example = "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00")]
    id: String,
    /// `pending`, `starting`, `running`, `pausing`, `paused`, `snapshotting`, `resuming`, `stopping`,
    /// `stopped`, `missing` or `error`.
    #[schema(example = "running")]
    status: &'static str,
    /// Why, where that was not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What a fork called it.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    template: String,
    vcpus: u32,
    memory_mb: u32,
    disk_size_mb: u64,
    /// Seconds without use after which it ends; 0: never.
    timeout_sec: u32,
    /// When it ends whatever happens.
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    end_at: Option<String>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    started_at: Option<String>,
    #[schema(format = DateTime)]
    last_active_at: Option<String>,
    #[schema(format = DateTime)]
    last_updated: String,
    #[schema(format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    stopped_at: Option<String>,
    /// What happens when its time is over: `kill` or `pause`.
    on_timeout: &'static str,
    metadata: BTreeMap<String, String>,
}

impl From<Sandbox> for SandboxBody {
    fn from(Sandbox { row, live }: Sandbox) -> Self {
        let last_active = live.map(|l| l.last_active).or(row.started_at);
        SandboxBody {
            id: row.id.to_string(),
            status: row.state.as_str(),
            reason: row.reason,
            name: row.name,
            template: row.template,
            vcpus: row.shape.vcpus.0,
            memory_mb: row.shape.memory.0,
            disk_size_mb: row.disk_mib,
            timeout_sec: row.idle_timeout_secs,
            end_at: row.end_at.map(|t| t.to_string()),
            created_at: row.created_at.to_string(),
            started_at: row.started_at.map(|t| t.to_string()),
            last_active_at: last_active.map(|t| t.to_string()),
            last_updated: row.updated_at.to_string(),
            stopped_at: row.stopped_at.map(|t| t.to_string()),
            on_timeout: if row.pause_at_end { "pause" } else { "kill" },
            metadata: row.metadata,
        }
    }
}

fn spec(body: CreateSandbox) -> Result<CreateSpec, Failure> {
    let idle = match body.timeout_sec.unwrap_or(0) {
        secs @ 0..=MAX_TIMEOUT_SECS => u32::try_from(secs).unwrap_or(0),
        secs => {
            return Err(Failure::invalid(format!(
                "`timeout_sec` cannot be {secs}: use 0 (never) to {MAX_TIMEOUT_SECS} seconds"
            )));
        }
    };
    let pause_at_end = match body.on_timeout.as_deref() {
        None | Some("kill") => false,
        Some("pause") => true,
        Some(other) => {
            let other: String = other.chars().take(40).collect();
            return Err(Failure::invalid(format!(
                "`on_timeout` must be `pause` or `kill`, not `{other}`"
            )));
        }
    };
    let metadata = body.metadata.unwrap_or_default();
    check_metadata(&metadata, MAX_METADATA, MAX_METADATA_VALUE)?;
    Ok(CreateSpec {
        template: body.template,
        vcpus: body.vcpus,
        memory_mib: body.memory_mb,
        metadata,
        envs: body.env.unwrap_or_default(),
        clock: Clock::Idle(idle),
        secure: true,
        network: body.network.unwrap_or_default().into(),
        pause_at_end,
        pause_disk_only: false,
        auto_resume: body.auto_resume.unwrap_or(false),
        idempotency: None,
    })
}

/// Create a sandbox
///
/// Answers when it runs. `Server-Timing` says where the time went.
#[utoipa::path(
    post, path = "/v1/sandboxes", tag = "sandboxes", request_body = CreateSandbox,
    params(("Idempotency-Key" = Option<String>, Header,
        description = "The same key and body within 24 hours make one sandbox")),
    responses(
        (status = 201, description = "It runs", body = SandboxBody),
        (status = 400, description = "Malformed, or a shape that cannot be", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such template; those there are are listed", body = ErrorBody),
        (status = 409, description = "The key was used for another request", body = ErrorBody),
        (status = 503, description = "No room, or the host does not answer", body = ErrorBody),
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    principal: Principal,
    headers: HeaderMap,
    Json(body, hash): Json<CreateSandbox>,
) -> Result<Response, ApiError> {
    let mut spec = spec(body)?;
    spec.idempotency = idempotency_key(&headers)?.map(|key| (key, hash));
    let created = app.create(principal.team, spec).await?;
    let body = SandboxBody::from(created.sandbox);
    Ok(with_timing(StatusCode::CREATED, body, &created.phases))
}

/// List sandboxes
///
/// Newest first; those whose life is over only when their state is asked for.
#[utoipa::path(
    get, path = "/v1/sandboxes", tag = "sandboxes",
    params(
        ("state" = Option<String>, Query, description = "States, separated by commas, or `all`"),
        ("template" = Option<String>, Query, description = "Name of a template"),
        ("metadata.key" = Option<String>, Query,
            description = "Only with this value of the label `key`, for any `key`; may be repeated"),
        ("limit" = Option<u32>, Query, description = "1 to 1000, 100 by default"),
        ("cursor" = Option<String>, Query, description = "What `X-Next-Cursor` said before"),
    ),
    responses(
        (status = 200, description = "With `X-Next-Cursor` if there are more", body = [SandboxBody]),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
) -> Result<Response, ApiError> {
    query.only(&["state", "template", "limit", "cursor"], Some("metadata."))?;
    let asked = Asked::<SandboxId>::read(&query, &page::NATIVE)?;
    let filter = SandboxFilter {
        states: states(&query)?,
        metadata: query
            .0
            .iter()
            .filter_map(|(name, value)| {
                Some((name.strip_prefix("metadata.")?.to_owned(), value.clone()))
            })
            .collect(),
        template: query.get("template").map(str::to_owned),
        started_after: None,
    };
    let page = Page {
        after: asked.after,
        limit: asked.look_for(),
        descending: true,
    };
    let found = app.list(principal.team, &filter, page).await?;
    let body = |sandbox| Some(SandboxBody::from(sandbox));
    Ok(asked.answer(found, |sandbox| sandbox.row.id, body))
}

/// The states that are asked for; none asked for means those of a life that goes on.
fn states(query: &Query) -> Result<Vec<SandboxState>, Failure> {
    let mut states = Vec::new();
    let words = query
        .0
        .iter()
        .filter(|(name, _)| name == "state")
        .flat_map(|(_, v)| v.split(','));
    for word in words.filter(|word| !word.is_empty()) {
        if word == "all" {
            return Ok(SandboxState::ALL.to_vec());
        }
        let state = word
            .parse()
            .map_err(|e: wrenn_types::UnknownState| Failure::invalid(e.to_string()))?;
        states.push(state);
    }
    if states.is_empty() {
        states.extend(SandboxState::ALL.iter().filter(|s| !s.is_final()));
    }
    Ok(states)
}

/// Look at a sandbox
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, body = SandboxBody),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
    )
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<axum::Json<SandboxBody>, ApiError> {
    let sandbox = app.get(principal.team, id).await?;
    Ok(axum::Json(sandbox.into()))
}

/// End a sandbox
///
/// Answers when everything of it was given back. Ending one that has ended is no error.
#[utoipa::path(
    delete, path = "/v1/sandboxes/{id}", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 204, description = "It has ended"),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It is being ended by another request", body = ErrorBody),
    )
)]
pub(super) async fn destroy(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<StatusCode, ApiError> {
    app.destroy(principal.team, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Count as use of a sandbox
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/ping", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 204, description = "Its time without use begins anew"),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
    )
)]
pub(super) async fn ping(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<StatusCode, ApiError> {
    app.ping(principal.team, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Read a sandbox's console and agent log
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/logs", tag = "sandboxes",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("tail_bytes" = Option<u64>, Query, description = "The newest so many bytes; 0, the default: all"),
    ),
    responses(
        (status = 200, description = "As it came", body = String, content_type = "text/plain"),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox, or its log is gone", body = ErrorBody),
    )
)]
pub(super) async fn logs(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<Response, ApiError> {
    query.only(&["tail_bytes"], None)?;
    let tail = query.number("tail_bytes", 0, u64::MAX)?.unwrap_or(0);
    let bytes = app.logs(principal.team, id, tail).await?;
    Ok(([(CONTENT_TYPE, "text/plain; charset=utf-8")], bytes).into_response())
}
