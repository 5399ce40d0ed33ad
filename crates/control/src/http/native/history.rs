//! What happened to a sandbox, why it ended, how busy it is.

use std::sync::Arc;

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use wrenn_store::{Death, EventRow, Timestamp};
use wrenn_wire::wrenn::host::v1::MetricPoint;

use super::ErrorBody;
use crate::app::{App, Failure};
use crate::auth::Principal;
use crate::http::ApiError;
use crate::http::extract::{Id, Query};

/// Events in one answer, unless told otherwise, and at most.
const EVENTS: u64 = 100;
const MOST_EVENTS: u64 = 1000;

/// One thing that happened to a sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct EventBody {
    /// Grows; to ask for what came after it.
    id: i64,
    #[schema(format = DateTime)]
    timestamp: String,
    /// `started`, `paused`, `pause_failed`, `resumed`, `saved`, `rolled_back`, `adopted`,
    /// `unresponsive`, `responsive` or `ended`.
    event: String,
    /// On whose account: `request`, `clock`, `traffic`, `guest` or `host`.
    actor: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl From<EventRow> for EventBody {
    fn from(row: EventRow) -> Self {
        EventBody {
            id: row.id,
            timestamp: row.at.to_string(),
            event: row.kind,
            actor: row.actor,
            reason: row.reason,
        }
    }
}

/// What is known of a sandbox that has ended.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeathBody {
    #[schema(format = DateTime)]
    timestamp: String,
    /// The class of the reason: `request`, `expired`, `powered_off`, `killed`,
    /// `out_of_memory`, `monitor_failed`, `unseen` or `start_failed`.
    cause: String,
    /// On whose account: `request`, `clock`, `guest` or `host`.
    actor: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    lived_ms: u64,
    /// The end of its console.
    console: String,
    /// The last program started through the native API; clients of E2B start theirs by speaking
    /// to the guest, where this server does not look.
    #[serde(skip_serializing_if = "String::is_empty")]
    last_command: String,
    resources: Resources,
    /// The name of the newest checkpoint or snapshot that it was last saved as or restored
    /// from, if that is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_checkpoint: Option<String>,
}

/// What a sandbox used.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Resources {
    /// Processor time of its last machine.
    cpu_ms: u64,
    /// In use when it was last looked at.
    memory_bytes: u64,
    disk_bytes: u64,
}

/// Why a sandbox is as it is.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct WhyBody {
    id: String,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// When it has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    death: Option<DeathBody>,
    /// What happened last, at most 20.
    events: Vec<EventBody>,
}

fn death(event: EventRow, death: Death, last_checkpoint: Option<String>) -> DeathBody {
    DeathBody {
        timestamp: event.at.to_string(),
        cause: death.cause,
        actor: event.actor,
        reason: event.reason,
        lived_ms: death.lived_ms,
        console: death.console,
        last_command: death.last_command,
        resources: Resources {
            cpu_ms: death.cpu_ms,
            memory_bytes: death.memory_bytes,
            disk_bytes: death.disk_bytes,
        },
        last_checkpoint,
    }
}

/// List what happened to a sandbox
///
/// Also of one that has ended, for 30 days.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/events", tag = "sandboxes",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("after" = Option<i64>, Query, description = "Only what came after the event of this id"),
        ("limit" = Option<u32>, Query, description = "At most so many: 100 by default, up to 1000"),
    ),
    responses(
        (status = 200, description = "The oldest first", body = [EventBody]),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
    )
)]
pub(super) async fn events(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<axum::Json<Vec<EventBody>>, ApiError> {
    query.only(&["after", "limit"], None)?;
    let after = query.number("after", 0, i64::MAX as u64)?.unwrap_or(0);
    let limit = query.number("limit", 1, MOST_EVENTS)?.unwrap_or(EVENTS);
    let (after, limit) = (i64::try_from(after), u32::try_from(limit));
    let (after, limit) = (after.unwrap_or(i64::MAX), limit.unwrap_or(u32::MAX));
    let events = app.events(principal.team, id, after, limit).await?;
    Ok(axum::Json(events.into_iter().map(Into::into).collect()))
}

/// Tell why a sandbox is as it is
///
/// Of one that has ended: the reason, on whose account, its last console lines, last command,
/// what it used, and the last checkpoint to get it back from.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/why", tag = "sandboxes",
    params(("id" = String, Path, description = "`sb-…`")),
    responses(
        (status = 200, description = "`death` is there when it has ended and its host has told how", body = WhyBody),
        (status = 400, description = "Malformed id", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
    )
)]
pub(super) async fn why(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
) -> Result<axum::Json<WhyBody>, ApiError> {
    let why = app.why(principal.team, id).await?;
    let checkpoint = why.last_checkpoint;
    let end = why.end.filter(|_| why.row.state.is_final());
    let death = end.and_then(|mut event| {
        let known = event.death.take()?;
        Some(death(event, known, checkpoint))
    });
    Ok(axum::Json(WhyBody {
        id: id.to_string(),
        status: why.row.state.to_string(),
        reason: why.row.reason,
        death,
        events: why.events.into_iter().map(Into::into).collect(),
    }))
}

/// How busy a sandbox was at one moment.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PointBody {
    timestamp_unix: i64,
    /// Of all its processors together, 0 to 100.
    cpu_pct: f64,
    mem_bytes: u64,
    mem_total_bytes: u64,
    disk_bytes: u64,
    disk_total_bytes: u64,
    /// Since its machine was made.
    net_received_bytes: u64,
    net_sent_bytes: u64,
}

/// How busy a sandbox was.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct MetricsBody {
    sandbox_id: String,
    range: String,
    points: Vec<PointBody>,
}

impl From<MetricPoint> for PointBody {
    fn from(point: MetricPoint) -> Self {
        PointBody {
            timestamp_unix: point.at_unix_ms.div_euclid(1000),
            cpu_pct: point.cpu_used_pct,
            mem_bytes: point.mem_used_bytes,
            mem_total_bytes: point.mem_total_bytes,
            disk_bytes: point.disk_used_bytes,
            disk_total_bytes: point.disk_total_bytes,
            net_received_bytes: point.net_received_bytes,
            net_sent_bytes: point.net_sent_bytes,
        }
    }
}

/// `90s`, `5m`, `2h`, `1d`, in seconds.
fn range_secs(text: &str) -> Result<i64, Failure> {
    let wrong = || {
        let shown: String = text.chars().take(20).collect();
        Failure::invalid(format!(
            "`range` must be a number with s, m, h or d behind it, up to 24h, not `{shown}`"
        ))
    };
    let unit = text.chars().last().ok_or_else(wrong)?;
    let number: i64 = text[..text.len() - unit.len_utf8()]
        .parse()
        .map_err(|_| wrong())?;
    let each = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    match number.checked_mul(each) {
        Some(secs @ 1..=86_400) => Ok(secs),
        _ => Err(wrong()),
    }
}

/// Read how busy a sandbox is and was
///
/// It is looked at every five seconds, which is no use of it; points older than 20 minutes are
/// five minutes apart. They are kept by its host's agent, from its start on.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/metrics", tag = "sandboxes",
    params(
        ("id" = String, Path, description = "`sb-…`"),
        ("range" = Option<String>, Query, description = "How far back: `90s`, `10m` (the default), `6h`, at most `24h`"),
    ),
    responses(
        (status = 200, description = "The oldest first", body = MetricsBody),
        (status = 400, description = "Malformed", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such sandbox", body = ErrorBody),
    )
)]
pub(super) async fn metrics(
    State(app): State<Arc<App>>,
    principal: Principal,
    Id(id): Id,
    query: Query,
) -> Result<axum::Json<MetricsBody>, ApiError> {
    query.only(&["range"], None)?;
    let range = query.get("range").unwrap_or("10m").to_owned();
    let from = Timestamp::now().plus_secs(-range_secs(&range)?);
    let points = app.metrics(principal.team, id, from.unix_ms(), 0).await?;
    Ok(axum::Json(MetricsBody {
        sandbox_id: id.to_string(),
        range,
        points: points.into_iter().map(Into::into).collect(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_nonsense_is_refused() {
        for (text, secs) in [("90s", 90), ("5m", 300), ("24h", 86_400), ("1d", 86_400)] {
            assert_eq!(range_secs(text).unwrap(), secs);
        }
        for text in [
            "",
            "5",
            "m",
            "25h",
            "0s",
            "-1m",
            "5µ",
            "99999999999999999999d",
        ] {
            let refused = range_secs(text).unwrap_err();
            assert!(refused.message.contains("range"), "{}", refused.message);
        }
    }
}
