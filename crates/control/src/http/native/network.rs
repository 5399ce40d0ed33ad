//! `/v1/sandboxes/{id}/network`.

use std::sync::Arc;

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ErrorBody;
use crate::app::App;
use crate::auth::Principal;
use crate::host::NetworkRules;
use crate::http::ApiError;
use crate::http::extract::{Id, Json};

/// What a sandbox may reach. What no sandbox of the host may reach stays closed: private,
/// link-local and metadata addresses, the host, other sandboxes.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Network {
    /// Whether what is on no list is open; yes by default.
    allow_internet: Option<bool>,
    /// Open, even if it is denied too: IPv4 addresses, networks, names, and `*.` with a name for
    /// all names below it. A name opens the addresses it is resolved to.
    #[schema(example = json!(["1.1.1.1", "198.41.0.0/24", "pypi.org", "*.example.com"]))]
    allow: Option<Vec<String>>,
    /// Closed: IPv4 addresses and networks.
    #[schema(example = json!(["0.0.0.0/0"]))]
    deny: Option<Vec<String>>,
}

impl From<Network> for NetworkRules {
    fn from(network: Network) -> Self {
        NetworkRules {
            allow_internet: network.allow_internet.unwrap_or(true),
            allow: network.allow.unwrap_or_default(),
            deny: network.deny.unwrap_or_default(),
        }
    }
}

impl From<NetworkRules> for Network {
    fn from(rules: NetworkRules) -> Self {
        Network {
            allow_internet: Some(rules.allow_internet),
            allow: Some(rules.allow),
            deny: Some(rules.deny),
        }
    }
}

/// A destination that was refused, for one reason.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Denial {
    /// When it was refused last.
    #[schema(format = DateTime)]
    at: String,
    /// `tcp`, `udp`, `icmp` or a number; `dns` for a name that was not resolved, or not with
    /// all its addresses.
    #[schema(example = "tcp")]
    protocol: String,
    /// An address; with `dns` a name.
    #[schema(example = "10.0.0.1")]
    destination: String,
    /// Missing where the protocol has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u32>,
    /// Packets refused; of TCP one for each attempt to connect, of a name one for each question.
    count: u64,
    /// `forbidden` (to all sandboxes), `denied` (by the deny list), `internet_off`,
    /// `connection_limit` or `connection_rate`.
    #[schema(example = "forbidden")]
    reason: String,
}

/// What a sandbox may reach
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/network", tag = "network",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, body = Network),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It is neither running nor paused", body = ErrorBody),
    )
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<axum::Json<Network>, ApiError> {
    let rules = app.network(principal.team, id).await?;
    Ok(axum::Json(rules.into()))
}

/// Replace what a sandbox may reach
///
/// In force when this answers, for open connections too: those it closes are cut. What is left
/// out has its default again.
#[utoipa::path(
    put, path = "/v1/sandboxes/{id}/network", tag = "network", request_body = Network,
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "What it may reach from now on", body = Network),
        (status = 400, description = "Malformed; the entry is named", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
    )
)]
pub(super) async fn put(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Json(body, _): Json<Network>,
) -> Result<axum::Json<Network>, ApiError> {
    let rules = app.set_network(principal.team, id, body.into()).await?;
    Ok(axum::Json(rules.into()))
}

/// What was refused to a sandbox
///
/// The latest first; of the last hour since it was last started or resumed, and at most 1,024
/// different ones.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/network/denials", tag = "network",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, body = [Denial]),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
    )
)]
pub(super) async fn denials(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<axum::Json<Vec<Denial>>, ApiError> {
    let denials = app.denials(principal.team, id).await?;
    let denials = denials.into_iter().map(|denial| Denial {
        at: denial.at.to_string(),
        protocol: denial.protocol,
        destination: denial.destination,
        port: denial.port,
        count: denial.count,
        reason: denial.reason,
    });
    Ok(axum::Json(denials.collect()))
}
