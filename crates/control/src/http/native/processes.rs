//! `…/processes`: programs that run in a sandbox.

use std::sync::Arc;

use axum::extract::{FromRequestParts, State};
use http::StatusCode;
use http::request::Parts;
use serde::Serialize;
use utoipa::ToSchema;

use super::{ErrorBody, signal};
use crate::app::{App, Selector};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Query, path_param};

/// The process in the path: a pid or a tag.
pub(super) struct Process(pub(super) Selector);

impl<S: Send + Sync> FromRequestParts<S> for Process {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_param(parts, state, "process").await?;
        Ok(Process(Selector::parse(&text)?))
    }
}

/// A running program.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ProcessBody {
    pid: u32,
    tag: Option<String>,
    cmd: String,
    args: Vec<String>,
    cwd: Option<String>,
}

/// The running programs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ProcessList {
    processes: Vec<ProcessBody>,
}

/// List the running programs
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/processes", tag = "processes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "Those that were started through the API", body = ProcessList),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<axum::Json<ProcessList>, ApiError> {
    let processes = app.processes(principal.team, id).await?;
    let body = |p: wrenn_wire::wrenn::host::v1::ProcessInfo| ProcessBody {
        pid: p.pid,
        tag: p.tag,
        cmd: p.cmd,
        args: p.args,
        cwd: p.cwd,
    };
    Ok(axum::Json(ProcessList {
        processes: processes.into_iter().map(body).collect(),
    }))
}

/// Send a signal to a program
#[utoipa::path(
    delete, path = "/v1/sandboxes/{id}/processes/{process}", tag = "processes",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("process" = String, Path, description = "Its pid or its tag"),
        ("signal" = Option<String>, Query, description = "`SIGKILL`, the default, or `SIGTERM`"),
    ),
    responses(
        (status = 204, description = "The signal was sent"),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox or process", body = ErrorBody),
        (status = 409, description = "The sandbox does not run", body = ErrorBody),
    )
)]
pub(super) async fn kill(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Process(process): Process,
    query: Query,
) -> Result<StatusCode, ApiError> {
    query.only(&["signal"], None)?;
    let number = signal(query.get("signal").unwrap_or("SIGKILL"))?;
    app.signal(principal.team, id, &process, number).await?;
    Ok(StatusCode::NO_CONTENT)
}
