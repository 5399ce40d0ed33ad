//! What a sandbox may reach, in E2B's words.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::model::{E2bErrorBody, asks, not_offered};
use super::sandboxes::{Body, Id, as_conflict};
use crate::app::{App, Failure};
use crate::auth::Principal;
use crate::host::NetworkRules;
use crate::http::error::E2bError;

/// Everything, as these clients write it.
const ALL_TRAFFIC: &str = "0.0.0.0/0";

/// What a sandbox may reach from now on; what is left out is cleared.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = E2bSetNetwork)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SetNetwork {
    /// Open, whatever is denied: addresses, networks, and names, which need
    /// `denyOut: ["0.0.0.0/0"]` beside them.
    allow_out: Option<Vec<String>>,
    /// Closed: addresses and networks.
    deny_out: Option<Vec<String>>,
    /// The same as denying everything.
    #[serde(rename = "allow_internet_access")]
    allow_internet_access: Option<bool>,
    /// What this server does not offer: refused by name, unless it asks for nothing.
    #[serde(flatten)]
    #[schema(ignore)]
    rest: BTreeMap<String, Value>,
}

/// What a sandbox may reach.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = E2bNetwork)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetworkModel {
    allow_out: Vec<String>,
    deny_out: Vec<String>,
    allow_public_traffic: bool,
}

impl From<&NetworkRules> for NetworkModel {
    fn from(rules: &NetworkRules) -> Self {
        NetworkModel {
            allow_out: rules.allow.clone(),
            deny_out: rules.deny.clone(),
            allow_public_traffic: true,
        }
    }
}

/// The rules that `network` of a new sandbox asks for. Its other fields are checked elsewhere.
pub(super) fn rules_of_new(
    internet: Option<bool>,
    network: Option<&Value>,
) -> Result<NetworkRules, Failure> {
    let list = |name: &str| -> Result<Vec<String>, Failure> {
        match network.and_then(|network| network.get(name)) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|_| Failure::invalid(format!("network.{name} must be a list of strings"))),
        }
    };
    checked(NetworkRules {
        allow_internet: internet.unwrap_or(true),
        allow: list("allowOut")?,
        deny: list("denyOut")?,
    })
}

/// Names mean something only where everything else is closed: as E2B has it, that must be said.
fn checked(rules: NetworkRules) -> Result<NetworkRules, Failure> {
    let is_name = |entry: &&String| entry.bytes().any(|b| b.is_ascii_alphabetic());
    let closed = !rules.allow_internet || rules.deny.iter().any(|entry| entry == ALL_TRAFFIC);
    match rules.allow.iter().find(is_name) {
        // An IPv6 address is refused as such, by the host.
        Some(name) if !closed && !name.contains(':') => {
            let name: String = name.chars().take(100).collect();
            Err(Failure::invalid(format!(
                "allowOut has the name `{name}`: denyOut must have `{ALL_TRAFFIC}` then, or all \
                 that is not denied is open anyway"
            )))
        }
        _ => Ok(rules),
    }
}

/// Replace what a sandbox may reach
#[utoipa::path(
    put, path = "/sandboxes/{id}/network", tag = "e2b", request_body = SetNetwork,
    params(("id" = String, Path)),
    responses(
        (status = 204, description = "In force, for open connections too"),
        (status = 400, body = E2bErrorBody, description = "Malformed, or an option that is not offered"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
        (status = 409, body = E2bErrorBody, description = "It does not run"),
    )
)]
pub(super) async fn put(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    Body(body, _): Body<SetNetwork>,
) -> Result<StatusCode, E2bError> {
    let wanted = body.rest.iter().filter(|(_, value)| asks(value));
    not_offered(wanted.map(|(name, _)| name.clone()).collect())?;
    let rules = checked(NetworkRules {
        allow_internet: body.allow_internet_access.unwrap_or(true),
        allow: body.allow_out.unwrap_or_default(),
        deny: body.deny_out.unwrap_or_default(),
    })?;
    app.set_network(principal.team, id, rules)
        .await
        .map_err(|e| as_conflict(id, e))?;
    Ok(StatusCode::NO_CONTENT)
}
