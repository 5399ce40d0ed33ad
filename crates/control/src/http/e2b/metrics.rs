//! How busy sandboxes are, in E2B's words.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use wrenn_store::Timestamp;
use wrenn_types::SandboxId;
use wrenn_wire::wrenn::host::v1::MetricPoint;

use super::model::E2bErrorBody;
use super::sandboxes::as_missing;
use crate::app::{App, Failure};
use crate::auth::Principal;
use crate::http::error::E2bError;
use crate::http::extract::{Id, Query};

/// Sandboxes that can be asked about at once.
const MOST: usize = 100;

/// How busy a sandbox was at one moment; sizes in bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SandboxMetric {
    #[schema(format = DateTime)]
    timestamp: String,
    timestamp_unix: i64,
    cpu_count: u32,
    cpu_used_pct: f64,
    mem_used: u64,
    mem_total: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

/// The newest metric of each.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SandboxesWithMetrics {
    sandboxes: BTreeMap<String, SandboxMetric>,
}

impl From<MetricPoint> for SandboxMetric {
    fn from(point: MetricPoint) -> Self {
        SandboxMetric {
            timestamp: Timestamp::from_unix_ms(point.at_unix_ms).to_string(),
            timestamp_unix: point.at_unix_ms.div_euclid(1000),
            cpu_count: point.cpu_count,
            cpu_used_pct: point.cpu_used_pct,
            mem_used: point.mem_used_bytes,
            mem_total: point.mem_total_bytes,
            mem_cache: point.mem_cache_bytes,
            disk_used: point.disk_used_bytes,
            disk_total: point.disk_total_bytes,
        }
    }
}

/// Read how busy a sandbox was
#[utoipa::path(
    get, path = "/sandboxes/{id}/metrics", tag = "e2b",
    params(
        ("id" = String, Path),
        ("start" = Option<u64>, Query, description = "Unix time in seconds"),
        ("end" = Option<u64>, Query, description = "Unix time in seconds"),
    ),
    responses(
        (status = 200, body = [SandboxMetric]),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
        (status = 404, body = E2bErrorBody, description = "No such sandbox"),
    )
)]
pub(super) async fn of_one(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<axum::Json<Vec<SandboxMetric>>, E2bError> {
    // The last second of a span is part of it.
    const WHOLE_SECOND: i64 = 999;
    let latest = (i64::MAX / 1000 - 1) as u64;
    let bound = |name| query.number(name, 0, latest);
    let ms = |secs: Option<u64>| secs.map_or(0, |s| i64::try_from(s).unwrap_or(0) * 1000);
    let (start, end) = (bound("start")?, bound("end")?);
    if let (Some(start), Some(end)) = (start, end)
        && start > end
    {
        return Err(Failure::invalid("`start` must not be after `end`").into());
    }
    let to = if end.is_some() {
        ms(end) + WHOLE_SECOND
    } else {
        0
    };
    let points = app.metrics(principal.team, id, ms(start), to).await;
    let points = points.map_err(|e| as_missing(id, e))?;
    Ok(axum::Json(points.into_iter().map(Into::into).collect()))
}

/// Read how busy sandboxes are
#[utoipa::path(
    get, path = "/sandboxes/metrics", tag = "e2b",
    params(("sandbox_ids" = String, Query, description = "At most 100, with commas between them")),
    responses(
        (status = 200, body = SandboxesWithMetrics),
        (status = 400, body = E2bErrorBody, description = "None, too many or malformed"),
        (status = 401, body = E2bErrorBody, description = "No valid key"),
    )
)]
pub(super) async fn of_many(
    State(app): State<Arc<App>>,
    principal: Principal,
    query: Query,
) -> Result<axum::Json<SandboxesWithMetrics>, E2bError> {
    let words = query.get("sandbox_ids").unwrap_or_default();
    let ids: Result<Vec<SandboxId>, _> = words
        .split(',')
        .filter(|word| !word.is_empty())
        .map(|word| word.trim().parse())
        .collect();
    let ids = ids.map_err(|e: wrenn_types::IdError| Failure::invalid(e.to_string()))?;
    if ids.is_empty() || ids.len() > MOST {
        let count = ids.len();
        let why = format!("`sandbox_ids` must name 1 to {MOST} sandboxes, not {count}");
        return Err(Failure::invalid(why).into());
    }
    let found = app.latest_metrics(principal.team, &ids).await?;
    let sandboxes = found
        .into_iter()
        .map(|(id, point)| (id.to_string(), point.into()))
        .collect();
    Ok(axum::Json(SandboxesWithMetrics { sandboxes }))
}
