//! What concerns a whole host and not one sandbox: that it starts nothing, and that nothing
//! runs on it any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::StreamExt;
use wrenn_store::{SandboxRow, Timestamp};
use wrenn_types::{SandboxId, SandboxState};
use wrenn_wire::wrenn::host::v1 as wire;

use super::sandboxes::{finish, options, wrong_state};
use super::{App, Code, Destroyed, Failure};

/// Pauses at the same time: each writes what its guest has changed to one and the same disk.
const PAUSES_AT_ONCE: usize = 4;
/// Ends at the same time.
const ENDS_AT_ONCE: usize = 8;
/// What is on its way to another state is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// A sandbox that somebody else is at work on each time is given up after so many looks.
const MOST_TRIES: u32 = 20;
/// What does not get on for so long, such as when its host is away, is given up. A machine of a
/// new shape takes its time to start.
const STUCK_AFTER: Duration = Duration::from_secs(330);
/// The host writes a small file.
const SET_WITHIN: Duration = Duration::from_secs(10);

/// What came of an operation on everything that runs.
#[derive(Debug, Default)]
pub struct Everything {
    /// Those it was done to.
    pub done: Vec<SandboxId>,
    /// Those it could not be done to, and why.
    pub failed: Vec<(SandboxId, Failure)>,
}

/// Whether a sandbox in this state has a machine, or is about to.
fn occupies(state: SandboxState) -> bool {
    use SandboxState as S;
    match state {
        S::Pending | S::Starting | S::Running | S::Pausing => true,
        S::Snapshotting | S::Resuming | S::Stopping => true,
        S::Paused | S::Missing | S::Stopped | S::Error => false,
    }
}

impl App {
    /// Starts nothing new from now on: this server is about to end.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    /// Whether anything new is started.
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Refuses what would start a machine when this server is about to end.
    pub(crate) fn admit(&self) -> Result<(), Failure> {
        match self.is_closing() {
            true => Err(Failure::new(
                Code::HostUnavailable,
                "this server is ending and starts nothing new",
            )),
            false => Ok(()),
        }
    }

    /// Tells the host to drain, or to drain no more. Answers since when it does.
    pub(crate) async fn set_draining(&self, draining: bool) -> Result<Option<Timestamp>, Failure> {
        let request = wire::SetDrainingRequest {
            draining,
            ..Default::default()
        };
        let reply = self
            .host
            .set_draining_with_options(request, options(SET_WITHIN))
            .await?;
        Ok(since(reply.into_owned().draining_since_unix_ms))
    }

    /// Pauses all that runs, whoever's it is, until nothing does: what was being made when this
    /// began is paused as soon as it runs. Goes on when whoever asked hangs up.
    pub(crate) async fn pause_all(self: &Arc<Self>) -> Result<Everything, Failure> {
        let app = Arc::clone(self);
        finish(tokio::spawn(async move { app.pause_running().await })).await
    }

    async fn pause_running(self: &Arc<Self>) -> Result<Everything, Failure> {
        let mut all = Everything::default();
        let mut tries: BTreeMap<SandboxId, u32> = BTreeMap::new();
        let mut got_on = Instant::now();
        loop {
            let rows = self.store.living_sandboxes().await?;
            let given_up = |row: &SandboxRow| all.failed.iter().any(|(id, _)| *id == row.id);
            let open: Vec<SandboxRow> = rows
                .into_iter()
                .filter(|row| occupies(row.state) && !given_up(row))
                .collect();
            if open.is_empty() {
                return Ok(all);
            }
            if got_on.elapsed() > STUCK_AFTER {
                let stuck = open.iter().map(|row| (row.id, wrong_state(row, "paused")));
                all.failed.extend(stuck);
                return Ok(all);
            }
            let running = open
                .into_iter()
                .filter(|r| r.state == SandboxState::Running);
            let mut pauses = futures::stream::iter(running)
                .map(|row| async move { (row.id, self.pause(row.team, row.id, false).await) })
                .buffer_unordered(PAUSES_AT_ONCE);
            let mut progress = false;
            while let Some((id, paused)) = pauses.next().await {
                match paused {
                    Ok(_) => {
                        progress = true;
                        all.done.push(id);
                    }
                    Err(failure) => {
                        let tried = tries.entry(id).or_default();
                        *tried += 1;
                        // Somebody else is at work on it, or was and it runs no more.
                        let again = failure.code == Code::InvalidState && *tried < MOST_TRIES;
                        if !again {
                            tracing::error!(sandbox = %id, error = %failure, "could not be paused; it runs on");
                            all.failed.push((id, failure));
                        }
                    }
                }
            }
            drop(pauses);
            match progress {
                true => got_on = Instant::now(),
                false => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Ends all there are, paused ones included.
    pub(crate) async fn destroy_all(self: &Arc<Self>) -> Result<Everything, Failure> {
        let rows = self.store.living_sandboxes().await?;
        let ends: Vec<_> = futures::stream::iter(rows)
            .map(|row| async move { (row.id, self.destroy(row.team, row.id).await) })
            .buffer_unordered(ENDS_AT_ONCE)
            .collect()
            .await;
        let mut all = Everything::default();
        for (id, end) in ends {
            match end {
                Ok(Destroyed::Now | Destroyed::Already) => all.done.push(id),
                Err(failure) => all.failed.push((id, failure)),
            }
        }
        Ok(all)
    }
}

/// The moment a host names, where it names one.
pub(crate) fn since(unix_ms: i64) -> Option<Timestamp> {
    (unix_ms != 0).then(|| Timestamp::from_unix_ms(unix_ms))
}
