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
use std::time::{Duration, Instant};

use connectrpc::client::CallOptions;
use connectrpc::{ConnectError, ErrorCode};
use wrenn_store::{
    Change, Inserted, NewSandbox, Page, RequestHash, SandboxFilter, SandboxRow, Timestamp,
};
use wrenn_types::{SandboxId, SandboxState, Shape, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::{App, Code, Failure};
use crate::host::HostSandbox;
use crate::reconcile::{Verdict, judge};

/// A restore takes a fraction of a second; a machine of a new shape has to be booted first, which
/// takes its time where processors are emulated.
const CREATE_WITHIN: Duration = Duration::from_secs(300);
/// Ending a machine: asking it, then killing it.
const DESTROY_WITHIN: Duration = Duration::from_secs(60);
/// What the host answers from memory.
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// Most bytes of a sandbox's environment, names and values together.
const MAX_ENV_BYTES: usize = 64 * 1024;

/// A sandbox: what is stored, and what its host says where it is alive.
#[derive(Debug, Clone)]
pub(crate) struct Sandbox {
    pub(crate) row: SandboxRow,
    pub(crate) live: Option<HostSandbox>,
}

/// A step of an operation and how long it took.
#[derive(Debug, Clone)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) took: Duration,
}

/// Which of the two clocks a new sandbox has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// It ends after so many seconds without use; 0: never.
    Idle(u32),
    /// It ends so many seconds from now, used or not.
    Absolute(u32),
}

/// What to create.
#[derive(Debug, Clone)]
pub(crate) struct CreateSpec {
    pub(crate) template: Option<String>,
    pub(crate) vcpus: Option<i64>,
    pub(crate) memory_mib: Option<i64>,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) envs: BTreeMap<String, String>,
    pub(crate) clock: Clock,
    pub(crate) secure: bool,
    pub(crate) allow_internet: bool,
    pub(crate) idempotency: Option<(String, RequestHash)>,
}

/// A sandbox that was created, now or by the same request before.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) sandbox: Sandbox,
    pub(crate) phases: Vec<Phase>,
}

/// What came of a request to end a sandbox.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Destroyed {
    Now,
    /// It had ended before.
    Already,
}

fn options(within: Duration) -> CallOptions {
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
    pub(crate) async fn create(
        self: &Arc<Self>,
        team: TeamId,
        spec: CreateSpec,
    ) -> Result<Created, Failure> {
        if let Some((key, request)) = &spec.idempotency
            && let Some(known) = self.replay(team, key, *request).await?
        {
            return Ok(known);
        }
        check_envs(&spec.envs)?;
        let template = self.template(spec.template.as_deref()).await?;
        let shape = template
            .limits
            .check(
                Some(spec.vcpus.unwrap_or(i64::from(template.shape.vcpus.0))),
                Some(
                    spec.memory_mib
                        .unwrap_or(i64::from(template.shape.memory.0)),
                ),
            )
            .map_err(|e| Failure::invalid(e.to_string()))?;
        let app = Arc::clone(self);
        let name = template.name;
        finish(tokio::spawn(async move {
            app.bring_up(team, name, shape, spec).await
        }))
        .await
    }

    async fn bring_up(
        &self,
        team: TeamId,
        template: String,
        shape: Shape,
        spec: CreateSpec,
    ) -> Result<Created, Failure> {
        let begun = Instant::now();
        let now = Timestamp::now();
        let id = SandboxId::new();
        let (idle_timeout_secs, end_at) = match spec.clock {
            Clock::Idle(secs) => (secs, None),
            Clock::Absolute(secs) => (0, Some(now.plus_secs(i64::from(secs)))),
        };
        let _claim = self.busy.claim(id);
        let new = NewSandbox {
            id,
            team,
            template: template.clone(),
            shape,
            metadata: spec.metadata,
            idle_timeout_secs,
            end_at,
            secure: spec.secure,
            allow_internet: spec.allow_internet,
            idempotency: spec.idempotency.clone(),
        };
        let row = match self.store.insert_sandbox(new, now).await? {
            Inserted::New(row) => *row,
            Inserted::KeyTaken => {
                // The same request came twice at the same time and the other one was first.
                let (key, request) = spec
                    .idempotency
                    .unwrap_or_else(|| (String::new(), RequestHash([0; 32])));
                let known = self.replay(team, &key, request).await?;
                return known.ok_or_else(in_progress);
            }
        };
        let stored = begun.elapsed();
        let request = wire::CreateSandboxRequest {
            sandbox_id: id.to_string(),
            template,
            vcpus: spec.vcpus.map_or(0, |_| shape.vcpus.0),
            memory_mib: spec.memory_mib.map_or(0, |_| shape.memory.0),
            envs: spec.envs.into_iter().collect(),
            lifetime: lifetime(idle_timeout_secs, end_at).into(),
            allow_internet: spec.allow_internet,
            secure: spec.secure,
            ..Default::default()
        };
        let asked = self
            .host
            .create_sandbox_with_options(request, options(CREATE_WITHIN))
            .await;
        let reply = match asked {
            Ok(reply) => reply.into_owned(),
            Err(e) => return Err(self.give_up(&row, e).await),
        };
        let mut phases = vec![Phase {
            name: "store".to_owned(),
            took: stored,
        }];
        phases.extend(reply.phases.iter().map(|p| Phase {
            name: p.name.clone(),
            took: Duration::from_micros(p.micros),
        }));
        let live = HostSandbox::try_from(reply.sandbox.into_option().unwrap_or_default())?;
        let started = started(&live, self.recent_host().await);
        match self
            .store
            .change_state(&row, SandboxState::Running, started, Timestamp::now())
            .await?
        {
            Some(row) => {
                phases.push(Phase {
                    name: "total".to_owned(),
                    took: begun.elapsed(),
                });
                Ok(Created {
                    sandbox: Sandbox {
                        row,
                        live: Some(live),
                    },
                    phases,
                })
            }
            None => {
                // Ended while it started; whoever did that may have asked the host too early.
                self.end_on_host(id).await?;
                let row = self.store.any_sandbox(id).await?.unwrap_or(row);
                Err(wrong_state(&row, "running"))
            }
        }
    }

    async fn recent_host(&self) -> Option<wrenn_types::HostId> {
        let info = self.info.lock().await;
        info.as_ref().and_then(|(_, info)| info.id)
    }

    /// Writes down that a sandbox could not be made, and makes sure that nothing of it is left.
    async fn give_up(&self, row: &SandboxRow, error: ConnectError) -> Failure {
        let refused = matches!(
            error.code,
            ErrorCode::InvalidArgument
                | ErrorCode::NotFound
                | ErrorCode::ResourceExhausted
                | ErrorCode::FailedPrecondition
                | ErrorCode::Unimplemented
        );
        let failure = Failure::from(error);
        if !refused && let Err(e) = self.end_on_host(row.id).await {
            tracing::warn!(sandbox = %row.id, error = %e, "what was left of it could not be ended yet");
        }
        let change = Change {
            reason: Some(failure.message.clone()),
            ..Change::default()
        };
        let now = Timestamp::now();
        let noted = self
            .store
            .change_state(row, SandboxState::Error, change, now)
            .await;
        let forgotten = self.store.forget_idempotency(row.id).await;
        if let Err(e) = noted.map(|_| ()).and(forgotten) {
            return Failure::from(e);
        }
        failure
    }

    /// The sandbox that the same request made before.
    async fn replay(
        &self,
        team: TeamId,
        key: &str,
        request: RequestHash,
    ) -> Result<Option<Created>, Failure> {
        let Some(known) = self
            .store
            .remembered(team, key, request, Timestamp::now())
            .await?
        else {
            return Ok(None);
        };
        if !known.same_request {
            return Err(Failure::new(
                Code::Conflict,
                "this Idempotency-Key was used for another request; choose a new one",
            )
            .with_e2b("idempotency_request_mismatch"));
        }
        let sandbox = self.get(team, known.sandbox).await?;
        if sandbox.row.state == SandboxState::Starting {
            return Err(in_progress());
        }
        Ok(Some(Created {
            sandbox,
            phases: Vec::new(),
        }))
    }

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
        if state.is_final() {
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
        if error.code != ErrorCode::NotFound && error.code != ErrorCode::FailedPrecondition {
            return Failure::from(error);
        }
        match self.look(row).await {
            Ok(now) if now.row.state == SandboxState::Running => Failure::from(error),
            Ok(now) => wrong_state(&now.row, "running"),
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
        if row.state == SandboxState::Stopping && self.busy.is_claimed(id) {
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
        self.end_on_host(row.id).await?;
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
        let row = self.running(team, id).await?;
        let end_at = Timestamp::now().plus_secs(i64::from(secs));
        if only_later && row.end_at.is_none_or(|known| known >= end_at) {
            return self.look(row).await;
        }
        let idle = row.idle_timeout_secs;
        let request = wire::SetLifetimeRequest {
            sandbox_id: id.to_string(),
            lifetime: lifetime(idle, Some(end_at)).into(),
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
        let stored = self
            .store
            .set_lifetime(id, idle, Some(end_at), Timestamp::now())
            .await?;
        let row = stored.ok_or_else(|| wrong_state(&row, "running"))?;
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
            Err(e) => Err(e.into()),
        }
    }
}

/// Waits for an operation that runs by itself.
async fn finish<T>(task: tokio::task::JoinHandle<Result<T, Failure>>) -> Result<T, Failure> {
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

fn in_progress() -> Failure {
    Failure::new(
        Code::Conflict,
        "a request with this Idempotency-Key is still under way; repeat it in a moment",
    )
    .with_e2b("idempotency_request_in_progress")
}

fn lifetime(idle_timeout_secs: u32, end_at: Option<Timestamp>) -> wire::Lifetime {
    wire::Lifetime {
        idle_timeout_secs,
        end_at_unix_ms: end_at.map_or(0, Timestamp::unix_ms),
        ..Default::default()
    }
}

/// What is written down when a sandbox first runs.
fn started(live: &HostSandbox, host: Option<wrenn_types::HostId>) -> Change {
    Change {
        reason: None,
        started_at: Some(live.started_at),
        host,
        disk_mib: Some(live.disk_mib),
        shape: (live.shape.vcpus.0 > 0).then_some(live.shape),
        envd_version: Some(live.envd_version.clone()),
    }
}

pub(crate) fn check_envs(envs: &BTreeMap<String, String>) -> Result<(), Failure> {
    let bytes: usize = envs
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if bytes > MAX_ENV_BYTES {
        return Err(Failure::invalid(format!(
            "the environment has {bytes} bytes; at most {MAX_ENV_BYTES} are allowed"
        )));
    }
    for (name, value) in envs {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let shown: String = name.chars().take(80).collect();
            return Err(Failure::invalid(format!(
                "`{shown}` cannot be an environment variable: its name must not be empty or hold `=`, \
                 and neither name nor value a NUL"
            )));
        }
    }
    Ok(())
}
