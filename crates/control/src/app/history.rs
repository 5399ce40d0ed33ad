//! What happened to sandboxes, why they ended, and how busy they are.

use std::time::Duration;

use connectrpc::client::CallOptions;
use wrenn_store::{Death, EventRow, NewEvent, SandboxRow, Timestamp};
use wrenn_types::{SandboxId, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::sandboxes::options;
use super::{App, Code, Failure};

/// How long the host is asked to wait for news.
const NEWS_WAIT: Duration = Duration::from_secs(20);
/// How long a host may take to say how busy its sandboxes are.
const METRICS_WITHIN: Duration = Duration::from_secs(5);
/// Events are kept for 30 days.
pub(crate) const EVENTS_KEEP_SECS: i64 = 30 * 86_400;

/// How a sandbox ended, or that it has not.
pub(crate) struct Why {
    pub(crate) row: SandboxRow,
    /// When it has ended and its host has said how.
    pub(crate) end: Option<EventRow>,
    /// The name of the last snapshot it could be had back from.
    pub(crate) last_checkpoint: Option<String>,
    /// What happened to it last.
    pub(crate) events: Vec<EventRow>,
}

/// What host events tell the follower to do.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct News {
    /// Events that were stored.
    pub(crate) stored: usize,
    /// One of them changed a sandbox's state.
    pub(crate) moved: bool,
}

impl App {
    /// Asks the host what happened since the last time, and stores it; the next question
    /// acknowledges it. With `wait`, until something happens or the host says that nothing did.
    pub(crate) async fn follow_events(&self, wait: bool) -> Result<News, Failure> {
        let (log_id, after) = self.store.last_event().await?.unwrap_or_default();
        let wait = if wait { NEWS_WAIT } else { Duration::ZERO };
        let request = wire::ListEventsRequest {
            log_id,
            after,
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let within: CallOptions = options(wait + METRICS_WITHIN);
        let told = self.host.list_events_with_options(request, within).await?;
        let told = told.into_owned();
        let mut news = News::default();
        let mut events = Vec::with_capacity(told.events.len());
        for event in told.events {
            // Nothing is skipped: what is not stored would be told again without end.
            let sandbox = event.sandbox_id.parse().map_err(|_| {
                let id: String = event.sandbox_id.chars().take(80).collect();
                Failure::new(
                    Code::AgentError,
                    format!("the host tells of a sandbox `{id}`, which cannot be"),
                )
            })?;
            news.moved |= matches!(event.kind.as_str(), "paused" | "resumed" | "ended");
            events.push(new_event(sandbox, event));
        }
        news.stored = events.len();
        if !events.is_empty() {
            self.store.insert_events(&told.log_id, &events).await?;
        }
        Ok(news)
    }

    /// A team's sandbox's events after `after`, at most `limit` of them.
    pub(crate) async fn events(
        &self,
        team: TeamId,
        id: SandboxId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<EventRow>, Failure> {
        self.row(team, id).await?;
        Ok(self.store.events(id, after, limit).await?)
    }

    /// Why a sandbox is as it is.
    pub(crate) async fn why(&self, team: TeamId, id: SandboxId) -> Result<Why, Failure> {
        const LAST: u32 = 20;
        let row = self.row(team, id).await?;
        let end = self.store.end_event(id).await?;
        let host_snapshot = end
            .as_ref()
            .and_then(|end| end.death.as_ref())
            .map(|death| death.last_snapshot.as_str())
            .filter(|snapshot| !snapshot.is_empty());
        let last_checkpoint = match host_snapshot {
            Some(snapshot) => self.store.snapshot_name(team, snapshot).await?,
            None => None,
        };
        let events = self.store.newest_events(id, LAST).await?;
        Ok(Why {
            row,
            end,
            last_checkpoint,
            events,
        })
    }

    /// How busy a team's sandbox was between two moments, in milliseconds since 1970; 0: no
    /// bound.
    pub(crate) async fn metrics(
        &self,
        team: TeamId,
        id: SandboxId,
        from: i64,
        to: i64,
    ) -> Result<Vec<wire::MetricPoint>, Failure> {
        self.row(team, id).await?;
        let request = wire::GetMetricsRequest {
            sandbox_ids: vec![id.to_string()],
            from_unix_ms: from,
            to_unix_ms: to,
            ..Default::default()
        };
        let found = self.host_metrics(request).await?;
        Ok(found.into_iter().flat_map(|one| one.points).collect())
    }

    /// The newest point of each of these sandboxes that are the team's.
    pub(crate) async fn latest_metrics(
        &self,
        team: TeamId,
        ids: &[SandboxId],
    ) -> Result<Vec<(SandboxId, wire::MetricPoint)>, Failure> {
        let mut own = Vec::with_capacity(ids.len());
        for id in ids {
            if self.store.sandbox(team, *id).await?.is_some() {
                own.push(id.to_string());
            }
        }
        if own.is_empty() {
            // To the host no names mean all.
            return Ok(Vec::new());
        }
        let request = wire::GetMetricsRequest {
            sandbox_ids: own,
            latest_only: true,
            ..Default::default()
        };
        Ok(newest(self.host_metrics(request).await?))
    }

    /// The newest point of every sandbox that runs, whose ever it is.
    pub(crate) async fn all_metrics(&self) -> Result<Vec<(SandboxId, wire::MetricPoint)>, Failure> {
        let request = wire::GetMetricsRequest {
            latest_only: true,
            ..Default::default()
        };
        Ok(newest(self.host_metrics(request).await?))
    }

    async fn host_metrics(
        &self,
        request: wire::GetMetricsRequest,
    ) -> Result<Vec<wire::SandboxMetrics>, Failure> {
        let within = options(METRICS_WITHIN);
        let found = self.host.get_metrics_with_options(request, within).await?;
        Ok(found.into_owned().sandboxes)
    }
}

fn newest(found: Vec<wire::SandboxMetrics>) -> Vec<(SandboxId, wire::MetricPoint)> {
    let newest = |mut one: wire::SandboxMetrics| {
        let id = one.sandbox_id.parse().ok()?;
        Some((id, one.points.pop()?))
    };
    found.into_iter().filter_map(newest).collect()
}

fn new_event(sandbox: SandboxId, event: wire::SandboxEvent) -> NewEvent {
    let death = event.death.as_option().map(|death| Death {
        state: death.state.clone(),
        cause: death.cause.clone(),
        lived_ms: death.lived_ms,
        console: death.console.clone(),
        last_command: death.last_command.clone(),
        cpu_ms: death.cpu_ms,
        memory_bytes: death.memory_bytes,
        disk_bytes: death.disk_bytes,
        last_snapshot: death.last_snapshot_id.clone(),
    });
    NewEvent {
        seq: event.seq,
        at: Timestamp::from_unix_ms(event.at_unix_ms),
        sandbox,
        kind: event.kind,
        actor: event.actor,
        reason: event.reason.filter(|reason| !reason.is_empty()),
        death,
    }
}
