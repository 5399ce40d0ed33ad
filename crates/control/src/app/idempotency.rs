//! The same request twice makes one thing, also when this server was ended in between.

use uuid::Uuid;
use wrenn_store::{Remembered, RequestHash, SandboxRow, Timestamp};
use wrenn_types::{SandboxId, SandboxState, TeamId};

use super::create::Created;
use super::fork::Child;
use super::snapshots::Taken;
use super::{App, Code, Failure};

/// An `Idempotency-Key`, and the hash of what was asked for with it.
pub(crate) type Key = (String, RequestHash);

/// A sandbox that never ran and never will.
fn stillborn(row: &SandboxRow) -> bool {
    row.state == SandboxState::Error && row.started_at.is_none()
}

impl App {
    /// What was made under this key before.
    async fn remembered(
        &self,
        team: TeamId,
        (key, request): &Key,
    ) -> Result<Option<Remembered>, Failure> {
        let now = Timestamp::now();
        let known = self.store.remembered(team, key, *request, now).await?;
        match known {
            Some(known) if !known.same_request => Err(Failure::new(
                Code::Conflict,
                "this Idempotency-Key was used for another request; choose a new one",
            )
            .with_e2b("idempotency_request_mismatch")),
            known => Ok(known),
        }
    }

    /// The sandbox that the same request made before.
    pub(super) async fn created_before(
        &self,
        team: TeamId,
        key: &Key,
    ) -> Result<Option<Created>, Failure> {
        let children = self.forked_before(team, key).await?;
        let first = children.and_then(|children| children.into_iter().next());
        let made = first.transpose()?;
        Ok(made.map(|(sandbox, _)| Created {
            sandbox,
            phases: Vec::new(),
        }))
    }

    /// The sandboxes that the same request made before. If none of them ever ran, it may be
    /// tried again.
    pub(super) async fn forked_before(
        &self,
        team: TeamId,
        key: &Key,
    ) -> Result<Option<Vec<Child>>, Failure> {
        let Some(known) = self.remembered(team, key).await? else {
            return Ok(None);
        };
        let mut children: Vec<Child> = Vec::new();
        for id in &known.made {
            let sandbox = self.get(team, SandboxId::from_uuid(*id)).await?;
            let row = &sandbox.row;
            if row.state == SandboxState::Starting {
                return Err(in_progress());
            }
            children.push(match (stillborn(row), &row.reason) {
                (false, _) => Ok((sandbox, None)),
                (true, reason) => {
                    let why = reason.as_deref().unwrap_or("it could not be started");
                    Err(Failure::new(Code::AgentError, why))
                }
            });
        }
        if children.iter().all(Result::is_err) {
            self.store.forget_made(&known.made).await?;
            return Ok(None);
        }
        Ok(Some(children))
    }

    /// The snapshot that the same request took of this sandbox before.
    pub(super) async fn taken_before(
        &self,
        team: TeamId,
        of: SandboxId,
        key: &Key,
    ) -> Result<Option<Taken>, Failure> {
        let Some(mut known) = self.remembered(team, key).await? else {
            return Ok(None);
        };
        if !known.done {
            if self.busy.is_claimed(of) {
                return Err(in_progress());
            }
            // Whoever took it let go of the sandbox between the two looks, or died.
            match self.remembered(team, key).await? {
                Some(again) => known = again,
                None => return Ok(None),
            }
        }
        let id = known.made.first().copied().unwrap_or_else(Uuid::nil);
        if !known.done {
            self.store.forget_made(&[id]).await?;
            return Ok(None);
        }
        match self.store.snapshot(team, id).await? {
            Some(row) => Ok(Some((row, Vec::new()))),
            None => Err(Failure::new(
                Code::Conflict,
                "what was made with this Idempotency-Key has been deleted since; choose a new one",
            )),
        }
    }
}

pub(super) fn in_progress() -> Failure {
    Failure::new(
        Code::Conflict,
        "a request with this Idempotency-Key is still under way; repeat it in a moment",
    )
    .with_e2b("idempotency_request_in_progress")
}
