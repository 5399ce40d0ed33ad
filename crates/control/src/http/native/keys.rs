//! `/v1/api-keys`.

use std::sync::Arc;

use axum::extract::{FromRequestParts, State};
use http::StatusCode;
use http::request::Parts;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use wrenn_store::KeyRow;
use wrenn_types::{IdError, KeyId};

use super::ErrorBody;
use crate::app::{App, Failure, NewApiKey};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Json, path_param};

/// The key in the path.
pub(super) struct Key(KeyId);

impl<S: Send + Sync> FromRequestParts<S> for Key {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = path_param(parts, state, "key_id").await?;
        let id = text
            .parse()
            .map_err(|e: IdError| Failure::invalid(e.to_string()))?;
        Ok(Key(id))
    }
}

/// A key to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateKey {
    /// What to call it.
    #[schema(example = "laptop")]
    name: String,
}

/// A key, without the key itself.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct KeyBody {
    id: String,
    name: String,
    /// Its first characters.
    key_prefix: String,
    #[schema(format = DateTime)]
    created_at: String,
    /// To the minute.
    #[schema(format = DateTime)]
    last_used_at: Option<String>,
}

/// A key that was just made.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NewKeyBody {
    /// The key. It is shown this once only.
    key: String,
    #[serde(flatten)]
    about: KeyBody,
}

impl From<KeyRow> for KeyBody {
    fn from(row: KeyRow) -> Self {
        KeyBody {
            id: row.id.to_string(),
            name: row.name,
            key_prefix: row.prefix,
            created_at: row.created_at.to_string(),
            last_used_at: row.last_used_at.map(|t| t.to_string()),
        }
    }
}

/// Make an API key
#[utoipa::path(
    post, path = "/v1/api-keys", tag = "api-keys", request_body = CreateKey,
    responses(
        (status = 201, description = "The key is shown this once only", body = NewKeyBody),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    principal: Principal,
    Json(body, _): Json<CreateKey>,
) -> Result<(StatusCode, axum::Json<NewKeyBody>), ApiError> {
    let NewApiKey { key, row } = app.create_key(principal.team, &body.name).await?;
    let body = NewKeyBody {
        key: key.reveal(),
        about: row.into(),
    };
    Ok((StatusCode::CREATED, axum::Json(body)))
}

/// List the API keys
#[utoipa::path(
    get, path = "/v1/api-keys", tag = "api-keys",
    responses(
        (status = 200, description = "Oldest first", body = [KeyBody]),
        (status = 401, description = "No valid key", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    principal: Principal,
) -> Result<axum::Json<Vec<KeyBody>>, ApiError> {
    let keys = app.list_keys(principal.team).await?;
    Ok(axum::Json(keys.into_iter().map(KeyBody::from).collect()))
}

/// Delete an API key
#[utoipa::path(
    delete, path = "/v1/api-keys/{key_id}", tag = "api-keys",
    params(("key_id" = String, Path, description = "`key-…`")),
    responses(
        (status = 204, description = "It opens nothing any more"),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such key", body = ErrorBody),
    )
)]
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    principal: Principal,
    Key(id): Key,
) -> Result<StatusCode, ApiError> {
    app.delete_key(principal.team, id).await?;
    Ok(StatusCode::NO_CONTENT)
}
