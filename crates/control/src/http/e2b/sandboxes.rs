//! `/sandboxes` and `/v2/sandboxes`.

use std::sync::Arc;

use axum::extract::{FromRequestParts, State};
use axum::response::Response;
use http::request::Parts;
use http::{HeaderMap, HeaderName, StatusCode};
use percent_encoding::percent_decode_str;
use wrenn_store::{Page, RequestHash, SandboxFilter};
use wrenn_types::{SandboxId, SandboxState};

use super::model::{
    Connect, E2bErrorBody, ListedSandbox, LogEntry, LogLine, Logs, NewSandbox, Refresh,
    SandboxDetail, SandboxModel, SetTimeout,
};
use super::network::rules_of_new;
use crate::app::{
    App, Clock, Code, CreateSpec, Destroyed, Failure, Resume, Sandbox, template_name,
};
use crate::auth::Principal;
use crate::http::error::E2bError;
use crate::http::extract::{Json, Query, idempotency_key, pairs, path_param};
use crate::http::native::MAX_TIMEOUT_SECS;
use crate::http::page::{self, Asked};
use crate::http::timing::with_timing;

/// Seconds a sandbox lives where nothing is said.
pub(super) const DEFAULT_TIMEOUT_V1: i64 = 15;
const DEFAULT_TIMEOUT_V2: i64 = 300;

/// Most of what labels may hold, names and values together.
const MAX_METADATA_BYTES: usize = 16 * 1024;

const TOTAL_RUNNING: HeaderName = HeaderName::from_static("x-total-running");

/// The states these clients know.
fn visible() -> Vec<SandboxState> {
    SandboxState::ALL
        .iter()
        .copied()
        .filter(|s| s.as_e2b().is_some())
        .collect()
}

pub(super) fn gone(text: &str) -> E2bError {
    let text: String = text.chars().take(80).collect();
    E2bError(Failure::not_found(format!(
        "sandbox \"{text}\" doesn't exist or you don't have access to it"
    )))
}

/// The sandbox in the path. What cannot be an id names nothing, and these clients ask for a 404 then.
pub(super) struct Id(pub(super) SandboxId);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = E2bError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, E2bError> {
        let text = path_param(parts, state, "id").await?;
        text.parse().map(Id).map_err(|_| gone(&text))
    }
}

/// A body, with errors in E2B's form.
pub(super) struct Body<T>(pub(super) T, pub(super) RequestHash);

impl<S: Send + Sync, T: serde::de::DeserializeOwned> axum::extract::FromRequest<S> for Body<T> {
    type Rejection = E2bError;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, E2bError> {
        let Json(body, hash) = Json::from_request(request, state).await?;
        Ok(Body(body, hash))
    }
}

/// Seconds until the end. Zero is for those who may end a sandbox that way.
pub(super) fn seconds(given: i64, least: i64) -> Result<u32, Failure> {
    if given < least {
        return Err(Failure::invalid(if least > 0 {
            "Timeout must be greater than 0".to_owned()
        } else {
            "Timeout cannot be negative".to_owned()
        }));
    }
    match u32::try_from(given) {
        Ok(secs) if given <= MAX_TIMEOUT_SECS => Ok(secs),
        _ => Err(Failure::invalid(format!(
            "Timeout cannot be greater than {MAX_TIMEOUT_SECS} seconds"
        ))),
    }
}

async fn create(
    app: Arc<App>,
    principal: Principal,
    headers: HeaderMap,
    Body(body, hash): Body<NewSandbox>,
    default_timeout: i64,
    secure: bool,
) -> Result<Response, E2bError> {
    body.check()?;
    let timeout = seconds(body.timeout.unwrap_or(default_timeout), 1)?;
    let metadata = body.metadata.unwrap_or_default();
    let bytes: usize = metadata
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if bytes > MAX_METADATA_BYTES {
        let message =
            format!("metadata has {bytes} bytes; at most {MAX_METADATA_BYTES} are allowed");
        return Err(Failure::invalid(message).into());
    }
    let network = rules_of_new(body.allow_internet_access, body.network.as_ref())?;
    let spec = CreateSpec {
        template: Some(body.template_id),
        vcpus: None,
        memory_mib: None,
        metadata,
        envs: body.env_vars.unwrap_or_default(),
        clock: Clock::Absolute(timeout),
        secure,
        network,
        pause_at_end: body.auto_pause.unwrap_or(false),
        pause_disk_only: body.auto_pause_memory == Some(false),
        auto_resume: body.auto_resume.is_some_and(|resume| resume.enabled),
        idempotency: idempotency_key(&headers)?.map(|key| (key, hash)),
    };
    let created = app.create(principal.team, spec).await?;
    let body = SandboxModel::new(&app.config, created.sandbox);
    Ok(with_timing(StatusCode::CREATED, body, &created.phases))
}

/// Create a sandbox
#[utoipa::path(
    post, path = "/sandboxes", tag = "e2b", request_body = NewSandbox,
    responses(
        (status = 201, body = SandboxModel),
        (status = 400, body = E2bErrorBody, description = "Malformed, or an option that is not offered"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such template"),
        (status = 503, body = E2bErrorBody, description = "No room"),
    )
)]
pub(super) async fn create_v1(
    State(app): State<Arc<App>>,
    principal: Principal,
    headers: HeaderMap,
    body: Body<NewSandbox>,
) -> Result<Response, E2bError> {
    let secure = body.0.secure.unwrap_or(false);
    create(app, principal, headers, body, DEFAULT_TIMEOUT_V1, secure).await
}

/// Create a sandbox (version 2)
#[utoipa::path(
    post, path = "/v2/sandboxes", tag = "e2b", request_body = NewSandbox,
    params(("Idempotency-Key" = Option<String>, Header,
        description = "The same key and body within 24 hours make one sandbox")),
    responses(
        (status = 201, body = SandboxModel),
        (status = 400, body = E2bErrorBody, description = "Malformed, or an option that is not offered"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such template"),
        (status = 409, body = E2bErrorBody, description = "The key was used for another request"),
        (status = 503, body = E2bErrorBody, description = "No room"),
    )
)]
pub(super) async fn create_v2(
    State(app): State<Arc<App>>,
    principal: Principal,
    headers: HeaderMap,
    body: Body<NewSandbox>,
) -> Result<Response, E2bError> {
    create(app, principal, headers, body, DEFAULT_TIMEOUT_V2, true).await
}

/// What these clients call: there or not. A sandbox that is being ended is not.
pub(super) fn as_missing(id: SandboxId, failure: Failure) -> E2bError {
    match failure.code {
        Code::NotFound | Code::InvalidState => gone(&id.to_string()),
        _ => failure.into(),
    }
}

/// The same where these clients know of a conflict: a sandbox that they can see, and that is
/// in no state for what was asked, is there.
pub(super) fn as_conflict(id: SandboxId, failure: Failure) -> E2bError {
    let state = failure
        .details
        .get("state")
        .and_then(|state| state.as_str());
    let state = state.and_then(|state| state.parse::<SandboxState>().ok());
    match failure.code {
        Code::InvalidState if state.is_some_and(|state| state.as_e2b().is_some()) => failure.into(),
        _ => as_missing(id, failure),
    }
}

async fn connect(
    app: Arc<App>,
    principal: Principal,
    id: SandboxId,
    body: Connect,
    default_timeout: i64,
) -> Result<Response, E2bError> {
    let resume = Resume {
        secs: Some(seconds(body.timeout.unwrap_or(default_timeout), 1)?),
        boot: body.memory == Some(false),
        pause_at_end: false,
    };
    let moved = app
        .resume(principal.team, id, resume)
        .await
        .map_err(|e| as_conflict(id, e))?;
    let status = match moved.now {
        true => StatusCode::CREATED,
        false => StatusCode::OK,
    };
    let model = SandboxModel::new(&app.config, moved.sandbox);
    Ok(with_timing(status, model, &moved.phases))
}

/// Connect to a sandbox
#[utoipa::path(
    post, path = "/sandboxes/{id}/connect", tag = "e2b", request_body = Connect,
    params(("id" = String, Path)),
    responses(
        (status = 200, body = SandboxModel, description = "It ran, and does so not less long than before"),
        (status = 201, body = SandboxModel, description = "It was paused and runs again"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
    )
)]
pub(super) async fn connect_v1(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<Connect>,
) -> Result<Response, E2bError> {
    connect(app, principal, id, body, DEFAULT_TIMEOUT_V1).await
}

/// Connect to a sandbox (version 2)
#[utoipa::path(
    post, path = "/v2/sandboxes/{id}/connect", tag = "e2b", request_body = Connect,
    params(("id" = String, Path)),
    responses(
        (status = 200, body = SandboxModel, description = "It ran, and does so not less long than before"),
        (status = 201, body = SandboxModel, description = "It was paused and runs again"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
    )
)]
pub(super) async fn connect_v2(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<Connect>,
) -> Result<Response, E2bError> {
    connect(app, principal, id, body, DEFAULT_TIMEOUT_V2).await
}

/// The clients encode names and values once more than the form that holds them.
fn metadata_filter(query: &Query) -> SandboxFilter {
    let decode = |text: String| percent_decode_str(&text).decode_utf8_lossy().into_owned();
    let metadata = query.get("metadata").map(pairs).unwrap_or_default();
    SandboxFilter {
        metadata: metadata
            .into_iter()
            .map(|(name, value)| (decode(name), decode(value)))
            .collect(),
        ..SandboxFilter::default()
    }
}

/// List the running sandboxes
#[utoipa::path(
    get, path = "/sandboxes", tag = "e2b",
    params(("metadata" = Option<String>, Query, description = "`k=v&k2=v2`, encoded once more")),
    responses(
        (status = 200, body = [ListedSandbox]),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
    )
)]
pub(super) async fn list_v1(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
) -> Result<axum::Json<Vec<ListedSandbox>>, E2bError> {
    let mut filter = metadata_filter(&query);
    filter.states = visible();
    filter.states.retain(|s| s.as_e2b() == Some("running"));
    // This version has no pages.
    let page = Page {
        after: None,
        limit: u32::MAX,
        descending: true,
    };
    let found = app.list(principal.team, &filter, page).await?;
    Ok(axum::Json(
        found.iter().filter_map(ListedSandbox::new).collect(),
    ))
}

/// List sandboxes (version 2)
#[utoipa::path(
    get, path = "/v2/sandboxes", tag = "e2b",
    params(
        ("metadata" = Option<String>, Query, description = "`k=v&k2=v2`, encoded once more"),
        ("state" = Option<String>, Query, description = "`running`, `paused` or both, separated by a comma"),
        ("order" = Option<String>, Query, description = "`desc`, the default, or `asc`, by start"),
        ("template" = Option<String>, Query, description = "Name of a template, without a tag"),
        ("limit" = Option<u32>, Query, description = "1 to 100"),
        ("nextToken" = Option<String>, Query, description = "What `X-Next-Token` said before"),
    ),
    responses(
        (status = 200, body = [ListedSandbox], description = "With `X-Next-Token` if there are more"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
    )
)]
pub(super) async fn list_v2(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
) -> Result<Response, E2bError> {
    query.only(
        &[
            "metadata",
            "state",
            "order",
            "template",
            "limit",
            "nextToken",
        ],
        None,
    )?;
    let mut filter = metadata_filter(&query);
    filter.states = visible();
    let words: Vec<&str> = query
        .0
        .iter()
        .filter(|(name, _)| name == "state")
        .flat_map(|(_, value)| value.split(','))
        .filter(|word| !word.is_empty())
        .collect();
    if let Some(wrong) = words.iter().find(|w| !matches!(**w, "running" | "paused")) {
        let wrong: String = wrong.chars().take(40).collect();
        return Err(
            Failure::invalid(format!("state must be running or paused, not {wrong}")).into(),
        );
    }
    if !words.is_empty() {
        filter
            .states
            .retain(|s| s.as_e2b().is_some_and(|word| words.contains(&word)));
    }
    if let Some(template) = query.get("template") {
        if template.contains(':') {
            return Err(Failure::invalid("template must be a name or id without a tag").into());
        }
        filter.template = Some(template_name(template).to_owned());
    }
    let descending = match query.get("order") {
        None | Some("desc") => true,
        Some("asc") => false,
        Some(_) => return Err(Failure::invalid("order must be asc or desc").into()),
    };
    let asked = Asked::<SandboxId>::read(&query, &page::E2B)?;
    let page = Page {
        after: asked.after,
        limit: asked.look_for(),
        descending,
    };
    let found = app.list(principal.team, &filter, page).await?;
    let key = |sandbox: &Sandbox| sandbox.row.id;
    let mut response = asked.answer(found, key, |sandbox| ListedSandbox::new(&sandbox));
    let running: Vec<SandboxState> = visible()
        .into_iter()
        .filter(|s| s.as_e2b() == Some("running"))
        .collect();
    let total = app
        .store
        .count_sandboxes(principal.team, &running)
        .await
        .map_err(Failure::from)?;
    response.headers_mut().insert(TOTAL_RUNNING, total.into());
    Ok(response)
}

/// Look at a sandbox
#[utoipa::path(
    get, path = "/sandboxes/{id}", tag = "e2b", params(("id" = String, Path)),
    responses(
        (status = 200, body = SandboxDetail),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox, or it has ended"),
    )
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<axum::Json<SandboxDetail>, E2bError> {
    let sandbox = app
        .get(principal.team, id)
        .await
        .map_err(|e| as_missing(id, e))?;
    match SandboxDetail::new(&app.config, &sandbox) {
        Some(detail) => Ok(axum::Json(detail)),
        None => Err(gone(&id.to_string())),
    }
}

/// End a sandbox
#[utoipa::path(
    delete, path = "/sandboxes/{id}", tag = "e2b", params(("id" = String, Path)),
    responses(
        (status = 204, description = "It has ended"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox, or it had ended"),
    )
)]
pub(super) async fn kill(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<StatusCode, E2bError> {
    match app.destroy(principal.team, id).await {
        Ok(Destroyed::Now) => Ok(StatusCode::NO_CONTENT),
        Ok(Destroyed::Already) => Err(gone(&id.to_string())),
        Err(e) => Err(as_missing(id, e)),
    }
}

/// Set when a sandbox ends
#[utoipa::path(
    post, path = "/sandboxes/{id}/timeout", tag = "e2b", request_body = SetTimeout,
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "It ends so many seconds from now"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
    )
)]
pub(super) async fn set_timeout(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<SetTimeout>,
) -> Result<StatusCode, E2bError> {
    let secs = seconds(body.timeout, 0)?;
    let done = app.set_end(principal.team, id, secs, false).await;
    done.map_err(|e| as_missing(id, e))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Let a sandbox live longer
#[utoipa::path(
    post, path = "/sandboxes/{id}/refreshes", tag = "e2b", request_body = Refresh,
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "It does not end before"),
        (status = 400, body = E2bErrorBody, description = "Malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
    )
)]
pub(super) async fn refresh(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<Refresh>,
) -> Result<StatusCode, E2bError> {
    let secs = match body.duration.unwrap_or(DEFAULT_TIMEOUT_V1) {
        secs @ 0..=3600 => u32::try_from(secs).unwrap_or(0),
        _ => return Err(Failure::invalid("duration must be 0 to 3600 seconds").into()),
    };
    let done = app.set_end(principal.team, id, secs, true).await;
    done.map_err(|e| as_missing(id, e))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Read a sandbox's console
#[utoipa::path(
    get, path = "/sandboxes/{id}/logs", tag = "e2b",
    params(
        ("id" = String, Path),
        ("start" = Option<u64>, Query, description = "Unix time in ms; lines have none, so it cuts nothing"),
        ("limit" = Option<u32>, Query, description = "The newest so many lines, 1000 by default"),
    ),
    responses(
        (status = 200, body = Logs),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
    )
)]
pub(super) async fn logs(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<axum::Json<Logs>, E2bError> {
    let limit = query.number("limit", 1, 100_000)?.unwrap_or(1000) as usize;
    let row = app
        .row(principal.team, id)
        .await
        .map_err(|e| as_missing(id, e))?;
    let bytes = app
        .logs(principal.team, id, 0)
        .await
        .map_err(|e| as_missing(id, e))?;
    let timestamp = row.started_at.unwrap_or(row.created_at).to_string();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let lines = &lines[lines.len().saturating_sub(limit)..];
    Ok(axum::Json(Logs {
        logs: lines
            .iter()
            .map(|line| LogLine {
                timestamp: timestamp.clone(),
                line: (*line).to_owned(),
            })
            .collect(),
        log_entries: lines
            .iter()
            .map(|line| LogEntry {
                timestamp: timestamp.clone(),
                message: (*line).to_owned(),
                level: "info",
                fields: Default::default(),
            })
            .collect(),
    }))
}
