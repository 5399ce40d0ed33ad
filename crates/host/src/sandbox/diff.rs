//! Comparing a sandbox with a checkpoint of it or with another sandbox.
//!
//! One that runs is asked through its guest agent while it goes on. What is paused or a
//! checkpoint is restored in a machine of its own, which nobody has: its network is closed, its
//! users' programs stay frozen, for the restore hook that would thaw them is never called, and
//! it is given back when its agent has been asked.
//!
//! ```text
//!   hold or pin ──▶ restore ──▶ list both, read where in doubt ──▶ give back ──▶ let go
//! ```
//!
//! Its pin and its machine are nobody's in any journal: if this agent dies, the next drops them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wrenn_snapshot::{Snapshot, SnapshotId};
use wrenn_types::{SandboxId, SandboxState};

use super::death::{End, console_of, death};
use super::handle::{Handle, Live};
use super::owner::Common;
use super::{Manager, NetworkRules, SandboxError};
use crate::activity::{InUse, unix_ms};
use crate::capacity;
use crate::diff::{Asked, Diff, GuestTree, compare};
use crate::guest::{Guest, lists_nothing};
use crate::machine::{BOOT_PATIENCE, LiveMachine, MachineError, Phases, new_restore_id};

/// Comparisons under way at once; others wait. Each may have two machines.
const AT_ONCE: usize = 2;
/// How long listing and reading may take, on the reference machine.
const COMPARE_WITHIN: Duration = Duration::from_secs(60);
/// How far guests' clocks may be off, and the kernel's tick with them.
const CLOCKS_DIFFER_BY: Duration = Duration::from_secs(5);

/// With what a sandbox is compared.
#[derive(Debug, Clone, Copy)]
pub enum Against {
    /// A kept snapshot of it.
    Checkpoint(SnapshotId),
    /// Another sandbox.
    Sandbox(SandboxId),
}

/// What comparisons share.
pub struct Diffs {
    turns: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Default for Diffs {
    fn default() -> Self {
        Diffs {
            turns: Semaphore::new(AT_ONCE),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }
}

impl Manager {
    /// What is in `id` and not in the other, and the other way round, at and below `path`.
    pub async fn diff(
        &self,
        id: SandboxId,
        against: Against,
        path: String,
        limit: usize,
    ) -> Result<(Diff, Phases), SandboxError> {
        let now = self.get(id)?;
        let other = match against {
            Against::Checkpoint(snapshot) => Other::Checkpoint(snapshot),
            Against::Sandbox(other) => Other::Sandbox(self.get(other)?),
        };
        let restored = [Some(&now), other.handle()].into_iter().flatten();
        let mut restored: Vec<_> = restored
            .filter(|handle| handle.view().state == SandboxState::Paused)
            .collect();
        if other.handle().is_none() {
            restored.push(&now);
        }
        for handle in restored {
            self.admit()?;
            if let Some(about) = handle.view().about {
                self.make_room(about.shape).await;
            }
        }
        let diffs = &self.common.diffs;
        let job = Job {
            common: self.common.clone(),
            owner: format!("diff-{}", new_restore_id()?),
            now,
            other,
        };
        let stop = diffs.stop.clone();
        // To the end, also when whoever asked hangs up: there may be machines to give back.
        let work = diffs.tasks.spawn(async move {
            let _turn = tokio::select! {
                turn = job.common.diffs.turns.acquire() => turn,
                () = stop.cancelled() => return Err(SandboxError::Ending),
            };
            job.run(path, limit).await
        });
        work.await
            .unwrap_or_else(|join| Err(SandboxError::Broken(join.to_string())))
    }

    /// Ends comparisons that are under way and begins no more.
    pub async fn end_diffs(&self) {
        let Diffs { tasks, stop, .. } = &self.common.diffs;
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}

/// With what, found.
enum Other {
    Checkpoint(SnapshotId),
    Sandbox(Arc<Handle>),
}

impl Other {
    fn handle(&self) -> Option<&Arc<Handle>> {
        match self {
            Other::Checkpoint(_) => None,
            Other::Sandbox(handle) => Some(handle),
        }
    }
}

/// One of the two, as it can be asked.
enum Side {
    /// A sandbox that runs; this is a use of it.
    Running {
        handle: Arc<Handle>,
        live: Arc<Live>,
        _in_use: InUse,
    },
    /// A machine for this only.
    Restored(Box<LiveMachine>),
}

impl Side {
    fn guest(&self) -> Guest {
        match self {
            Side::Running { live, .. } => live.guest.clone(),
            Side::Restored(machine) => machine.guest.clone(),
        }
    }
}

/// A comparison.
struct Job {
    common: Arc<Common>,
    /// Who pins what is restored.
    owner: String,
    now: Arc<Handle>,
    other: Other,
}

impl Job {
    async fn run(&self, path: String, limit: usize) -> Result<(Diff, Phases), SandboxError> {
        let mut phases = Phases::default();
        let mut pinned = Vec::new();
        let now = self.side(&self.now, &mut pinned, &mut phases).await;
        let before = match (&now, &self.other) {
            (Err(_), _) => None,
            (Ok(_), Other::Sandbox(handle)) => {
                Some(self.side(handle, &mut pinned, &mut phases).await)
            }
            (Ok(_), Other::Checkpoint(id)) => {
                Some(self.checkpoint(*id, &mut pinned, &mut phases).await)
            }
        };
        let compared = match (&now, &before) {
            (Ok(now), Some(Ok(before))) => {
                let mut clock = Instant::now();
                let compared = self.compare(now, before, path, limit).await;
                phases.note("compare", &mut clock);
                compared.map(Some)
            }
            _ => Ok(None),
        };
        let mut failed = None;
        for side in [Some(now), before].into_iter().flatten() {
            match side {
                Ok(Side::Restored(machine)) => machine.give_back(&self.common.site).await,
                Ok(Side::Running { .. }) => {}
                Err(error) => failed = Some(error),
            }
        }
        for snapshot in pinned {
            self.common.snapshots.let_go(snapshot, &self.owner).await;
        }
        match (compared?, failed) {
            (Some(diff), None) => Ok((diff, phases)),
            (_, Some(error)) => Err(error),
            // One of the two failed, or there was nothing to compare.
            (None, None) => Err(SandboxError::Broken("nothing was compared".to_owned())),
        }
    }

    /// A sandbox as it is.
    async fn side(
        &self,
        handle: &Arc<Handle>,
        pinned: &mut Vec<SnapshotId>,
        phases: &mut Phases,
    ) -> Result<Side, SandboxError> {
        match handle.hold(self.owner.clone()).await? {
            None => {
                let (live, in_use) = handle.in_use().await?;
                Ok(Side::Running {
                    handle: handle.clone(),
                    live,
                    _in_use: in_use,
                })
            }
            Some(snapshot) => {
                pinned.push(snapshot);
                self.restored(snapshot, phases).await
            }
        }
    }

    /// The first sandbox as it was then.
    async fn checkpoint(
        &self,
        id: SnapshotId,
        pinned: &mut Vec<SnapshotId>,
        phases: &mut Phases,
    ) -> Result<Side, SandboxError> {
        self.common.own_snapshot(self.now.id, id).await?;
        self.common.snapshots.pin(id, &self.owner).await?;
        pinned.push(id);
        self.restored(id, phases).await
    }

    /// A machine from this snapshot that runs and does nothing but answer.
    async fn restored(
        &self,
        snapshot: SnapshotId,
        phases: &mut Phases,
    ) -> Result<Side, SandboxError> {
        let common = &self.common;
        if common.drain.since().is_some() {
            return Err(SandboxError::Draining);
        }
        let config = &common.site.config;
        let origin = common.origin(snapshot, 1, false).await?;
        let shape = origin.template.manifest.shape;
        capacity::admit(shape, config.expected_use_percent, &config.data_dir)?;
        let (machine, _) = common.bring_up(&origin, phases).await?;
        let mut clock = Instant::now();
        match run_closed(&machine).await {
            Ok(()) => {
                phases.note("resume", &mut clock);
                Ok(Side::Restored(Box::new(machine)))
            }
            Err(error) => {
                machine.give_back(&common.site).await;
                Err(error)
            }
        }
    }

    async fn compare(
        &self,
        now: &Side,
        before: &Side,
        path: String,
        limit: usize,
    ) -> Result<Diff, SandboxError> {
        let info = self.common.site.vmm.info();
        // One that boots takes its time to answer at all.
        let patience = info.deadline(BOOT_PATIENCE);
        let within = patience + info.deadline(COMPARE_WITHIN);
        let asked = Asked {
            doubt_from: self.doubt_from().await?,
            two_sandboxes: self.other.handle().is_some(),
            path,
            limit,
        };
        let work = async {
            let (here, there) = (now.guest(), before.guest());
            let (one, other) = tokio::try_join!(
                here.inventory(&asked.path, patience),
                there.inventory(&asked.path, patience),
            )?;
            let tree = |guest, inventory| GuestTree { guest, inventory };
            compare(tree(here, one), tree(there, other), &asked).await
        };
        let compared = tokio::select! {
            compared = tokio::time::timeout(within, work) => compared,
            error = ended(now) => return Err(error),
            error = ended(before) => return Err(error),
            () = self.common.diffs.stop.cancelled() => return Err(SandboxError::Ending),
        };
        match compared {
            Ok(Ok(diff)) => Ok(diff),
            Ok(Err(error)) if lists_nothing(&error) => Err(SandboxError::NotComparable(
                self.now.id,
                "a guest agent of an earlier version cannot list what is in it; only sandboxes of templates made by this version can be compared",
            )),
            Ok(Err(error)) => {
                let moved = moved(now).or_else(|| moved(before));
                Err(moved.unwrap_or_else(|| error.into()))
            }
            Err(_) => Err(SandboxError::Broken(format!(
                "comparing took longer than {within:?}; compare less with a path"
            ))),
        }
    }

    /// From when on times prove nothing: when the two parted, at the latest. What is changed in
    /// one after that is as late as the later of them began to run by itself.
    async fn doubt_from(&self) -> Result<i64, SandboxError> {
        let parted = match &self.other {
            Other::Checkpoint(id) => {
                let snapshot: Arc<Snapshot> = self.common.snapshots.load(*id).await?;
                i64::try_from(snapshot.manifest().description.created_unix_ms).unwrap_or(0)
            }
            Other::Sandbox(other) => {
                let started = |handle: &Handle| handle.view().started_at;
                unix_ms(started(&self.now).max(started(other)))
            }
        };
        let slack = i64::try_from(CLOCKS_DIFFER_BY.as_millis()).unwrap_or(0);
        Ok(parted.saturating_sub(slack).saturating_mul(1_000_000))
    }
}

/// Lets a machine run from which nothing gets out and whose users' programs stand.
async fn run_closed(machine: &LiveMachine) -> Result<(), SandboxError> {
    let nothing = NetworkRules {
        allow_internet: false,
        ..NetworkRules::default()
    };
    let policy = nothing.policy()?;
    let closed = machine.slot.set_policy(&policy).await;
    closed.map_err(MachineError::from)?;
    machine.vm.resume().await.map_err(MachineError::from)?;
    machine.guest.set_token(Some(machine.host_token()));
    Ok(())
}

/// Whether a sandbox that ran was paused or ended meanwhile.
fn moved(side: &Side) -> Option<SandboxError> {
    let Side::Running { handle, .. } = side else {
        return None;
    };
    let state = handle.view().state;
    (state != SandboxState::Running).then_some(SandboxError::NotRunning {
        id: handle.id,
        state,
    })
}

/// Waits for the end of a side's machine, and tells of it.
async fn ended(side: &Side) -> SandboxError {
    match side {
        Side::Running { handle, live, .. } => {
            death(&mut live.vm.exited()).await;
            SandboxError::NotRunning {
                id: handle.id,
                state: SandboxState::Stopping,
            }
        }
        Side::Restored(machine) => {
            let how = death(&mut machine.vm.exited()).await;
            let end = End::by_itself(how.as_ref(), &console_of(machine));
            let how = end.reason.unwrap_or_default();
            SandboxError::Broken(format!("what it is compared with died: {how}"))
        }
    }
}
