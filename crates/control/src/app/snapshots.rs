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

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use wrenn_store::{
    Change, Inserted, Named, NewSandbox, NewSnapshot, SandboxRow, SnapshotKind, SnapshotRow,
    Timestamp,
};
use wrenn_types::{SandboxId, SandboxState, TeamId};
use wrenn_wire::wrenn::host::v1 as wire;

use super::sandboxes::{Sandbox, finish, lifetime, options, started, wrong_state};
use super::{App, Claim, Code, Failure, Phase};
use crate::host::HostSandbox;

/// Saving or restoring one: some tens of MiB at most, on a busy host and a slow disk.
const MOVE_WITHIN: Duration = Duration::from_secs(120);
/// The same for many children of one fork.
const FORK_WITHIN: Duration = Duration::from_secs(300);
/// Letting go of a snapshot.
const DELETE_WITHIN: Duration = Duration::from_secs(30);
/// Children of a sandbox whose end has come or is near live for so many seconds, as it would if
/// it were resumed.
const FORKED_FOR: i64 = 300;
/// The longest name.
const MAX_NAME: usize = 100;

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

/// A child of a fork.
pub(crate) type Child = Result<(Sandbox, Option<Certificate>), Failure>;

/// A snapshot that was taken, and where the time went.
pub(crate) type Taken = (SnapshotRow, Vec<Phase>);

fn phases(given: &[wire::Phase]) -> Vec<Phase> {
    let phase = |phase: &wire::Phase| Phase {
        name: phase.name.clone(),
        took: Duration::from_micros(phase.micros),
    };
    given.iter().map(phase).collect()
}

fn no_reason() -> Change {
    Change::default()
}

/// A name that a template or checkpoint may have.
fn check_name(name: &str) -> Result<(), Failure> {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    if !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(fits) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME).collect();
    Err(Failure::invalid(format!(
        "`{shown}` cannot be a name: use 1 to {MAX_NAME} of a-z, 0-9, `-` and `_`"
    )))
}

impl App {
    /// Claims a sandbox for an operation that changes its life.
    async fn claim(&self, row: &SandboxRow, wanted: &str) -> Result<Claim, Failure> {
        match self.busy.claim(row.id) {
            Some(claim) => Ok(claim),
            None => {
                let now = self.store.any_sandbox(row.id).await?;
                Err(wrong_state(now.as_ref().unwrap_or(row), wanted))
            }
        }
    }

    /// Moves a row that an operation found in `row`, or tells what it is instead.
    async fn step(
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
    async fn step_back(
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
            Ok(_) => Failure::from(error),
            Err(failure) => failure,
        }
    }

    /// Saves a sandbox and gives its machine back.
    pub(crate) async fn pause(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
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

    /// Restores a paused sandbox; with `secs`, it then ends so many seconds from now. One
    /// that runs stays as it is.
    pub(crate) async fn resume(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        secs: Option<u32>,
    ) -> Result<Moved, Failure> {
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
            SandboxState::Paused => {}
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
        let live = live(given)?;
        let mut row = self
            .step(&moving, SandboxState::Running, no_reason())
            .await?;
        if row.end_at != end_at {
            let now = Timestamp::now();
            let idle = row.idle_timeout_secs;
            let stored = self.store.set_lifetime(row.id, idle, end_at, now).await?;
            row = stored.unwrap_or(row);
        }
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

    /// Takes a snapshot of a sandbox, which stays as it is, and calls it `name`.
    pub(crate) async fn take_snapshot(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        kind: SnapshotKind,
        name: Option<String>,
        overwrite: bool,
    ) -> Result<Taken, Failure> {
        let row = self.get(team, id).await?.row;
        let name = match name {
            Some(name) => name,
            // As unlike any other as the snapshot is.
            None => format!(
                "snapshot-{}",
                &SandboxId::new().uuid().simple().to_string()[20..]
            ),
        };
        check_name(&name)?;
        match kind {
            SnapshotKind::Template => {
                if self.host_info().await?.templates.contains_key(&name)
                    || super::template_name(&name) != name
                {
                    return Err(Failure::new(
                        Code::NameReserved,
                        format!("`{name}` is the name of an image's template; choose another"),
                    ));
                }
                if !overwrite && self.store.template_snapshot(team, &name).await?.is_some() {
                    return Err(name_taken(&name));
                }
            }
            SnapshotKind::Checkpoint => {
                if !overwrite
                    && self
                        .store
                        .checkpoints(id)
                        .await?
                        .iter()
                        .any(|c| c.name == name)
                {
                    return Err(name_taken(&name));
                }
            }
        }
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let request = wire::CreateSnapshotRequest {
                sandbox_id: id.to_string(),
                name: name.clone(),
                ..Default::default()
            };
            let held = app.hold_still(&row).await?;
            let kept = app.kept.read().await;
            let asked = app
                .host
                .create_snapshot_with_options(request, options(MOVE_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => return Err(app.release_after(held, error).await),
            };
            let taken = reply.snapshot.into_option().unwrap_or_default();
            let new = NewSnapshot {
                team,
                kind,
                name: name.clone(),
                sandbox: id,
                host_snapshot: taken.snapshot_id,
                shape: row.shape,
                disk_mib: taken.disk_mib,
                size_bytes: taken.size_bytes,
                envd_version: taken.envd_version,
            };
            let now = Timestamp::now();
            let stored = app.store.insert_snapshot(new.clone(), overwrite, now).await;
            if !matches!(stored, Ok(Named::New(_))) {
                // For the host to be told that nobody needs it.
                app.store.discard_snapshot(new, now).await?;
            }
            drop(kept);
            app.release(held).await?;
            app.forget_deleted_snapshots().await;
            match stored? {
                Named::New(row) => Ok((row, phases(&reply.phases))),
                Named::NameTaken => Err(name_taken(&name)),
            }
        }))
        .await
    }

    /// A running sandbox is `snapshotting` from now on, a paused one is claimed.
    async fn hold_still(&self, row: &SandboxRow) -> Result<Held, Failure> {
        match row.state {
            SandboxState::Running => {
                let claim = self.claim(row, "running").await?;
                let to = SandboxState::Snapshotting;
                let moving = self.step(row, to, no_reason()).await?;
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

    async fn release(&self, held: Held) -> Result<SandboxRow, Failure> {
        match held.moving {
            Some(moving) => self.step(&moving, SandboxState::Running, no_reason()).await,
            None => Ok(held.before),
        }
    }

    async fn release_after(&self, held: Held, error: ConnectError) -> Failure {
        match &held.moving {
            Some(moving) => self.step_back(moving, &held.before, error).await,
            None => self.refused(held.before, error).await,
        }
    }

    /// Starts `count` new sandboxes as this one is now. Each ends as the parent would, or with
    /// `secs` so many seconds from now.
    pub(crate) async fn fork(
        self: &Arc<Self>,
        team: TeamId,
        id: SandboxId,
        count: u32,
        secs: Option<u32>,
    ) -> Result<(Vec<Child>, Vec<Phase>), Failure> {
        let row = self.get(team, id).await?.row;
        let app = Arc::clone(self);
        finish(tokio::spawn(async move {
            let held = app.hold_still(&row).await?;
            let now = Timestamp::now();
            let (idle, end_at) = match secs {
                Some(secs) => (0, Some(now.plus_secs(i64::from(secs)))),
                // Of a paused one the end may be over; its children live as long as it would.
                None => {
                    let least = now.plus_secs(FORKED_FOR);
                    let end_at = row.end_at.map(|end| if end < least { least } else { end });
                    (row.idle_timeout_secs, end_at)
                }
            };
            let mut children = Vec::new();
            let mut claims = Vec::new();
            for _ in 0..count {
                let child = SandboxId::new();
                claims.extend(app.busy.claim(child));
                let new = NewSandbox {
                    id: child,
                    team,
                    template: row.template.clone(),
                    shape: row.shape,
                    metadata: row.metadata.clone(),
                    idle_timeout_secs: idle,
                    end_at,
                    secure: row.secure,
                    allow_internet: row.allow_internet,
                    pause_at_end: row.pause_at_end,
                    auto_resume: row.auto_resume,
                    idempotency: None,
                };
                // Without a key there is none that could be taken.
                if let Inserted::New(stored) = app.store.insert_sandbox(new, now).await? {
                    children.push(*stored);
                }
            }
            let request = wire::ForkSandboxRequest {
                sandbox_id: id.to_string(),
                child_ids: children.iter().map(|child| child.id.to_string()).collect(),
                lifetime: lifetime(idle, end_at).into(),
                ..Default::default()
            };
            let asked = app
                .host
                .fork_sandbox_with_options(request, options(FORK_WITHIN))
                .await;
            let reply = match asked {
                Ok(reply) => reply.into_owned(),
                Err(error) => {
                    for child in &children {
                        app.give_up(child, error.clone()).await;
                    }
                    return Err(app.release_after(held, error).await);
                }
            };
            app.release(held).await?;
            let mut born: BTreeMap<String, wire::ForkedChild> = reply
                .children
                .into_iter()
                .map(|child| (child.sandbox_id.clone(), child))
                .collect();
            let mut made = Vec::new();
            for child in children {
                let told = born.remove(&child.id.to_string()).unwrap_or_default();
                made.push(app.child(child, told).await);
            }
            Ok((made, phases(&reply.phases)))
        }))
        .await
    }

    async fn child(&self, row: SandboxRow, told: wire::ForkedChild) -> Child {
        let Some(live) = live(told.sandbox.into_option())? else {
            return Err(self.give_up(&row, ConnectError::internal(told.error)).await);
        };
        let change = started(&live, self.recent_host().await);
        let row = self.step(&row, SandboxState::Running, change).await?;
        let sandbox = Sandbox {
            row,
            live: Some(live),
        };
        Ok((sandbox, told.certificate.into_option()))
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
        let known = self.store.checkpoints(id).await?;
        let Some(found) = known.iter().find(|known| known.name == checkpoint) else {
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

    /// Deletes a team's template that is a snapshot. Sandboxes made from it live on.
    pub(crate) async fn delete_template(&self, team: TeamId, name: &str) -> Result<(), Failure> {
        let shown: String = name.chars().take(MAX_NAME).collect();
        let unknown = || Failure::not_found(format!("there is no snapshot `{shown}`"));
        let found = self.store.template_snapshot(team, name).await?;
        let found = found.ok_or_else(unknown)?;
        match self
            .store
            .delete_snapshot(found.id, Timestamp::now())
            .await?
        {
            true => self.forget_deleted_snapshots().await,
            false => return Err(unknown()),
        }
        Ok(())
    }

    /// Tells the host of snapshots that were deleted here. What cannot be told now the
    /// reconciler tells later.
    pub(crate) async fn forget_deleted_snapshots(&self) {
        if let Err(error) = self.try_forget_deleted_snapshots().await {
            tracing::warn!(error = %error, "the host was not told of deleted snapshots yet");
        }
    }

    async fn try_forget_deleted_snapshots(&self) -> Result<(), Failure> {
        let _alone = self.kept.write().await;
        let mut outcome = Ok(());
        for (id, host_snapshot) in self.store.deleted_snapshots().await? {
            let told = match host_snapshot {
                Some(snapshot_id) => self.delete_on_host(snapshot_id).await,
                None => Ok(()),
            };
            match told {
                Ok(()) => self.store.forget_snapshot(id).await?,
                // One that the host cannot delete does not keep the others.
                Err(failure) => outcome = Err(failure),
            }
        }
        outcome
    }

    async fn delete_on_host(&self, snapshot_id: String) -> Result<(), Failure> {
        let request = wire::DeleteSnapshotRequest {
            snapshot_id,
            ..Default::default()
        };
        let asked = self
            .host
            .delete_snapshot_with_options(request, options(DELETE_WITHIN))
            .await;
        match asked {
            Ok(_) => Ok(()),
            Err(error) if error.code == ErrorCode::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Deletes what belonged to sandboxes that have ended; for the reconciler.
    pub(crate) async fn tidy_snapshots(&self) -> Result<(), Failure> {
        self.store
            .delete_orphaned_checkpoints(Timestamp::now())
            .await?;
        self.try_forget_deleted_snapshots().await
    }
}

/// A sandbox that is held while it is saved.
struct Held {
    before: SandboxRow,
    moving: Option<SandboxRow>,
    _claim: Claim,
}

fn name_taken(name: &str) -> Failure {
    Failure::new(
        Code::TemplateNameTaken,
        format!("there is a snapshot `{name}` already; choose another name, or overwrite it"),
    )
}

fn live(given: Option<wire::Sandbox>) -> Result<Option<HostSandbox>, Failure> {
    Ok(given.map(HostSandbox::try_from).transpose()?)
}
