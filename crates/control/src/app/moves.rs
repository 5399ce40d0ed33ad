//! Pausing and resuming, templates and checkpoints made of sandboxes, forks, rollback.
//!
//! ```text
//!             pausing ──────▶ paused
//!            ╱                   │
//!  running ◀── resuming ◀────────┤ resume, rollback
//!     ▲  ╲────────▶──╱ rollback
//!     ╰─ snapshotting ─╯ snapshot, checkpoint, fork
//! ```
//!
//! Each operation claims its sandbox, moves the row by compare-and-set to the state in
//! between, and afterwards to what the host made of it; what it does goes on when the client
//! hangs up. Of two that want the same sandbox one wins, and the other is told the state.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::ConnectError;
use wrenn_store::{Change, SandboxRow, Timestamp};
use wrenn_types::{SandboxId, SandboxState, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::sandboxes::{Sandbox, finish, lifetime, options, wrong_state};
use super::snapshots::MAX_NAME;
use super::{App, Claim, Failure, Phase};
use crate::host::HostSandbox;

/// Saving or restoring one: some tens of MiB at most, on a busy host and a slow disk.
pub(super) const MOVE_WITHIN: Duration = Duration::from_secs(120);

/// What was done to a restored machine before its first instruction counted.
pub(crate) type Certificate = wire::RestoreCertificate;

/// A sandbox after an operation on it.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) sandbox: Sandbox,
    /// Whether this request did it; else it was so before.
    pub(crate) now: bool,
    pub(crate) phases: Vec<Phase>,
    pub(crate) certificate: Option<Certificate>,
}

/// How a paused sandbox is to run again.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Resume {
    /// It ends so many seconds from now; `None`: as it was.
    pub(crate) secs: Option<u32>,
    /// It is booted from its disk, and what memory it has is dropped.
    pub(crate) boot: bool,
    /// From now on it is paused at its end; else what becomes of it then stays as it was.
    pub(crate) pause_at_end: bool,
}

pub(super) fn phases(given: &[wire::Phase]) -> Vec<Phase> {
    let phase = |phase: &wire::Phase| Phase {
        name: phase.name.clone(),
        took: Duration::from_micros(phase.micros),
    };
    given.iter().map(phase).collect()
}

pub(super) fn no_reason() -> Change {
    Change::default()
}

impl App {
    /// Claims a sandbox for an operation that changes its life.
    pub(super) async fn claim(&self, row: &SandboxRow, wanted: &str) -> Result<Claim, Failure> {
        match self.busy.claim(row.id) {
            Some(claim) => Ok(claim),
            None => {
                let now = self.store.any_sandbox(row.id).await?;
                Err(wrong_state(now.as_ref().unwrap_or(row), wanted))
            }
        }
    }

    /// Moves a row that an operation found in `row`, or tells what it is instead.
    pub(super) async fn step(
        &self,
        row: &SandboxRow,
        to: SandboxState,
        change: Change,
    ) -> Result<SandboxRow, Failure> {
        let now = Timestamp::now();
        if let Some(moved) = self.store.change_state(row, to, change, now).await? {
            return Ok(moved);
        }
        let now = self.store.any_sandbox(row.id).await?;
        Err(wrong_state(now.as_ref().unwrap_or(row), row.state.as_str()))
    }

    /// Takes a row back to what it was before an operation that failed, and says why. What
    /// the host made of it the next look will tell.
    pub(super) async fn step_back(
        &self,
        moving: &SandboxRow,
        before: &SandboxRow,
        error: ConnectError,
    ) -> Failure {
        let change = Change {
            reason: before.reason.clone(),
            ..Change::default()
        };
        match self.step(moving, before.state, change).await {
            Ok(row) if row.state == SandboxState::Running => self.refused(row, error).await,
            // What the host says of a paused one is about its snapshot.
            Ok(row) => Failure::from(error).in_state(row.state),
            Err(failure) => failure,
        }
    }

    /// Saves a sandbox, or its disk alone, and gives its machine back.
    pub(crate) async fn pause(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        disk_only: bool,
    ) -> Result<Moved, Failure> {
        let row = self.get(team, id).await?.row;
        if row.state != SandboxState::Running {
            return Err(wrong_state(&row, "running"));
        }
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let _claim = app.claim(&row, "running").await?;
            let moving = app.step(&row, SandboxState::Pausing, no_reason()).await?;
            app.proxy.forget(id);
            let request = wire::PauseSandboxRequest {
                sandbox_id: id.to_string(),
                disk_only,
                ..Default::default()
            };
            let asked = app
                .host
                .pause_sandbox_with_options(request, options(MOVE_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => return Err(app.step_back(&moving, &row, error).await),
            };
            app.proxy.forget(id);
            let row = app.step(&moving, SandboxState::Paused, no_reason()).await?;
            Ok(Moved {
                sandbox: Sandbox {
                    row,
                    live: live(reply.sandbox.into_option())?,
                },
                now: true,
                phases: phases(&reply.phases),
                certificate: None,
            })
        }))
        .await
    }

    /// Restores a paused sandbox, or boots it from its disk. One that runs stays as it is, but for
    /// its end.
    pub(crate) async fn resume(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        resume: Resume,
    ) -> Result<Moved, Failure> {
        let secs = resume.secs;
        let sandbox = self.get(team, id).await?;
        match sandbox.row.state {
            SandboxState::Running | SandboxState::Snapshotting => {
                let sandbox = match secs {
                    Some(secs) => self.set_end(team, id, secs, true).await?,
                    None => sandbox,
                };
                return Ok(Moved {
                    sandbox,
                    now: false,
                    phases: Vec::new(),
                    certificate: None,
                });
            }
            SandboxState::Paused => self.admit()?,
            _ => return Err(wrong_state(&sandbox.row, "paused")),
        }
        let row = sandbox.row;
        let idle = row.idle_timeout_secs;
        let end_at = secs.map(|secs| Timestamp::now().plus_secs(i64::from(secs)));
        let request = wire::ResumeSandboxRequest {
            sandbox_id: id.to_string(),
            lifetime: end_at
                .map(|end_at| lifetime(idle, Some(end_at)))
                .map_or_else(Default::default, Into::into),
            boot: resume.boot,
            pause_at_end: resume.pause_at_end,
            ..Default::default()
        };
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let _claim = app.claim(&row, "paused").await?;
            let moving = app.step(&row, SandboxState::Resuming, no_reason()).await?;
            let asked = app
                .host
                .resume_sandbox_with_options(request, options(MOVE_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => return Err(app.step_back(&moving, &row, error).await),
            };
            let certificate = reply.certificate.into_option();
            app.restored(moving, reply.sandbox.into_option(), certificate)
                .await
        }))
        .await
    }

    /// Writes down that a sandbox runs again, and until when.
    async fn restored(
        &self,
        moving: SandboxRow,
        given: Option<wire::Sandbox>,
        certificate: Option<Certificate>,
    ) -> Result<Moved, Failure> {
        let until = given.as_ref().and_then(|s| s.lifetime.as_option());
        let end_at = until
            .filter(|lifetime| lifetime.end_at_unix_ms != 0)
            .map(|lifetime| Timestamp::from_unix_ms(lifetime.end_at_unix_ms));
        let pause_at_end = given.as_ref().map(|given| given.pause_at_end);
        let live = live(given)?;
        let change = Change {
            end_at: Some(end_at),
            pause_at_end,
            ..Change::default()
        };
        let row = self.step(&moving, SandboxState::Running, change).await?;
        Ok(Moved {
            sandbox: Sandbox { row, live },
            now: true,
            phases: certificate
                .as_ref()
                .map(|certificate| phases(&certificate.phases))
                .unwrap_or_default(),
            certificate,
        })
    }

    /// A running sandbox is `snapshotting` from now on, a paused one is claimed.
    pub(super) async fn hold_still(&self, row: &SandboxRow) -> Result<Held, Failure> {
        match row.state {
            SandboxState::Running => {
                let claim = self.claim(row, "running").await?;
                let to = SandboxState::Snapshotting;
                let moving = self.step(row, to, no_reason()).await?;
                // The guest closes them while it is quieted; none may be taken up just then (G26).
                self.proxy.drop_idle(row.id);
                Ok(Held {
                    before: row.clone(),
                    moving: Some(moving),
                    _claim: claim,
                })
            }
            SandboxState::Paused => Ok(Held {
                before: row.clone(),
                moving: None,
                _claim: self.claim(row, "paused").await?,
            }),
            _ => Err(wrong_state(row, "running or paused")),
        }
    }

    pub(super) async fn release(&self, held: Held) -> Result<SandboxRow, Failure> {
        match held.moving {
            Some(moving) => self.step(&moving, SandboxState::Running, no_reason()).await,
            None => Ok(held.before),
        }
    }

    pub(super) async fn release_after(&self, held: Held, error: ConnectError) -> Failure {
        match &held.moving {
            Some(moving) => self.step_back(moving, &held.before, error).await,
            None => Failure::from(error).in_state(held.before.state),
        }
    }

    /// Puts a sandbox back to one of its checkpoints; it runs afterwards.
    pub(crate) async fn roll_back(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        checkpoint: &str,
    ) -> Result<Moved, Failure> {
        let row = self.get(team, id).await?.row;
        if !matches!(row.state, SandboxState::Running | SandboxState::Paused) {
            return Err(wrong_state(&row, "running or paused"));
        }
        self.admit()?;
        let Some(found) = self.store.checkpoint(id, checkpoint).await? else {
            let shown: String = checkpoint.chars().take(MAX_NAME).collect();
            return Err(Failure::not_found(format!(
                "{id} has no checkpoint `{shown}`"
            )));
        };
        let request = wire::RollbackSandboxRequest {
            sandbox_id: id.to_string(),
            snapshot_id: found.host_snapshot.clone(),
            ..Default::default()
        };
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let _claim = app.claim(&row, row.state.as_str()).await?;
            let moving = app.step(&row, SandboxState::Resuming, no_reason()).await?;
            app.proxy.forget(id);
            let asked = app
                .host
                .rollback_sandbox_with_options(request, options(MOVE_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => return Err(app.step_back(&moving, &row, error).await),
            };
            app.proxy.forget(id);
            let certificate = reply.certificate.into_option();
            app.restored(moving, reply.sandbox.into_option(), certificate)
                .await
        }))
        .await
    }
}

/// A sandbox that is held while it is saved.
pub(super) struct Held {
    before: SandboxRow,
    moving: Option<SandboxRow>,
    _claim: Claim,
}

pub(super) fn live(given: Option<wire::Sandbox>) -> Result<Option<HostSandbox>, Failure> {
    Ok(given.map(HostSandbox::try_from).transpose()?)
}
