//! `POST /snapshot/prepare`: the guest made ready for a freeze, `POST /snapshot/undo` for when
//! the freeze did not come or the machine lives on after it, and `POST /snapshot/rehearse` so
//! that the first is quick.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::OwnedRwLockWriteGuard;
use tokio::time::timeout;

use super::Host;
use super::guest::{self, Told};
use super::timestamp::{NoTimestamp, Timestamp};
use crate::cgroups::CgroupError;

/// How long programs that are just being started may take.
const GATE_LIMIT: Duration = Duration::from_secs(5);
/// How long writing everything to disk may take.
const SYNC_LIMIT: Duration = Duration::from_secs(20);

/// Options of a prepare.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Query {
    /// Give the page cache back, so that it is not part of the snapshot.
    drop_caches: bool,
}

/// What [`Host::undo`] may be told.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Undo {
    timestamp: Option<Timestamp>,
}

/// Why the host's time was not understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum Untold {
    #[error("the body is not what /snapshot/undo takes: {0}")]
    Body(#[from] serde_json::Error),
    #[error(transparent)]
    Timestamp(#[from] NoTimestamp),
}

/// The time in the body of an undo that was received at `at`; it may have none.
pub(super) fn told(body: &[u8], at: Instant) -> Result<Option<Told>, Untold> {
    let body = match body.is_empty() {
        true => Undo::default(),
        false => serde_json::from_slice(body)?,
    };
    let time = body.timestamp.as_ref().map(Timestamp::nanos).transpose()?;
    Ok(time.map(|time| Told { time, at }))
}

/// The guest stands; nothing is started while this lives.
#[derive(Debug)]
pub(super) struct Freeze {
    _gate: OwnedRwLockWriteGuard<()>,
}

impl Freeze {
    pub(super) fn new(gate: OwnedRwLockWriteGuard<()>) -> Freeze {
        Freeze { _gate: gate }
    }
}

/// Why the guest was not made ready; it goes on as before.
#[derive(Debug, thiserror::Error)]
pub(super) enum SnapshotError {
    #[error("a program that is being started did not come to an end within {GATE_LIMIT:?}")]
    Busy,
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("the file systems were not written within {SYNC_LIMIT:?}")]
    Sync,
    #[error("quiescing broke: {0}")]
    Broken(#[from] tokio::task::JoinError),
    #[error("cannot drop the page cache: {0}")]
    Caches(#[source] std::io::Error),
}

impl Host {
    /// Quiesces the guest. Again while it is quiesced is harmless.
    ///
    /// A rehearsal does what costs a prepare most and changes nothing: file systems are written
    /// and unused heap is given back. A monitor that emulates translates that code now, and not
    /// while somebody waits for a freeze; so it is one and the same code.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        query: &Query,
        rehearsal: bool,
    ) -> Result<(), SnapshotError> {
        let mut life = self.life.lock().await;
        if life.freeze.is_some() {
            return Ok(());
        }
        // First, for it may be half done when we crash.
        self.remember(&life, !rehearsal);
        if rehearsal {
            return self.write_back(false).await;
        }
        match self.quiesce(query).await {
            Ok(freeze) => {
                life.freeze = Some(freeze);
                Ok(())
            }
            Err(error) => {
                self.go_on().await?;
                self.remember(&life, false);
                Err(error)
            }
        }
    }

    /// The freeze did not come, or the machine lives on after it: everything goes on. Again is
    /// harmless.
    pub(super) async fn undo(self: &Arc<Self>, told: Option<Told>) -> Result<(), SnapshotError> {
        let mut life = self.life.lock().await;
        if life.freeze.is_some() {
            if let Some(told) = told
                && self.state.settings.in_vm
                && let Err(error) = guest::catch_up(told)
            {
                // No reason to stand still, and the next time the host tells may be taken.
                tracing::error!(%error, "the clock is late by as long as the machine stood");
            }
            self.go_on().await?;
            life.freeze = None;
            self.remember(&life, false);
        }
        Ok(())
    }

    async fn go_on(&self) -> Result<(), SnapshotError> {
        self.connections.undo();
        self.ports.start().await;
        self.state.cgroups.thaw()?;
        Ok(())
    }

    async fn quiesce(&self, query: &Query) -> Result<Freeze, SnapshotError> {
        self.ports.stop().await;
        self.connections.prepare();
        // Whoever is half-way into starting a program finishes first: a child that enters a
        // frozen group before its exec would hold one of our threads.
        let gate = timeout(GATE_LIMIT, self.state.close_gate())
            .await
            .map_err(|_| SnapshotError::Busy)?;
        self.write_back(true).await?;
        if query.drop_caches && self.state.settings.in_vm {
            tokio::task::spawn_blocking(|| std::fs::write("/proc/sys/vm/drop_caches", "3"))
                .await?
                .map_err(SnapshotError::Caches)?;
        }
        Ok(Freeze::new(gate))
    }

    /// Everything on disk, and no memory held that is not used; before that users' programs are
    /// frozen, if they shall be.
    async fn write_back(&self, freeze: bool) -> Result<(), SnapshotError> {
        let (state, in_vm) = (Arc::clone(&self.state), self.state.settings.in_vm);
        // In one go: the second of two such tasks may be given a new thread although the first
        // thread takes it on, and the new one would begin its life after the restore, in
        // somebody's way.
        let (stands, when_it_stands) = tokio::sync::oneshot::channel();
        let work = tokio::task::spawn_blocking(move || {
            if freeze {
                state.cgroups.freeze()?;
            }
            // Nobody listens where this was given up.
            let _ = stands.send(());
            if in_vm {
                rustix::fs::sync();
            }
            Ok::<(), CgroupError>(())
        });
        // Freezing has a limit of its own, and is never given up before it has begun: it would
        // come after the thaw. What it failed with is told below.
        let _ = when_it_stands.await;
        let done = timeout(SYNC_LIMIT, work).await;
        done.map_err(|_| SnapshotError::Sync)???;
        crate::sys::trim_heap();
        Ok(())
    }
}
