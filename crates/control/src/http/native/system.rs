//! The server and its host.

use std::sync::Arc;

use axum::extract::State;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::ErrorBody;
use crate::app::{App, DEFAULT_TEMPLATE, chain};
use crate::auth::Principal;
use crate::http::ApiError;

/// That the server lives.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Health {
    #[schema(example = "ok")]
    status: &'static str,
    version: &'static str,
}

/// Whether the server can work.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Readiness {
    /// `ok` or `unavailable`.
    status: &'static str,
    /// `ok`, or what is wrong.
    database: String,
    /// `ok`, or what is wrong.
    host: String,
}

/// The machine that runs the sandboxes.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HostBody {
    id: String,
    version: String,
    /// `qemu` or `firecracker`.
    vmm: String,
    vmm_version: String,
    /// `kvm` or `tcg`.
    accelerator: String,
    cpus: u32,
    memory_bytes: u64,
    memory_available_bytes: u64,
    disk_available_bytes: u64,
    /// Sandboxes on it now.
    sandboxes: u32,
    /// How many more of the default shape fit.
    sandboxes_fit: u32,
    /// Machines that wait to be taken.
    pool_ready: u32,
    /// Since when it starts nothing; missing where it does not drain.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    draining_since: Option<String>,
    templates: Vec<TemplateBody>,
}

/// What sandboxes can be made of.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TemplateBody {
    name: String,
    digest: String,
    vcpus: u32,
    memory_mb: u32,
    disk_size_mb: u64,
}

/// Whether the server lives
#[utoipa::path(get, path = "/health", tag = "server", responses((status = 200, body = Health)))]
pub(super) async fn health() -> axum::Json<Health> {
    axum::Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
    })
}

/// Whether the server can work, with each thing it needs
#[utoipa::path(
    get, path = "/ready", tag = "server",
    responses(
        (status = 200, description = "It can", body = Readiness),
        (status = 503, description = "Something it needs does not answer", body = Readiness),
    )
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> (StatusCode, axum::Json<Readiness>) {
    let database = match app.store.check().await {
        Ok(()) => "ok".to_owned(),
        Err(e) => {
            tracing::error!(error = %chain(&e), "not ready");
            e.to_string()
        }
    };
    let host = match app.host_info().await {
        Ok(info) if info.can_start(DEFAULT_TEMPLATE) => "ok".to_owned(),
        Ok(_) => format!("the template `{DEFAULT_TEMPLATE}` is not loaded yet"),
        Err(e) => e.to_string(),
    };
    let fine = database == "ok" && host == "ok";
    let (code, status) = match fine {
        true => (StatusCode::OK, "ok"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
    };
    (
        code,
        axum::Json(Readiness {
            status,
            database,
            host,
        }),
    )
}

/// Look at the machine that runs the sandboxes
#[utoipa::path(
    get, path = "/v1/host", tag = "host",
    responses(
        (status = 200, body = HostBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 503, description = "It does not answer", body = ErrorBody),
    )
)]
pub(super) async fn host(
    State(app): State<Arc<App>>,
    _: Principal,
) -> Result<axum::Json<HostBody>, ApiError> {
    let info = app.host_info().await?;
    let draining_since = info.draining_since().map(|since| since.to_string());
    let raw = info.raw.clone();
    Ok(axum::Json(HostBody {
        id: raw.host_id,
        version: raw.version,
        vmm: raw.vmm,
        vmm_version: raw.vmm_version,
        accelerator: raw.accelerator,
        cpus: raw.cpus,
        memory_bytes: raw.memory_bytes,
        memory_available_bytes: raw.memory_available_bytes,
        disk_available_bytes: raw.disk_available_bytes,
        sandboxes: raw.sandboxes,
        sandboxes_fit: raw.sandboxes_fit,
        pool_ready: raw.pool_ready,
        draining_since,
        templates: raw
            .templates
            .into_iter()
            .map(|t| TemplateBody {
                name: t.name,
                digest: t.digest,
                vcpus: t.vcpus,
                memory_mb: t.memory_mib,
                disk_size_mb: t.disk_mib,
            })
            .collect(),
    }))
}
