//! Wrenn's own API, under `/v1`.

mod diff;
mod drain;
mod exec;
mod files;
mod history;
mod keys;
mod messages;
mod network;
mod processes;
mod pty;
mod sandboxes;
mod snapshots;
mod socket;
mod stream;
mod system;

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::{App, Failure};

/// Routes that need a key.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(sandboxes::create, sandboxes::list))
        .routes(routes!(sandboxes::get, sandboxes::destroy))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(sandboxes::logs))
        .routes(routes!(history::events))
        .routes(routes!(history::why))
        .routes(routes!(history::metrics))
        .routes(routes!(network::get, network::put))
        .routes(routes!(network::denials))
        .routes(routes!(snapshots::pause))
        .routes(routes!(snapshots::resume))
        .routes(routes!(snapshots::fork))
        .routes(routes!(snapshots::checkpoint, snapshots::checkpoints))
        .routes(routes!(snapshots::rollback))
        .routes(routes!(diff::diff))
        .routes(routes!(snapshots::create, snapshots::list))
        .routes(routes!(snapshots::delete))
        .routes(routes!(exec::exec))
        .routes(routes!(processes::list))
        .routes(routes!(processes::kill))
        .merge(files::routes())
        .routes(routes!(system::host))
        .routes(routes!(drain::begin, drain::end))
        .routes(routes!(drain::pause_all))
        .routes(routes!(keys::create, keys::list))
        .routes(routes!(keys::delete))
}

/// WebSockets, whose key may come as the first message.
pub(super) fn sockets() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(stream::exec))
        .routes(routes!(stream::attach))
        .routes(routes!(pty::open))
}

/// Routes that everybody may ask.
pub(super) fn open_routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(system::health))
        .routes(routes!(system::ready))
}

pub(super) use sandboxes::MAX_TIMEOUT_SECS;

/// A signal by its number or its name, with or without `SIG`. The guest agent takes two.
pub(super) fn signal(text: &str) -> Result<u32, Failure> {
    let name = text.trim().to_ascii_uppercase();
    match name.strip_prefix("SIG").unwrap_or(&name) {
        "KILL" | "9" => Ok(9),
        "TERM" | "15" => Ok(15),
        _ => {
            let shown: String = text.chars().take(20).collect();
            Err(Failure::invalid(format!(
                "the signal must be SIGTERM or SIGKILL, not `{shown}`"
            )))
        }
    }
}

/// The body of every error, for the document.
#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "describes what ApiError writes")]
pub(super) struct ErrorBody {
    error: ErrorDetail,
}

#[derive(utoipa::ToSchema)]
#[allow(dead_code, reason = "describes what ApiError writes")]
struct ErrorDetail {
    /// Stable, for programs.
    #[schema(example = "invalid_request")]
    code: String,
    /// For people.
    message: String,
}
