//! What happened to sandboxes, and how busy they are.

use std::time::Duration;

use connectrpc::ConnectError;
use wrenn_types::SandboxId;
use wrenn_wire::wrenn::host::v1 as rpc;

use super::{HostRpc, sandbox_id};
use crate::events::{DeathCertificate, Event};
use crate::metrics::Point;

/// Nobody waits longer for an event than this; a client asks again.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

impl HostRpc {
    pub(super) async fn events(
        &self,
        request: rpc::ListEventsRequest,
    ) -> Result<rpc::ListEventsResponse, ConnectError> {
        let patience = Duration::from_millis(request.wait_ms.into()).min(LONGEST_WAIT);
        let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
        let events = &self.0.events;
        let found = events.after(&request.log_id, request.after, limit, patience);
        let (log_id, events) = found.await.map_err(|e| {
            ConnectError::internal(format!("the log of events cannot be written anew: {e}"))
        })?;
        Ok(rpc::ListEventsResponse {
            log_id,
            events: events.into_iter().map(event).collect(),
            ..Default::default()
        })
    }

    pub(super) fn metrics(
        &self,
        request: rpc::GetMetricsRequest,
    ) -> Result<rpc::GetMetricsResponse, ConnectError> {
        let manager = &self.0.manager;
        let asked: Vec<SandboxId> = request
            .sandbox_ids
            .iter()
            .map(|id| sandbox_id(id))
            .collect::<Result<_, _>>()?;
        let handles = if asked.is_empty() {
            let mut all = manager.list();
            all.retain(|handle| handle.live().is_some());
            all
        } else {
            // One that is not here is left out.
            asked
                .into_iter()
                .filter_map(|id| manager.get(id).ok())
                .collect()
        };
        let to = match request.to_unix_ms {
            0 => i64::MAX,
            to => to,
        };
        let sandboxes = handles.into_iter().map(|handle| {
            let points = match request.latest_only {
                true => handle.metrics.latest().into_iter().collect(),
                false => handle.metrics.between(request.from_unix_ms, to),
            };
            rpc::SandboxMetrics {
                sandbox_id: handle.id.to_string(),
                points: points.iter().map(point).collect(),
                ..Default::default()
            }
        });
        Ok(rpc::GetMetricsResponse {
            sandboxes: sandboxes.collect(),
            ..Default::default()
        })
    }
}

fn event(event: Event) -> rpc::SandboxEvent {
    rpc::SandboxEvent {
        seq: event.seq,
        at_unix_ms: event.at_unix_ms,
        sandbox_id: event.sandbox.to_string(),
        kind: event.kind.word().to_owned(),
        actor: event.actor.word().to_owned(),
        reason: event.reason,
        death: event.death.map(|death| certificate(*death)).into(),
        ..Default::default()
    }
}

fn certificate(death: DeathCertificate) -> rpc::DeathCertificate {
    rpc::DeathCertificate {
        state: death.state,
        cause: death.cause,
        lived_ms: death.lived_ms,
        console: death.console,
        last_command: death.last_command,
        cpu_ms: death.cpu_ms,
        memory_bytes: death.memory_bytes,
        disk_bytes: death.disk_bytes,
        last_snapshot_id: death.last_snapshot,
        ..Default::default()
    }
}

fn point(point: &Point) -> rpc::MetricPoint {
    rpc::MetricPoint {
        at_unix_ms: point.at_unix_ms,
        cpu_count: point.cpu_count,
        cpu_used_pct: point.cpu_used_pct,
        mem_used_bytes: point.mem_used,
        mem_total_bytes: point.mem_total,
        mem_cache_bytes: point.mem_cache,
        disk_used_bytes: point.disk_used,
        disk_total_bytes: point.disk_total,
        net_received_bytes: point.net_received,
        net_sent_bytes: point.net_sent,
        ..Default::default()
    }
}
