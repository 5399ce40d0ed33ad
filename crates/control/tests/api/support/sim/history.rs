//! What happened, and how busy it was.

use std::sync::atomic::Ordering;
use std::time::Duration;

use connectrpc::{Response, ServiceResult};
use wrenn_wire::wrenn::host::v1::*;

use super::Sim;

impl Sim {
    pub(super) async fn list_events(
        &self,
        request: ListEventsRequest,
    ) -> ServiceResult<ListEventsResponse> {
        let after = if request.log_id == "sim" {
            request.after
        } else {
            0
        };
        self.acknowledged.store(after, Ordering::SeqCst);
        let log = self.log.lock().unwrap().clone();
        if log.len() as u64 <= after {
            tokio::time::sleep(Duration::from_millis(request.wait_ms.into())).await;
        }
        Response::ok(ListEventsResponse {
            log_id: "sim".into(),
            events: log.into_iter().filter(|event| event.seq > after).collect(),
            ..Default::default()
        })
    }

    pub(super) async fn get_metrics(
        &self,
        request: GetMetricsRequest,
    ) -> ServiceResult<GetMetricsResponse> {
        let points = self.points.lock().unwrap().clone();
        let to = if request.to_unix_ms == 0 {
            i64::MAX
        } else {
            request.to_unix_ms
        };
        let all = request.sandbox_ids.is_empty();
        let found = points
            .into_iter()
            .filter(|(id, _)| all || request.sandbox_ids.contains(id));
        let found = found.map(|(sandbox_id, mut points)| {
            points.retain(|p| p.at_unix_ms >= request.from_unix_ms && p.at_unix_ms <= to);
            if request.latest_only {
                points.drain(..points.len().saturating_sub(1));
            }
            SandboxMetrics {
                sandbox_id,
                points,
                ..Default::default()
            }
        });
        Response::ok(GetMetricsResponse {
            sandboxes: found.collect(),
            ..Default::default()
        })
    }
}
