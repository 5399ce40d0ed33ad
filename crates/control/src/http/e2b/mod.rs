//! What E2B's clients call, at the root of this server. Only a translation.

mod metrics;
mod model;
mod network;
mod sandboxes;
mod snapshots;
mod unsupported;

use std::sync::Arc;

use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

pub(super) use unsupported::routes as unsupported;

/// Routes that need a key.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(sandboxes::create_v1, sandboxes::list_v1))
        .routes(routes!(sandboxes::create_v2, sandboxes::list_v2))
        .routes(routes!(sandboxes::connect_v1))
        .routes(routes!(sandboxes::connect_v2))
        .routes(routes!(sandboxes::get, sandboxes::kill))
        .routes(routes!(sandboxes::set_timeout))
        .routes(routes!(sandboxes::refresh))
        .routes(routes!(sandboxes::logs))
        .routes(routes!(metrics::of_many))
        .routes(routes!(metrics::of_one))
        .routes(routes!(network::put))
        .routes(routes!(snapshots::pause))
        .routes(routes!(snapshots::resume))
        .routes(routes!(snapshots::fork))
        .routes(routes!(snapshots::create))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::delete))
}
