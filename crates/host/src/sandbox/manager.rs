//! Finds the owner of a sandbox, or makes it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use tokio::sync::oneshot;
use tracing::Instrument;
use wrenn_snapshot::SnapshotId;
use wrenn_types::{SandboxId, SandboxState, Shape};

use super::death::{End, UNSEEN, found_dead};
use super::handle::{Handle, Order, Resume};
use super::journal::Journal;
use super::owner::{Common, Owner};
use super::paused::Paused;
use super::{DialFailure, NetworkRules, SandboxError};
use crate::capacity;
use crate::events::{Actor, DeathCertificate, Kind};
use crate::guest::chain;
use crate::lifetime::Lifetime;
use crate::machine::{LiveMachine, MachineError, Phases, record_in};
use crate::snapshots::{Saver, Scope, keep_written_layers};

/// So many ended sandboxes are remembered, with their reasons.
const REMEMBERED: usize = 1000;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct CreateSandbox {
    /// Chosen by the control plane; the same id again means the same sandbox (G10).
    pub id: SandboxId,
    /// Name of the template, or what `snapshot` is called.
    pub template: String,
    /// What it starts as, if not as the template.
    pub snapshot: Option<SnapshotId>,
    /// Another shape than the default.
    pub shape: Option<Shape>,
    /// Variables of every process.
    pub envs: BTreeMap<String, String>,
    /// How long it may live.
    pub lifetime: Lifetime,
    /// What it may reach.
    pub network: NetworkRules,
    /// Whether its guest agent demands a token.
    pub secure: bool,
    /// When its time is over it is paused, not ended.
    pub pause_at_end: bool,
    /// Only its disk is kept then.
    pub pause_disk_only: bool,
    /// While it is paused, traffic to its ports resumes it.
    pub auto_resume: bool,
}

/// A snapshot and who needs it.
pub type Pin = (SnapshotId, String);

/// What came of a machine that an earlier agent left.
#[derive(Default)]
pub struct Adopted {
    /// The network slot that is in use.
    pub slot: Option<u32>,
    /// What its sandbox goes on from.
    pub pin: Option<Pin>,
}

/// What came of a fork.
pub struct Forked {
    /// The children, in the order they were asked for.
    pub children: Vec<(SandboxId, Result<Arc<Handle>, SandboxError>)>,
    /// How the parent was saved.
    pub phases: Phases,
}

#[derive(Default)]
struct Registry {
    alive: HashMap<SandboxId, Arc<Handle>>,
    ended: VecDeque<Arc<Handle>>,
    /// Nothing new is started any more.
    closed: bool,
}

impl Registry {
    fn remember(&mut self, ended: Arc<Handle>) {
        self.ended.push_back(ended);
        while self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }
}

/// All sandboxes of this host.
pub struct Manager {
    pub(super) common: Arc<Common>,
    registry: Arc<Mutex<Registry>>,
}

impl Manager {
    /// No sandboxes yet.
    pub fn new(common: Arc<Common>) -> Self {
        Manager {
            common,
            registry: Arc::default(),
        }
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        lock(&self.registry)
    }

    /// Starts a sandbox and waits until it is running. The start goes on when the waiter
    /// goes away.
    pub async fn create(&self, create: CreateSandbox) -> Result<Arc<Handle>, SandboxError> {
        let id = create.id;
        self.make_room(create.shape.unwrap_or(Shape::DEFAULT)).await;
        let begun = self.begin(create)?;
        match begun {
            Begun::There(handle) => {
                let view = handle.started().await;
                match (view.state, view.reason) {
                    (SandboxState::Error, reason) => Err(SandboxError::Failed {
                        id,
                        reason: reason.unwrap_or_default(),
                    }),
                    _ => Ok(handle),
                }
            }
            Begun::New(handle, started) => match started.await {
                Ok(Ok(())) => Ok(handle),
                Ok(Err(error)) => Err(error),
                // The owner's task was cancelled: the agent is ending.
                Err(_) => Err(SandboxError::Ending),
            },
        }
    }

    /// Whether anything is started at all: a host that drains, or whose agent is ending, starts
    /// nothing and wakes nothing that is paused.
    pub fn admit(&self) -> Result<(), SandboxError> {
        self.admit_by(&self.registry())
    }

    fn admit_by(&self, registry: &Registry) -> Result<(), SandboxError> {
        if registry.closed {
            return Err(SandboxError::Ending);
        }
        match self.common.drain.since() {
            Some(_) => Err(SandboxError::Draining),
            None => Ok(()),
        }
    }

    fn begin(&self, create: CreateSandbox) -> Result<Begun, SandboxError> {
        let id = create.id;
        let mut registry = self.registry();
        let there = registry
            .alive
            .get(&id)
            .or_else(|| registry.ended.iter().find(|h| h.id == id));
        if let Some(handle) = there {
            return Ok(Begun::There(handle.clone()));
        }
        self.admit_by(&registry)?;
        let shape = create.shape.unwrap_or(Shape::DEFAULT);
        let config = &self.common.site.config;
        capacity::admit(shape, config.expected_use_percent, &config.data_dir)?;
        let (owner, handle) = Owner::new(
            id,
            &create.template,
            self.common.clone(),
            SandboxState::Starting,
            create.lifetime,
            SystemTime::now(),
        );
        registry.alive.insert(id, handle.clone());
        drop(registry);
        let (started, when_started) = oneshot::channel();
        self.spawn(id, owner.create(create, started));
        Ok(Begun::New(handle, when_started))
    }

    /// Runs an owner; when it is done, its sandbox is among the ended ones.
    fn spawn(&self, id: SandboxId, owner: impl Future<Output = ()> + Send + 'static) {
        let registry = self.registry.clone();
        // Whatever is logged on the way down to the machine names the sandbox.
        let span = tracing::info_span!("owner", sandbox = %id);
        let task = async move {
            owner.await;
            let mut registry = lock(&registry);
            if let Some(handle) = registry.alive.remove(&id) {
                registry.remember(handle);
            }
        };
        tokio::spawn(task.instrument(span));
    }

    /// Takes over a machine of an earlier agent: as a sandbox when it belongs to one.
    /// Whatever is of no use is given back.
    pub async fn adopt(&self, folder: std::path::PathBuf) -> Result<Adopted, MachineError> {
        let site = &self.common.site;
        let journal = Journal::read(&folder);
        let journal = journal.map_err(|source| MachineError::File {
            action: "read the journal in",
            path: folder.clone(),
            source,
        })?;
        let machine = LiveMachine::adopt(site, folder.clone()).await?;
        let twin = journal
            .as_ref()
            .is_some_and(|journal| self.registry().alive.contains_key(&journal.sandbox));
        match (machine, journal) {
            (Some(machine), Some(journal)) if twin => {
                // It was being paused, resumed or rolled back when its agent died.
                tracing::info!(sandbox = %journal.sandbox, "a machine that is not its sandbox's any more is ended");
                machine.give_back(site).await;
                Ok(Adopted::default())
            }
            (Some(machine), Some(journal)) if !journal.handed => {
                // Its agent died before anybody was told of it.
                tracing::info!(sandbox = %journal.sandbox, "a machine that was not a sandbox yet is ended");
                machine.give_back(site).await;
                Ok(Adopted::default())
            }
            (Some(machine), Some(mut journal)) => {
                keep_written_layers(&machine, &mut journal);
                let slot = machine.record.slot;
                let id = journal.sandbox;
                let pin = journal.line.parent.map(|parent| (parent, id.to_string()));
                // Nothing changes unless an agent died while it changed this.
                let policy = journal.network.policy();
                let policy = policy.map_err(|error| MachineError::File {
                    action: "read the network rules in",
                    path: folder.clone(),
                    source: std::io::Error::other(error),
                })?;
                machine.slot.set_policy(&policy).await?;
                let (owner, handle) = Owner::new(
                    id,
                    &journal.template,
                    self.common.clone(),
                    SandboxState::Starting,
                    journal.lifetime,
                    journal.started_at,
                );
                self.registry().alive.insert(id, handle);
                tracing::info!(sandbox = %id, slot, "adopted");
                self.spawn(id, owner.adopt(machine, journal));
                Ok(Adopted {
                    slot: Some(slot),
                    pin,
                })
            }
            (Some(machine), None) => {
                tracing::info!(folder = %folder.display(), "a machine that belongs to nobody is ended");
                machine.give_back(site).await;
                Ok(Adopted::default())
            }
            (None, Some(journal)) if !twin && journal.handed && record_in(&folder).is_none() => {
                // Its disk is there, and what it lies on is not known: nothing is thrown away.
                let source = std::io::Error::other("its record is missing or empty");
                Err(MachineError::File {
                    action: "take over the dead machine in",
                    path: folder,
                    source,
                })
            }
            (None, journal) => {
                let pin = match journal.filter(|journal| !twin && journal.handed) {
                    Some(journal) => self.found_dead(&folder, &journal).await,
                    None => None,
                };
                crate::machine::remove_folder(&folder).await?;
                Ok(Adopted { slot: None, pin })
            }
        }
    }

    /// A sandbox's machine has died while no agent was there. If that was with all around it,
    /// as when the host lost its power, its disk is kept and the sandbox paused.
    async fn found_dead(&self, folder: &Path, journal: &Journal) -> Option<Pin> {
        let (end, certificate) = found_dead(folder, journal);
        let end_at = journal.lifetime.end_at;
        let wanted = end_at.is_none_or(|end| end > SystemTime::now());
        if end.cause == UNSEEN && (wanted || journal.pause_at_end) {
            match self.keep_disk(folder, journal, &end).await {
                Ok(paused) => {
                    let pin = (paused.snapshot, journal.sandbox.to_string());
                    let (events, reason) = (&self.common.events, paused.reason.clone());
                    events.add(journal.sandbox, Kind::Paused, Actor::Host, reason, None);
                    self.adopt_paused(paused);
                    return Some(pin);
                }
                Err(error) => {
                    tracing::error!(sandbox = %journal.sandbox, error = %chain(&error), "the disk of a lost machine could not be kept");
                }
            }
        }
        self.bury(journal, &end, certificate);
        None
    }

    async fn keep_disk(
        &self,
        folder: &Path,
        journal: &Journal,
        end: &End,
    ) -> Result<Paused, SandboxError> {
        let id = journal.sandbox;
        let unknown = || SandboxError::Broken("its record cannot be read".to_owned());
        let record = record_in(folder).ok_or_else(unknown)?;
        let Common {
            site,
            templates,
            snapshots,
            ..
        } = &*self.common;
        let saver = Saver {
            site,
            snapshots,
            template: templates.of_snapshot(&record.template_digest).await?,
        };
        let snapshot = saver.save_left_disk(folder, &record, journal).await?;
        let how = end.reason.as_deref().unwrap_or_default();
        let reason = format!("its disk is kept and boots when it is resumed: {how}");
        let paused = Paused::of(&record, journal, snapshot, Some(reason));
        let written = paused.write(&site.config.paused_dir());
        written.map_err(|source| SandboxError::Journal { id, source })?;
        tracing::warn!(sandbox = %id, "its machine is lost; its disk is kept");
        Ok(paused)
    }

    /// Remembers a sandbox whose machine died while no agent was there, with the reason.
    fn bury(&self, journal: &Journal, end: &End, certificate: DeathCertificate) {
        let (owner, handle) = Owner::new(
            journal.sandbox,
            &journal.template,
            self.common.clone(),
            end.state,
            journal.lifetime,
            journal.started_at,
        );
        owner.over(end, certificate);
        self.registry().remember(handle);
    }

    /// Takes over what an earlier agent paused.
    pub fn adopt_paused(&self, paused: Paused) {
        let journal = &paused.journal;
        let id = journal.sandbox;
        let (owner, handle) = Owner::new(
            id,
            &journal.template,
            self.common.clone(),
            SandboxState::Paused,
            journal.lifetime,
            journal.started_at,
        );
        self.registry().alive.insert(id, handle);
        self.spawn(id, owner.adopt_paused(paused));
    }

    /// Starts new sandboxes as `id` is now, running or paused; it goes on.
    pub async fn fork(
        &self,
        id: SandboxId,
        children: &[SandboxId],
        lifetime: Lifetime,
    ) -> Result<Forked, SandboxError> {
        let parent = self.get(id)?;
        // Before the parent is held up for nothing.
        self.admit()?;
        let order = Order {
            name: String::new(),
            scope: Scope::Machine,
            owners: children.iter().map(SandboxId::to_string).collect(),
        };
        let kept = parent.save(order).await?;
        let about = parent.view().about.ok_or(SandboxError::NotFound(id))?;
        let births = children.iter().map(|child| {
            let create = CreateSandbox {
                id: *child,
                template: parent.template.clone(),
                snapshot: Some(kept.snapshot),
                shape: Some(about.shape),
                envs: about.envs.clone(),
                lifetime,
                network: about.network.clone(),
                secure: about.token.is_some(),
                pause_at_end: about.pause_at_end,
                pause_disk_only: about.pause_disk_only,
                auto_resume: about.auto_resume,
            };
            async move {
                let born = self.create(create).await;
                if born.is_err() {
                    let owner = child.to_string();
                    self.common.snapshots.let_go(kept.snapshot, &owner).await;
                }
                (*child, born)
            }
        });
        Ok(Forked {
            children: futures::future::join_all(births).await,
            phases: kept.phases,
        })
    }

    /// The sandbox of this id, alive or remembered.
    pub fn get(&self, id: SandboxId) -> Result<Arc<Handle>, SandboxError> {
        let registry = self.registry();
        let found = registry
            .alive
            .get(&id)
            .or_else(|| registry.ended.iter().find(|h| h.id == id));
        found.cloned().ok_or(SandboxError::NotFound(id))
    }

    /// Those alive and those remembered.
    pub fn list(&self) -> Vec<Arc<Handle>> {
        let registry = self.registry();
        registry
            .alive
            .values()
            .chain(&registry.ended)
            .cloned()
            .collect()
    }

    /// Those alive.
    pub(super) fn living(&self) -> Vec<Arc<Handle>> {
        self.registry().alive.values().cloned().collect()
    }

    /// How many are alive.
    pub fn alive(&self) -> usize {
        self.registry().alive.len()
    }

    /// Ends a sandbox; `NotFound` when it is not alive.
    pub async fn destroy(&self, id: SandboxId) -> Result<(), SandboxError> {
        let handle = self.registry().alive.get(&id).cloned();
        handle.ok_or(SandboxError::NotFound(id))?.destroy().await
    }

    /// Starts nothing new from now on.
    pub fn close(&self) {
        self.registry().closed = true;
    }

    /// Opens a connection to a port of a running sandbox. It counts as use from now until
    /// the caller drops the guard.
    pub async fn dial(
        &self,
        id: SandboxId,
        port: u16,
    ) -> Result<(tokio::net::TcpStream, crate::activity::InUse), DialFailure> {
        let handle = self
            .registry()
            .alive
            .get(&id)
            .cloned()
            .ok_or(DialFailure::NotFound)?;
        let in_use = handle.activity.begin();
        let live = match handle.running().await {
            Err(_) if handle.wakes() && self.admit().is_ok() => {
                match handle.resume(Resume::by(Actor::Traffic)).await {
                    Ok(_) => handle.running().await,
                    Err(error) => Err(error),
                }
            }
            other => other,
        };
        let dialer = match live {
            Ok(live) => live.dialer.clone(),
            Err(error) => {
                tracing::debug!(sandbox = %id, error = %chain(&error), "no way to its ports");
                return Err(DialFailure::NotRunning);
            }
        };
        let stream = dialer
            .connect(port)
            .await
            .map_err(DialFailure::PortClosed)?;
        Ok((stream, in_use))
    }
}

enum Begun {
    There(Arc<Handle>),
    New(Arc<Handle>, oneshot::Receiver<Result<(), SandboxError>>),
}

fn lock(registry: &Mutex<Registry>) -> MutexGuard<'_, Registry> {
    // Every change of the registry is one step; a panic leaves it whole.
    registry.lock().unwrap_or_else(|e| e.into_inner())
}
