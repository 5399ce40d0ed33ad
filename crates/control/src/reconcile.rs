//! Makes the rows say what is true. The host knows what runs, the database what should.
//!
//! Takes no input and may run at any time: at the start, where the process before may have died in the
//! middle of anything, and then every few seconds, to learn what the host did by itself.

use std::time::{Duration, Instant};

use wrenn_store::Timestamp;
use wrenn_types::SandboxState;

use crate::app::{App, EVENTS_KEEP_SECS, Failure};
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
            // What is saved needs no host that runs it (G4).
            S::Paused => Verdict::Keep,
            // It was saved before, and is so still.
            S::Resuming => Verdict::Become(
                S::Paused,
                Some("it was not resumed: the server was ended meanwhile".to_owned()),
            ),
            S::Stopping => Verdict::Become(S::Stopped, None),
            S::Pending | S::Starting => Verdict::Become(
                S::Error,
                Some(
                    "it was not started: the server was ended, or its database failed, meanwhile"
                        .to_owned(),
                ),
            ),
            S::Running | S::Pausing | S::Snapshotting | S::Missing => {
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

/// What a row becomes when its host has been away for long; `None`: it stays. Whatever it is
/// meanwhile, the first round after the host's return finds out.
pub(crate) fn while_away(row: SandboxState, busy: bool) -> Option<(SandboxState, &'static str)> {
    use SandboxState as S;
    match row {
        S::Running => Some((S::Missing, "its host does not answer")),
        _ if busy => None,
        // It ran when whoever was at work died.
        S::Pausing | S::Snapshotting => Some((S::Missing, "its host does not answer")),
        // It is saved at any rate (G4).
        S::Resuming => Some((S::Paused, "its host does not answer")),
        S::Pending | S::Starting | S::Stopping => None,
        S::Paused | S::Missing | S::Stopped | S::Error => None,
    }
}

/// How often to look for snapshots that the host keeps and nobody knows. They come about when
/// this server dies, so the first round looks, and then there is no hurry.
const STRAYS_EVERY: Duration = Duration::from_secs(60);

/// Remembers between rounds since when the host has been away.
#[derive(Default)]
pub(crate) struct Reconciler {
    away_since: Option<Instant>,
    strays_at: Option<Instant>,
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
                    for row in &rows {
                        let busy = app.busy.is_claimed(row.id);
                        if let Some((state, why)) = while_away(row.state, busy) {
                            app.settle(row, state, Some(why.to_owned()), None).await?;
                        }
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
        let keep_from = Timestamp::now().plus_secs(-EVENTS_KEEP_SECS);
        app.store.expire_events(keep_from).await?;
        let strays = self
            .strays_at
            .is_none_or(|last| last.elapsed() >= STRAYS_EVERY);
        if app.tidy_snapshots(strays).await? && strays {
            self.strays_at = Some(Instant::now());
        }
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
    fn g4_what_was_to_be_resumed_is_paused_where_nothing_runs() {
        let paused = |verdict| matches!(verdict, Verdict::Become(SandboxState::Paused, _));
        assert!(paused(judge(SandboxState::Resuming, false, None)));
        let kept = host(SandboxState::Paused);
        assert!(paused(judge(SandboxState::Resuming, false, Some(&kept))));
        assert!(paused(judge(SandboxState::Pausing, false, Some(&kept))));
        assert!(paused(judge(SandboxState::Missing, false, Some(&kept))));
        for row in SandboxState::ALL {
            let away = while_away(*row, false).map(|(state, _)| state);
            assert!(!away.is_some_and(SandboxState::is_final), "{row}");
        }
        assert_eq!(while_away(SandboxState::Paused, false), None);
        let resuming = while_away(SandboxState::Resuming, false);
        assert_eq!(resuming.unwrap().0, SandboxState::Paused);
        assert_eq!(while_away(SandboxState::Resuming, true), None);
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
