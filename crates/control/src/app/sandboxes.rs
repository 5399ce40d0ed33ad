//! The life of a sandbox, as far as the control plane directs it.
//!
//! ```text
//!            create                    destroy
//! (no row) ─────────▶ starting ─▶ running ─────▶ stopping ─▶ stopped
//!                        │           │                          ▲
//!                        └─▶ error ◀─┴── ended by its host ─────┘
//! ```
//!
//! Each step is a compare-and-set of the row, before or after the host did its part. A life-cycle
//! operation runs in a task of its own, so that a client that hangs up interrupts nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode};
use wrenn_store::{Change, Page, SandboxFilter, SandboxRow, Timestamp};
use wrenn_types::{SandboxId, SandboxState, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::failure::told;
use super::{App, Code, Failure};
use crate::host::HostSandbox;
use crate::reconcile::{Verdict, judge};

/// Ending a machine: asking it, then killing it.
const DESTROY_WITHIN: Duration = Duration::from_secs(60);
/// What the host answers from memory.
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// A sandbox: what is stored, and what its host says where it is alive.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) row: SandboxRow,
    pub(crate) live: Option<HostSandbox>,
}

/// What came of a request to end a sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Destroyed {
    Now,
    /// It had ended before.
    Already,
}

pub(super) fn options(within: Duration) -> CallOptions {
    CallOptions::default().with_timeout(within)
}

/// A failure that says which state the sandbox is in instead.
pub(crate) fn wrong_state(row: &SandboxRow, wanted: &str) -> Failure {
    let why = match &row.reason {
        Some(reason) => format!(" ({reason})"),
        None => String::new(),
    };
    Failure::new(
        Code::InvalidState,
        format!("{} is {}{why}, not {wanted}", row.id, row.state),
    )
    .with("state", row.state.as_str())
}

fn unknown(id: SandboxId) -> Failure {
    Failure::not_found(format!("there is no sandbox {id}"))
}

impl App {
    /// A team's row.
    pub(crate) async fn row(&self, team: TeamId, id: SandboxId) -> Result<SandboxRow, Failure> {
        self.store
            .sandbox(team, id)
            .await?
            .ok_or_else(|| unknown(id))
    }

    /// A team's row of a sandbox that can be used.
    pub(crate) async fn running(&self, team: TeamId, id: SandboxId) -> Result<SandboxRow, Failure> {
        let row = self.row(team, id).await?;
        match row.state {
            SandboxState::Running | SandboxState::Snapshotting => Ok(row),
            _ => Err(wrong_state(&row, "running")),
        }
    }

    pub(crate) async fn get(&self, team: TeamId, id: SandboxId) -> Result<Sandbox, Failure> {
        let row = self.row(team, id).await?;
        self.look(row).await
    }

    /// Asks the host about a sandbox and writes down what it did by itself.
    async fn look(&self, row: SandboxRow) -> Result<Sandbox, Failure> {
        if row.state.is_final() {
            return Ok(Sandbox { row, live: None });
        }
        let request = wire::GetSandboxRequest {
            sandbox_id: row.id.to_string(),
            ..Default::default()
        };
        let live = match self
            .host
            .get_sandbox_with_options(request, options(ASK_WITHIN))
            .await
        {
            Ok(reply) => {
                let sandbox = reply.into_owned().sandbox.into_option().unwrap_or_default();
                Some(HostSandbox::try_from(sandbox)?)
            }
            Err(e) if e.code == ErrorCode::NotFound => None,
            Err(e) => {
                tracing::warn!(sandbox = %row.id, error = %super::chain(&e), "its host does not answer");
                return Ok(Sandbox { row, live: None });
            }
        };
        let busy = self.busy.is_claimed(row.id);
        let row = match judge(row.state, busy, live.as_ref()) {
            Verdict::Become(state, reason) => {
                self.settle(&row, state, reason, live.as_ref()).await?
            }
            Verdict::Keep | Verdict::End => row,
        };
        let live = live.filter(|_| !row.state.is_final());
        Ok(Sandbox { row, live })
    }

    /// Writes down a state that the host found itself in.
    pub(crate) async fn settle(
        &self,
        row: &SandboxRow,
        state: SandboxState,
        reason: Option<String>,
        live: Option<&HostSandbox>,
    ) -> Result<SandboxRow, Failure> {
        let mut change = match live {
            Some(live) if row.started_at.is_none() && !state.is_final() => {
                started(live, self.recent_host().await)
            }
            _ => Change::default(),
        };
        change.reason = reason;
        // Resumed by traffic, it got a new end.
        change.end_at = live
            .filter(|_| state == SandboxState::Running)
            .map(|live| live.end_at);
        // No connection lasts across a pause (G26).
        if state.is_final() || state == SandboxState::Paused {
            self.proxy.forget(row.id);
        }
        let moved = self
            .store
            .change_state(row, state, change, Timestamp::now())
            .await?;
        if let Some(moved) = moved {
            tracing::info!(sandbox = %row.id, from = %row.state, to = %state,
                reason = moved.reason.as_deref().unwrap_or(""), "followed the host");
            return Ok(moved);
        }
        self.store
            .any_sandbox(row.id)
            .await?
            .ok_or_else(|| unknown(row.id))
    }

    /// What an error of the host about a running sandbox means: it may have ended a moment ago.
    pub(crate) async fn refused(&self, row: SandboxRow, error: ConnectError) -> Failure {
        let about_it = matches!(
            error.code,
            ErrorCode::NotFound | ErrorCode::FailedPrecondition | ErrorCode::Aborted
        );
        if !about_it || told(&error).is_some() {
            return Failure::from(error);
        }
        match self.look(row).await {
            Ok(now) => match now.row.state {
                state @ (SandboxState::Running | SandboxState::Snapshotting) => {
                    Failure::from(error).in_state(state)
                }
                _ => wrong_state(&now.row, "running"),
            },
            Err(e) => e,
        }
    }

    /// Adds the host's view to rows, with one question for all.
    pub(crate) async fn list(
        &self,
        team: TeamId,
        filter: &SandboxFilter,
        page: Page,
    ) -> Result<Vec<Sandbox>, Failure> {
        let rows = self.store.list_sandboxes(team, filter, page).await?;
        let mut live: BTreeMap<SandboxId, HostSandbox> = BTreeMap::new();
        if rows.iter().any(|row| !row.state.is_final()) {
            match self.host_sandboxes().await {
                Ok(sandboxes) => live = sandboxes,
                Err(e) => {
                    tracing::warn!(error = %e, "the host does not answer; listing what is stored")
                }
            }
        }
        let with_live = |row: SandboxRow| Sandbox {
            live: live.remove(&row.id).filter(|_| !row.state.is_final()),
            row,
        };
        Ok(rows.into_iter().map(with_live).collect())
    }

    /// All sandboxes of the host.
    pub(crate) async fn host_sandboxes(&self) -> Result<BTreeMap<SandboxId, HostSandbox>, Failure> {
        let request = wire::ListSandboxesRequest::default();
        let reply = self
            .host
            .list_sandboxes_with_options(request, options(ASK_WITHIN))
            .await?;
        let mut all = BTreeMap::new();
        for sandbox in reply.into_owned().sandboxes {
            let sandbox = HostSandbox::try_from(sandbox)?;
            all.insert(sandbox.id, sandbox);
        }
        Ok(all)
    }

    pub(crate) async fn destroy(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
    ) -> Result<Destroyed, Failure> {
        let row = self.row(team, id).await?;
        if row.state.is_final() {
            return Ok(Destroyed::Already);
        }
        use SandboxState::{Pausing, Resuming, Snapshotting, Stopping};
        let held = matches!(row.state, Stopping | Pausing | Resuming | Snapshotting);
        if held && self.busy.is_claimed(id) {
            return Err(wrong_state(&row, "running"));
        }
        let change = Change {
            reason: None,
            ..Change::default()
        };
        let stopping = self
            .store
            .change_state(&row, SandboxState::Stopping, change, Timestamp::now())
            .await?;
        let Some(stopping) = stopping else {
            let now = self.row(team, id).await?;
            return Err(wrong_state(&now, row.state.as_str()));
        };
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let _claim = app.busy.claim(id);
            app.take_down(&stopping).await
        }))
        .await?;
        Ok(Destroyed::Now)
    }

    /// Ends a sandbox that is `stopping`.
    pub(crate) async fn take_down(&self, row: &SandboxRow) -> Result<(), Failure> {
        let ended = self.end_on_host(row.id).await;
        ended.map_err(|failure| failure.in_state(row.state))?;
        self.proxy.forget(row.id);
        let change = Change {
            reason: row.reason.clone(),
            ..Change::default()
        };
        self.store
            .change_state(row, SandboxState::Stopped, change, Timestamp::now())
            .await?;
        Ok(())
    }

    /// Ends a sandbox on its host. That there is none is as good.
    pub(crate) async fn end_on_host(&self, id: SandboxId) -> Result<(), Failure> {
        let request = wire::DestroySandboxRequest {
            sandbox_id: id.to_string(),
            ..Default::default()
        };
        match self
            .host
            .destroy_sandbox_with_options(request, options(DESTROY_WITHIN))
            .await
        {
            Ok(_) => Ok(()),
            Err(e) if e.code == ErrorCode::NotFound => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Counts as use of a sandbox.
    pub(crate) async fn ping(&self, team: TeamId, id: SandboxId) -> Result<(), Failure> {
        let row = self.running(team, id).await?;
        let request = wire::SetLifetimeRequest {
            sandbox_id: id.to_string(),
            ..Default::default()
        };
        match self
            .host
            .set_lifetime_with_options(request, options(ASK_WITHIN))
            .await
        {
            Ok(_) => Ok(()),
            Err(e) => Err(self.refused(row, e).await),
        }
    }

    /// Sets when a sandbox ends, `secs` from now. With `only_later` an end that is later already, or
    /// no end at all, stays.
    pub(crate) async fn set_end(
        &self,
        team: TeamId,
        id: SandboxId,
        secs: u32,
        only_later: bool,
    ) -> Result<Sandbox, Failure> {
        // One at a time from the decision to the host's answer: else the host might be told of
        // the earlier end last.
        let _turn = self.ends.turn(id).await;
        let row = self.running(team, id).await?;
        let end_at = Timestamp::now().plus_secs(i64::from(secs));
        if only_later && row.end_at.is_none_or(|known| known >= end_at) {
            return self.look(row).await;
        }
        let request = wire::SetLifetimeRequest {
            sandbox_id: id.to_string(),
            lifetime: lifetime(row.idle_timeout_secs, Some(end_at)).into(),
            ..Default::default()
        };
        let live = match self
            .host
            .set_lifetime_with_options(request, options(ASK_WITHIN))
            .await
        {
            Ok(reply) => reply.into_owned().sandbox.into_option(),
            Err(e) => return Err(self.refused(row, e).await),
        };
        let now = Timestamp::now();
        let row = match self.store.set_end(id, end_at, only_later, now).await? {
            Some(row) => row,
            // It has ended meanwhile, or was paused and resumed until later.
            None => self.running(team, id).await?,
        };
        let live = live.map(HostSandbox::try_from).transpose()?;
        Ok(Sandbox { row, live })
    }

    /// The last lines of the console, in bytes as they came.
    pub(crate) async fn logs(
        &self,
        team: TeamId,
        id: SandboxId,
        tail_bytes: u64,
    ) -> Result<Vec<u8>, Failure> {
        let row = self.row(team, id).await?;
        let request = wire::GetLogsRequest {
            sandbox_id: id.to_string(),
            tail_bytes,
            ..Default::default()
        };
        match self
            .host
            .get_logs_with_options(request, options(ASK_WITHIN))
            .await
        {
            Ok(reply) => Ok(reply.into_owned().console),
            Err(e) if e.code == ErrorCode::NotFound && row.state.is_final() => Err(
                Failure::not_found(format!("{id} has ended and its log is gone")),
            ),
            Err(e) => Err(Failure::from(e).in_state(row.state)),
        }
    }
}

/// Waits for an operation that runs by itself.
pub(super) async fn finish<T>(
    task: tokio::task::JoinHandle<Result<T, Failure>>,
) -> Result<T, Failure> {
    match task.await {
        Ok(result) => result,
        Err(e) => {
            tracing::error!(error = %e, "an operation broke off");
            Err(Failure::new(
                Code::InternalError,
                "the server broke off; its log says why",
            ))
        }
    }
}

pub(super) fn lifetime(idle_timeout_secs: u32, end_at: Option<Timestamp>) -> wire::Lifetime {
    wire::Lifetime {
        idle_timeout_secs,
        end_at_unix_ms: end_at.map_or(0, Timestamp::unix_ms),
        ..Default::default()
    }
}

/// What is written down when a sandbox first runs.
pub(super) fn started(live: &HostSandbox, host: Option<wrenn_types::HostId>) -> Change {
    Change {
        reason: None,
        started_at: Some(live.started_at),
        host,
        disk_mib: Some(live.disk_mib),
        shape: (live.shape.vcpus.0 > 0).then_some(live.shape),
        envd_version: Some(live.envd_version.clone()),
        end_at: None,
        pause_at_end: None,
    }
}
