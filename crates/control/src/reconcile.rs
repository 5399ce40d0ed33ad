//! Makes the rows say what is true. The host knows what runs, the database what should.
//!
//! Takes no input and may run at any time: at the start, where the process before may have died in the
//! middle of anything, and then every few seconds, to learn what the host did by itself.

use std::time::{Duration, Instant};

use wrenn_store::Timestamp;
use wrenn_types::SandboxState;

use crate::app::{App, Failure};
use crate::host::HostSandbox;

/// A host that does not answer for this long is away: nobody knows what its sandboxes do.
const AWAY_AFTER: Duration = Duration::from_secs(30);

/// What follows from a row and the host's view of the same sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The row is true, or whoever is at work will make it so.
    Keep,
    /// The row becomes this.
    Become(SandboxState, Option<String>),
    /// It should have ended: ask the host again.
    End,
}

/// Compares a row's state with what its host says (`None`: the host has no such sandbox). `busy`: an operation
/// on it is under way in this process.
pub(crate) fn judge(row: SandboxState, busy: bool, host: Option<&HostSandbox>) -> Verdict {
    use SandboxState as S;
    if row.is_final() || (busy && row.is_transitional()) {
        return Verdict::Keep;
    }
    let Some(host) = host else {
        return match row {
            // What is saved needs no host that runs it.
            S::Paused => Verdict::Keep,
            S::Stopping => Verdict::Become(S::Stopped, None),
            S::Pending | S::Starting => Verdict::Become(
                S::Error,
                Some("the server was ended while this sandbox started".to_owned()),
            ),
            S::Running | S::Pausing | S::Snapshotting | S::Resuming | S::Missing => {
                Verdict::Become(S::Stopped, Some("its host no longer has it".to_owned()))
            }
            S::Stopped | S::Error => Verdict::Keep,
        };
    };
    let reason = || host.reason.clone();
    match host.state {
        S::Stopped | S::Error => Verdict::Become(host.state, reason()),
        _ if row == S::Stopping => Verdict::End,
        state if state == row => Verdict::Keep,
        // The host is at work by itself, such as on its way to an end.
        S::Pending | S::Missing => Verdict::Keep,
        S::Stopping | S::Starting | S::Pausing | S::Snapshotting | S::Resuming => Verdict::Keep,
        state => Verdict::Become(state, reason()),
    }
}

/// Remembers between rounds since when the host has been away.
#[derive(Default)]
pub(crate) struct Reconciler {
    away_since: Option<Instant>,
}

impl Reconciler {
    /// Goes through all rows once.
    pub(crate) async fn round(&mut self, app: &App) -> Result<(), Failure> {
        // Rows first: what is created after this is in the host's list but not here, and what
        // ends after this has another generation by the time it would be changed.
        let rows = app.store.living_sandboxes().await?;
        let mut there = match app.host_sandboxes().await {
            Ok(there) => there,
            Err(e) => {
                let since = *self.away_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= AWAY_AFTER {
                    for row in rows.iter().filter(|r| r.state == SandboxState::Running) {
                        let reason = Some("its host does not answer".to_owned());
                        app.settle(row, SandboxState::Missing, reason, None).await?;
                    }
                }
                return Err(e);
            }
        };
        self.away_since = None;
        for row in rows {
            let live = there.remove(&row.id);
            match judge(row.state, app.busy.is_claimed(row.id), live.as_ref()) {
                Verdict::Keep => {}
                Verdict::Become(state, reason) => {
                    app.settle(&row, state, reason, live.as_ref()).await?;
                }
                Verdict::End => {
                    let Some(_claim) = app.busy.claim(row.id) else {
                        continue;
                    };
                    if let Err(e) = app.take_down(&row).await {
                        tracing::warn!(sandbox = %row.id, error = %e, "could not be ended; will be tried again");
                    }
                }
            }
        }
        for (id, live) in there {
            if live.state.is_final() || app.busy.is_claimed(id) {
                continue;
            }
            match app.store.any_sandbox(id).await? {
                // Ended here while the host still had it.
                Some(row) if row.state.is_final() => {
                    tracing::info!(sandbox = %id, "has ended but its host runs it: ending it there");
                    if let Err(e) = app.end_on_host(id).await {
                        tracing::warn!(sandbox = %id, error = %e, "could not be ended; will be tried again");
                    }
                }
                // Just created.
                Some(_) => {}
                // Not ours to kill: the data folder's database may have been lost.
                None => {
                    tracing::warn!(sandbox = %id, "runs on the host but is in no database; `wrenn gc` ends it")
                }
            }
        }
        app.store.expire_idempotency(Timestamp::now()).await?;
        app.tidy_snapshots().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wrenn_types::{SandboxId, Shape};

    fn host(state: SandboxState) -> HostSandbox {
        HostSandbox {
            id: SandboxId::new(),
            state,
            reason: Some("why".to_owned()),
            shape: Shape::DEFAULT,
            disk_mib: 0,
            started_at: Timestamp::from_unix_ms(0),
            last_active: Timestamp::from_unix_ms(0),
            end_at: None,
            access_token: None,
            envd_version: String::new(),
            network: crate::host::NetworkRules::default(),
        }
    }

    #[test]
    fn g4_a_paused_sandbox_stays_paused_whatever_the_host_lists() {
        assert_eq!(judge(SandboxState::Paused, false, None), Verdict::Keep);
        assert_eq!(judge(SandboxState::Paused, true, None), Verdict::Keep);
    }

    #[test]
    fn g3_no_transitional_state_is_kept_when_nobody_is_at_work() {
        for row in SandboxState::ALL.iter().filter(|s| s.is_transitional()) {
            assert_eq!(
                judge(*row, true, None),
                Verdict::Keep,
                "{row} with somebody at work"
            );
            assert_ne!(
                judge(*row, false, None),
                Verdict::Keep,
                "{row} without a machine"
            );
            let running = host(SandboxState::Running);
            assert_ne!(
                judge(*row, false, Some(&running)),
                Verdict::Keep,
                "{row}, but it runs"
            );
        }
    }

    #[test]
    fn g6_what_the_host_ended_ends_with_its_reason() {
        for end in [SandboxState::Stopped, SandboxState::Error] {
            let verdict = judge(SandboxState::Running, false, Some(&host(end)));
            assert_eq!(verdict, Verdict::Become(end, Some("why".to_owned())));
        }
        assert_eq!(
            judge(
                SandboxState::Running,
                false,
                Some(&host(SandboxState::Running))
            ),
            Verdict::Keep
        );
        let back = judge(
            SandboxState::Missing,
            false,
            Some(&host(SandboxState::Running)),
        );
        assert_eq!(
            back,
            Verdict::Become(SandboxState::Running, Some("why".to_owned()))
        );
        assert_eq!(
            judge(
                SandboxState::Stopping,
                false,
                Some(&host(SandboxState::Running))
            ),
            Verdict::End
        );
    }
}
