//! `/v1/host/drain` and `/v1/host/pause`: emptying a host.

use std::sync::Arc;

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::ErrorBody;
use crate::app::{App, Everything};
use crate::auth::Principal;
use crate::http::ApiError;

/// Whether the host drains.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Draining {
    /// Since when; missing where it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    draining_since: Option<String>,
}

/// What came of pausing everything.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PausedAll {
    /// Those that were paused by this request.
    paused: Vec<String>,
    /// Those that could not be, and run on.
    failed: Vec<NotPaused>,
}

/// A sandbox that could not be paused.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NotPaused {
    id: String,
    /// Stable, for programs.
    code: &'static str,
    /// For people.
    message: String,
}

impl From<Everything> for PausedAll {
    fn from(all: Everything) -> Self {
        PausedAll {
            paused: all.done.iter().map(ToString::to_string).collect(),
            failed: all
                .failed
                .into_iter()
                .map(|(id, failure)| NotPaused {
                    id: id.to_string(),
                    code: failure.code.as_str(),
                    message: failure.message,
                })
                .collect(),
        }
    }
}

async fn set(app: &App, draining: bool) -> Result<axum::Json<Draining>, ApiError> {
    let since = app.set_draining(draining).await?;
    Ok(axum::Json(Draining {
        draining_since: since.map(|since| since.to_string()),
    }))
}

/// Start nothing on the host any more
///
/// From now on, and also after a restart of the server or the machine, creates, forks, resumes
/// and rollbacks of paused sandboxes are refused with `draining`. What runs goes on.
#[utoipa::path(
    put, path = "/v1/host/drain", tag = "host",
    responses(
        (status = 200, description = "It drains", body = Draining),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 503, description = "It does not answer", body = ErrorBody),
    )
)]
pub(super) async fn begin(
    State(app): State<Arc<App>>,
    _: Principal,
) -> Result<axum::Json<Draining>, ApiError> {
    set(&app, true).await
}

/// Start sandboxes on the host again
#[utoipa::path(
    delete, path = "/v1/host/drain", tag = "host",
    responses(
        (status = 200, description = "It does not drain", body = Draining),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 503, description = "It does not answer", body = ErrorBody),
    )
)]
pub(super) async fn end(
    State(app): State<Arc<App>>,
    _: Principal,
) -> Result<axum::Json<Draining>, ApiError> {
    set(&app, false).await
}

/// Pause everything that runs on the host
///
/// Answers when nothing runs any more but what could not be paused. What is being started is
/// paused as soon as it runs; to have it stay so, let the host drain first. Goes on when the
/// client hangs up.
#[utoipa::path(
    post, path = "/v1/host/pause", tag = "host",
    responses(
        (status = 200, description = "What was paused and what was not", body = PausedAll),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn pause_all(
    State(app): State<Arc<App>>,
    _: Principal,
) -> Result<axum::Json<PausedAll>, ApiError> {
    Ok(axum::Json(app.pause_all().await?.into()))
}
