//! Routes that E2B's clients know and this server does not offer: a clear answer instead of a
//! puzzling 404, which some calls take for success.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::routing::any;

use crate::app::{App, Code, Failure};
use crate::http::error::E2bError;

const ROUTES: [&str; 20] = [
    "/v2/sandboxes/{id}/logs",
    "/templates",
    "/templates/tags",
    "/templates/{template}/{*rest}",
    "/v2/templates",
    "/v2/templates/{*rest}",
    "/v3/templates",
    "/v3/templates/{*rest}",
    "/default-templates",
    "/volumes",
    "/volumes/{*rest}",
    "/volumecontent/{*rest}",
    "/secrets",
    "/secrets/{*rest}",
    "/teams",
    "/teams/{*rest}",
    "/api-keys",
    "/access-tokens",
    "/nodes",
    "/nodes/{*rest}",
];

pub(in crate::http) fn routes() -> Router<Arc<App>> {
    ROUTES.iter().fold(Router::new(), |router, path| {
        router.route(path, any(refuse))
    })
}

async fn refuse(request: Request) -> E2bError {
    let message = format!(
        "{} {} is not offered by this server; /docs lists what is",
        request.method(),
        request.uri().path()
    );
    E2bError(Failure::new(Code::NotImplemented, message))
}
