//! Everybody's end of a sandbox: what can be seen of it, asked of its owner, and reached.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use wrenn_net::{Denial, GuestDialer};
use wrenn_snapshot::SnapshotId;
use wrenn_types::{AccessToken, SandboxId, SandboxState, Shape};
use wrenn_vmm::Machine;

use super::journal::Journal;
use super::{Bond, NetworkRules, SandboxError};
use crate::activity::{Activity, InUse};
use crate::events::Actor;
use crate::guest::{Guest, Restored};
use crate::lifetime::Lifetime;
use crate::machine::{LiveMachine, Phases, Record, name_of};
use crate::metrics::Series;
use crate::snapshots::Scope;

/// How long a request waits for a sandbox that is being saved or restored.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// What can be seen of a sandbox.
#[derive(Debug, Clone)]
pub struct View {
    /// Where it is in its life.
    pub state: SandboxState,
    /// Why, when that is not by request.
    pub reason: Option<String>,
    /// The class of that reason, when its machine died.
    pub died: Option<&'static str>,
    /// How long it may live.
    pub lifetime: Lifetime,
    /// When it was given to its user.
    pub started_at: SystemTime,
    /// What it is; `None` until it has started.
    pub about: Option<Arc<About>>,
}

/// What a sandbox is, whether it runs or is paused.
#[derive(Debug, Clone)]
pub struct About {
    /// Digest of the template that its memory lies on.
    pub template_digest: String,
    /// Processors and memory.
    pub shape: Shape,
    /// Size of its disk in MiB.
    pub disk_mib: u64,
    /// The guest agent's version as E2B's clients read it.
    pub envd_version: String,
    /// How often its line of memory was restored.
    pub generation: u64,
    /// The token its guest agent demands of everybody but the host.
    pub token: Option<AccessToken>,
    /// When its time is over it is paused, not ended.
    pub pause_at_end: bool,
    /// Only its disk is kept then.
    pub pause_disk_only: bool,
    /// While it is paused, traffic to its ports resumes it.
    pub auto_resume: bool,
    /// The snapshot it is paused as.
    pub snapshot: Option<SnapshotId>,
    /// Variables of every process in it.
    pub envs: BTreeMap<String, String>,
    /// What it may reach.
    pub network: NetworkRules,
}

impl About {
    /// What a machine with this record and journal is.
    pub(super) fn running(record: &Record, journal: &Journal) -> About {
        About {
            template_digest: record.template_digest.clone(),
            shape: record.shape,
            disk_mib: record.disk_mib,
            envd_version: record.envd_version.clone(),
            generation: record.generation,
            token: journal.token(),
            pause_at_end: journal.pause_at_end,
            pause_disk_only: journal.pause_disk_only,
            auto_resume: journal.auto_resume,
            snapshot: None,
            envs: journal.envs.clone(),
            network: journal.network.clone(),
        }
    }
}

/// What was done to a machine before its sandbox ran.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// How often its line of memory was restored.
    pub generation: u64,
    /// What the guest says its hook did.
    pub restored: Restored,
    /// Where the host's time went.
    pub phases: Phases,
    /// It was booted: there was no memory to restore.
    pub booted: bool,
    /// It is as the sandbox once was, not as it was when it last ran.
    pub rolled_back: bool,
}

impl Certificate {
    /// Whether programs of the machine before go on in this one.
    pub fn goes_on(&self) -> bool {
        !self.booted && !self.rolled_back
    }
}

/// A request's answer.
pub(super) type Answer<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What can be asked of the owner. Answers come in the order of the questions.
pub(super) enum Request {
    Destroy(Answer<()>),
    SetLifetime(Lifetime, Answer<()>),
    Pause(Scope, Answer<PauseDone>),
    Resume(Resume, Answer<Resumed>),
    Save(Order, Answer<Kept>),
    Rollback(SnapshotId, Answer<Resumed>),
    Hold(String, Answer<Option<SnapshotId>>),
    Network(NetworkChange),
}

/// What can be asked about the network of a sandbox.
pub(super) enum NetworkChange {
    Set(NetworkRules, Answer<()>),
    Denials(Answer<Vec<Denial>>),
}

/// How a paused sandbox is to run again.
#[derive(Debug, Clone, Copy)]
pub struct Resume {
    /// How long it may live from now on, if not as long as it might.
    pub lifetime: Option<Lifetime>,
    /// On whose account.
    pub actor: Actor,
    /// It is booted from its disk, and what memory it has is dropped.
    pub boot: bool,
    /// From now on it is paused when its time is over; else that stays as it was.
    pub pause_at_end: bool,
    /// What it is paused as is not what it was when it last ran.
    pub rolled_back: bool,
}

impl Resume {
    /// As it was, on somebody's account.
    pub fn by(actor: Actor) -> Resume {
        Resume {
            lifetime: None,
            actor,
            boot: false,
            pause_at_end: false,
            rolled_back: false,
        }
    }
}

/// A snapshot to be taken.
#[derive(Debug, Clone)]
pub struct Order {
    /// What it is called.
    pub name: String,
    /// What of the sandbox; of a paused one, what there is.
    pub scope: Scope,
    /// Who pins it, besides the sandbox.
    pub owners: Vec<String>,
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Which.
    pub snapshot: SnapshotId,
    /// Where the time went.
    pub phases: Phases,
}

/// What came of a pause.
#[derive(Debug, Clone)]
pub struct PauseDone {
    /// Whether it ran until now.
    pub now: bool,
    /// Where the time went.
    pub phases: Phases,
}

/// What came of a resume or a rollback.
#[derive(Debug, Clone)]
pub struct Resumed {
    /// Whether it was restored for this request.
    pub now: bool,
    /// How it was, the last time it was.
    pub certificate: Certificate,
}

/// What a running sandbox is reached by.
pub struct Live {
    /// Its guest agent.
    pub guest: Guest,
    /// Its ports.
    pub dialer: GuestDialer,
    /// Its VM.
    pub vm: Arc<dyn Machine>,
    /// Its network slot's number.
    pub slot: u32,
    /// The name of its control group.
    pub group: String,
    /// How it came to run; without phases for an adopted one.
    pub certificate: Certificate,
}

impl Live {
    pub(super) fn of(machine: &LiveMachine, certificate: Certificate) -> Live {
        Live {
            guest: machine.guest.clone(),
            dialer: machine.slot.guest(),
            vm: machine.vm.clone(),
            slot: machine.record.slot,
            group: name_of(&machine.folder),
            certificate,
        }
    }
}

/// A machine's way in, for as long as it has one: an ended sandbox is remembered for its
/// reason, and must hold no connection or descriptor of what is gone.
pub(super) type SharedLive = Arc<RwLock<Option<Arc<Live>>>>;

pub(super) fn set_live(shared: &SharedLive, live: Option<Live>) {
    // A pointer is replaced; that is whole or not done.
    *shared.write().unwrap_or_else(PoisonError::into_inner) = live.map(Arc::new);
}

/// The last program that was started in a sandbox through this agent.
#[derive(Default)]
pub struct LastCommand(RwLock<String>);

impl LastCommand {
    /// So much of it is kept, in characters.
    const LENGTH: usize = 200;

    /// This one is started now.
    pub fn set<'a>(&self, words: impl Iterator<Item = &'a str>) {
        let mut line = String::new();
        for word in words {
            if !line.is_empty() {
                line.push(' ');
            }
            line.extend(word.chars().take(Self::LENGTH));
            if line.chars().count() > Self::LENGTH {
                line = line.chars().take(Self::LENGTH - 1).collect();
                line.push('…');
                break;
            }
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = line;
    }

    /// Empty when there was none.
    pub fn get(&self) -> String {
        let line = self.0.read().unwrap_or_else(PoisonError::into_inner);
        line.clone()
    }
}

/// Everybody's end of a sandbox.
pub struct Handle {
    /// Which sandbox.
    pub id: SandboxId,
    /// Name of its template as it was asked for.
    pub template: String,
    /// Its use.
    pub activity: Arc<Activity>,
    /// How busy it was.
    pub metrics: Arc<Series>,
    /// What was last started in it.
    pub last_command: Arc<LastCommand>,
    pub(super) view: watch::Receiver<View>,
    pub(super) live: SharedLive,
    pub(super) requests: mpsc::Sender<Request>,
}

impl Handle {
    /// What can be seen of it now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until it has left `Starting`.
    pub async fn started(&self) -> View {
        let mut view = self.view.clone();
        let seen = view
            .wait_for(|view| view.state != SandboxState::Starting)
            .await;
        // An owner that is gone has said its last.
        seen.map_or_else(|_| self.view(), |view| view.clone())
    }

    /// Its machine, while it has one.
    pub fn live(&self) -> Option<Arc<Live>> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.clone()
    }

    /// Its machine, when it is running. One that is being saved or restored is waited for a
    /// while.
    pub async fn running(&self) -> Result<Arc<Live>, SandboxError> {
        use SandboxState::{Pausing, Resuming, Snapshotting};
        let mut view = self.view.clone();
        let settled =
            view.wait_for(|view| !matches!(view.state, Pausing | Resuming | Snapshotting));
        // Whatever came of waiting, what holds now counts.
        drop(tokio::time::timeout(FREEZE_PATIENCE, settled).await);
        let state = self.view.borrow().state;
        match self.live() {
            Some(live) if state == SandboxState::Running => Ok(live),
            _ => Err(SandboxError::NotRunning { id: self.id, state }),
        }
    }

    /// Its machine when it is running, in use until the guard is dropped.
    pub async fn in_use(&self) -> Result<(Arc<Live>, InUse), SandboxError> {
        let in_use = self.activity.begin();
        Ok((self.running().await?, in_use))
    }

    /// Tells when this machine is its machine no more.
    pub fn bond(&self, live: &Arc<Live>) -> Bond {
        Bond {
            id: self.id,
            view: self.view.clone(),
            shared: self.live.clone(),
            machine: Arc::downgrade(live),
        }
    }

    /// Whether it is paused and traffic to its ports resumes it.
    pub fn wakes(&self) -> bool {
        let view = self.view.borrow();
        view.state == SandboxState::Paused && view.about.as_ref().is_some_and(|a| a.auto_resume)
    }

    /// Ends it and gives everything back.
    pub async fn destroy(&self) -> Result<(), SandboxError> {
        self.ask(Request::Destroy).await
    }

    /// Sets how long it may live.
    pub async fn set_lifetime(&self, lifetime: Lifetime) -> Result<(), SandboxError> {
        self.ask(|answer| Request::SetLifetime(lifetime, answer))
            .await
    }

    /// Saves it and gives its machine back; if that fails, it runs on.
    pub async fn pause(&self, scope: Scope) -> Result<PauseDone, SandboxError> {
        self.ask(|answer| Request::Pause(scope, answer)).await
    }

    /// Has it run again when it is paused.
    pub async fn resume(&self, resume: Resume) -> Result<Resumed, SandboxError> {
        self.ask(|answer| Request::Resume(resume, answer)).await
    }

    /// Takes a snapshot of it, running or paused, and leaves it as it is.
    pub async fn save(&self, order: Order) -> Result<Kept, SandboxError> {
        self.ask(|answer| Request::Save(order, answer)).await
    }

    /// Puts it back to a snapshot of itself.
    pub async fn roll_back(&self, snapshot: SnapshotId) -> Result<Resumed, SandboxError> {
        self.ask(|answer| Request::Rollback(snapshot, answer)).await
    }

    /// The snapshot it is paused as, pinned for `owner`; `None` when it has a machine.
    pub(super) async fn hold(&self, owner: String) -> Result<Option<SnapshotId>, SandboxError> {
        self.ask(|answer| Request::Hold(owner, answer)).await
    }

    pub(super) async fn ask<T>(
        &self,
        request: impl FnOnce(Answer<T>) -> Request,
    ) -> Result<T, SandboxError> {
        let (answer, answered) = oneshot::channel();
        let gone = || SandboxError::NotFound(self.id);
        self.requests
            .send(request(answer))
            .await
            .map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}
