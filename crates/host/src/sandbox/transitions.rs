//! What an owner does to get from one body to another. Each either succeeds or leaves things
//! as they were.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use wrenn_snapshot::{Snapshot, SnapshotId};
use wrenn_types::{AccessToken, SandboxId, SandboxState};

use super::death::{End, console_of, death};
use super::handle::{Certificate, Kept, Order, Resume, Resumed};
use super::journal::Journal;
use super::owner::{Common, Owner};
use super::paused::Paused;
use super::{CreateSandbox, SandboxError, network};
use crate::capacity;
use crate::guest::{Identity, Restored};
use crate::lifetime::Lifetime;
use crate::machine::{
    LiveMachine, MachineError, Origin, Phases, new_restore_id, restore, sync_json,
};
use crate::snapshots::{LABEL_SANDBOX, Saver, Scope, Then, thaw};

/// A sandbox with an absolute end that is resumed after it, and not told a new one, lives for
/// this long.
const RESUMED_FOR: Duration = Duration::from_secs(300);

impl Common {
    /// Restores a machine when it is its turn.
    pub(super) async fn bring_up(
        &self,
        origin: &Origin,
        phases: &mut Phases,
    ) -> Result<(LiveMachine, String), SandboxError> {
        let mut clock = Instant::now();
        let _pool_waits = self.pool.pause().await;
        // The semaphore is never closed.
        let _turn = self.restores.acquire().await;
        phases.note("queue", &mut clock);
        let standby = match origin.boots() {
            true => None,
            false => self.pool.stand_in(&origin.template).await,
        };
        Ok(match standby {
            Some(standby) => standby.restore(&self.site, origin, phases).await?,
            None => restore(&self.site, origin, phases).await?,
        })
    }

    /// What a machine is restored from that is to be `snapshot`, or to have its disk.
    pub(super) async fn origin(
        &self,
        id: SnapshotId,
        generation: u64,
        disk_only: bool,
    ) -> Result<Origin, SandboxError> {
        let snapshot = self.snapshots.load(id).await?;
        let description = &snapshot.manifest().description;
        let template = description.origin.template.clone().unwrap_or_default();
        let template = self.templates.of_snapshot(&template).await?;
        Ok(Origin {
            template,
            snapshot: Some(snapshot),
            generation,
            disk_only,
        })
    }

    /// Whether `id` is a kept snapshot of this very sandbox; it is returned.
    pub(super) async fn own_snapshot(
        &self,
        sandbox: SandboxId,
        id: SnapshotId,
    ) -> Result<Arc<Snapshot>, SandboxError> {
        let foreign = || SandboxError::ForeignSnapshot {
            id: sandbox,
            snapshot: id,
        };
        if !self.snapshots.is_kept(id).await? {
            return Err(foreign());
        }
        let snapshot = self.snapshots.load(id).await?;
        let labels = &snapshot.manifest().description.labels;
        match labels.get(LABEL_SANDBOX) == Some(&sandbox.to_string()) {
            true => Ok(snapshot),
            false => Err(foreign()),
        }
    }
}

impl Owner {
    /// Gets a machine, writes it down as this sandbox's, lets it run and tells its guest
    /// agent who it is.
    pub(super) async fn start(
        &self,
        create: &CreateSandbox,
    ) -> Result<(LiveMachine, Journal), SandboxError> {
        let owner = self.id.to_string();
        if let Some(snapshot) = create.snapshot {
            // Before anything, so that it stays while this goes on.
            self.common.snapshots.pin(snapshot, &owner).await?;
        }
        let started = self.start_pinned(create).await;
        if started.is_err() {
            self.let_go(create.snapshot).await;
        }
        started
    }

    async fn start_pinned(
        &self,
        create: &CreateSandbox,
    ) -> Result<(LiveMachine, Journal), SandboxError> {
        let Common {
            site,
            templates,
            pool,
            ..
        } = &*self.common;
        let mut phases = Phases::default();
        let mut clock = Instant::now();
        let origin = match create.snapshot {
            Some(id) => self.common.origin(id, 1, false).await?,
            None => Origin::template(templates.get(site, &create.template, create.shape).await?),
        };
        phases.note("template", &mut clock);
        // All that can fail without a machine comes before there is one to give back.
        let token = match create.secure {
            true => Some(AccessToken::generate().map_err(MachineError::from)?),
            false => None,
        };
        let mut journal = Journal::new(create, token.as_ref());
        let restore_id = new_restore_id()?;
        let waiting = match &origin.snapshot {
            None => pool.take(&origin.template).await,
            Some(_) => None,
        };
        let (machine, restore_id) = match waiting {
            Some(machine) => (machine, restore_id),
            None => self.common.bring_up(&origin, &mut phases).await?,
        };
        let handing = HandOver {
            journal: &mut journal,
            restore_id: &restore_id,
            origin: &origin,
            keep: true,
        };
        match self.hand_over(&machine, handing, phases).await {
            Ok(certificate) => {
                self.publish(&machine, &journal, certificate);
                self.activity.touch();
                Ok((machine, journal))
            }
            Err(error) => {
                machine.give_back(site).await;
                Err(error)
            }
        }
    }

    /// Lets a machine run that stands still, as this sandbox.
    async fn hand_over(
        &self,
        machine: &LiveMachine,
        handing: HandOver<'_>,
        mut phases: Phases,
    ) -> Result<Certificate, SandboxError> {
        let HandOver {
            journal,
            restore_id,
            origin,
            keep,
        } = handing;
        let mut clock = Instant::now();
        if keep {
            journal.handed = false;
            journal.keep(&machine.folder)?;
        }
        network::enforce(machine, journal).await?;
        phases.note("journal", &mut clock);
        // A hook is told the time when it is called, so many at once on few processors would set
        // clocks late. A boot takes long and mostly waits. Never closed.
        let _turn = match origin.boots() {
            true => None,
            false => Some(self.common.restores.acquire().await),
        };
        machine.vm.resume().await.map_err(MachineError::from)?;
        phases.note("resume", &mut clock);
        let id = self.id.to_string();
        let token = journal.token();
        let identity = Identity {
            restore_id,
            generation: machine.record.generation,
            access_token: token.as_ref().map_or("", AccessToken::reveal),
            env_vars: &journal.envs,
            sandbox_id: &id,
            template_id: &journal.template,
            hostname: &id,
            default_user: "user",
        };
        let patience = self.common.site.vmm.info().deadline(origin.patience());
        let host_token = machine.host_token();
        let mut exited = machine.vm.exited();
        let restored: Restored = tokio::select! {
            restored = machine.guest.init(&identity, &host_token, patience) => restored?,
            how = death(&mut exited) => {
                let end = End::by_itself(how.as_ref(), &console_of(machine));
                let end = end.after_memory_failure(&machine.folder);
                let how = end.reason.unwrap_or_default();
                return Err(SandboxError::Broken(format!("it died while it started: {how}")));
            }
        };
        machine.guest.set_token(token);
        journal.handed = true;
        if keep {
            journal.keep(&machine.folder)?;
            // What it comes from may be forgotten after this.
            let (folder, id) = (machine.folder.clone(), self.id);
            let synced = tokio::task::spawn_blocking(move || sync_json(&folder));
            let synced = synced.await.unwrap_or_else(|e| Err(io::Error::other(e)));
            synced.map_err(|source| SandboxError::Journal { id, source })?;
        }
        phases.note("init", &mut clock);
        Ok(Certificate {
            generation: machine.record.generation,
            restored,
            phases,
            booted: origin.boots(),
            rolled_back: false,
        })
    }

    async fn saver(&self, machine: &LiveMachine) -> Result<Saver<'_>, SandboxError> {
        let Common {
            site,
            templates,
            snapshots,
            ..
        } = &*self.common;
        let digest = &machine.record.template_digest;
        Ok(Saver {
            site,
            snapshots,
            template: templates.of_snapshot(digest).await?,
        })
    }

    /// Saves a running sandbox, which goes on.
    pub(super) async fn save(
        &self,
        machine: &LiveMachine,
        journal: &mut Journal,
        order: Order,
    ) -> Result<Kept, SandboxError> {
        capacity::admit_save(&self.common.site.config.data_dir)?;
        let saver = self.saver(machine).await?;
        self.set(SandboxState::Snapshotting, None);
        let saved = saver
            .save(machine, journal, &order.name, order.scope, Then::GoOn)
            .await;
        self.set(SandboxState::Running, None);
        let saved = saved?;
        self.common.pool.expect(&machine.record.template_digest);
        let snapshot = saved.snapshot.id();
        self.pin_for(snapshot, &order.owners).await?;
        Ok(Kept {
            snapshot,
            phases: saved.phases,
        })
    }

    /// Takes what a sandbox is paused as for a snapshot of its own.
    pub(super) async fn keep_paused(
        &self,
        paused: &Paused,
        order: Order,
    ) -> Result<Kept, SandboxError> {
        self.pin_for(paused.snapshot, &order.owners).await?;
        Ok(Kept {
            snapshot: paused.snapshot,
            phases: Phases::default(),
        })
    }

    /// Pins for all of them or for none.
    async fn pin_for(&self, id: SnapshotId, owners: &[String]) -> Result<(), SandboxError> {
        let snapshots = &self.common.snapshots;
        for (done, owner) in owners.iter().enumerate() {
            if let Err(error) = snapshots.pin(id, owner).await {
                for owner in &owners[..done] {
                    snapshots.let_go(id, owner).await;
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Saves a sandbox and writes down that it is paused. Its machine stands still afterwards
    /// and is the caller's to give back; if this fails, it runs on.
    pub(super) async fn pause(
        &self,
        machine: &LiveMachine,
        journal: &mut Journal,
        scope: Scope,
        reason: Option<String>,
    ) -> Result<(Paused, Phases), SandboxError> {
        capacity::admit_save(&self.common.site.config.data_dir)?;
        let saver = self.saver(machine).await?;
        self.set(SandboxState::Pausing, None);
        let saved = match saver.save(machine, journal, "", scope, Then::Stay).await {
            Ok(saved) => saved,
            Err(error) => {
                self.set(SandboxState::Running, None);
                return Err(error);
            }
        };
        let mut clock = Instant::now();
        let paused = Paused::of(&machine.record, journal, saved.snapshot.id(), reason);
        let dir = self.common.site.config.paused_dir();
        let written = tokio::task::spawn_blocking({
            let paused = paused.clone();
            move || paused.write(&dir)
        });
        let written = written
            .await
            .unwrap_or_else(|join| Err(std::io::Error::other(join)));
        if let Err(source) = written {
            // It may be there and not synced, and would have the last word after a crash.
            let dir = self.common.site.config.paused_dir();
            if let Err(error) = Paused::remove(&dir, self.id) {
                tracing::error!(sandbox = %self.id, %error, "the note that it is paused stays although it runs");
            }
            thaw(machine).await;
            self.set(SandboxState::Running, None);
            let id = self.id;
            return Err(SandboxError::Journal { id, source });
        }
        let mut phases = saved.phases;
        phases.note("journal", &mut clock);
        self.common.pool.expect(&machine.record.template_digest);
        Ok((paused, phases))
    }

    /// Restores a paused sandbox, or boots it.
    pub(super) async fn resume(
        &self,
        paused: &Paused,
        resume: Resume,
    ) -> Result<(LiveMachine, Journal, Resumed), SandboxError> {
        let site = &self.common.site;
        let config = &site.config;
        capacity::admit(paused.shape, config.expected_use_percent, &config.data_dir)?;
        self.set(SandboxState::Resuming, None);
        let mut phases = Phases::default();
        let mut clock = Instant::now();
        let generation = paused.generation + 1;
        let origin = self
            .common
            .origin(paused.snapshot, generation, resume.boot)
            .await?;
        phases.note("snapshot", &mut clock);
        let (machine, restore_id) = self.common.bring_up(&origin, &mut phases).await?;
        let lifetime = resume.lifetime;
        let lifetime = lifetime.unwrap_or_else(|| still_to_live(paused.journal.lifetime));
        let journal = match origin.boots() {
            true => paused.journal.booted_from(paused.snapshot),
            false => paused.journal.restored_from(paused.snapshot),
        };
        let mut journal = journal.with_lifetime(lifetime);
        let resumed = async {
            let handing = HandOver {
                journal: &mut journal,
                restore_id: &restore_id,
                origin: &origin,
                keep: true,
            };
            let mut certificate = self.hand_over(&machine, handing, phases).await?;
            certificate.rolled_back = resume.rolled_back;
            // From here on it is not paused any more.
            Paused::remove(&site.config.paused_dir(), self.id).map_err(|source| {
                SandboxError::Journal {
                    id: self.id,
                    source,
                }
            })?;
            Ok(certificate)
        };
        match resumed.await {
            Ok(certificate) => {
                self.publish(&machine, &journal, certificate.clone());
                self.activity.touch();
                self.set(SandboxState::Running, None);
                tracing::info!(sandbox = %self.id, generation = machine.record.generation, "resumed");
                let resumed = Resumed {
                    now: true,
                    certificate,
                };
                Ok((machine, journal, resumed))
            }
            Err(error) => {
                machine.give_back(site).await;
                Err(error)
            }
        }
    }

    /// Brings up a machine as it was at the snapshot, and makes it the sandbox's in place of
    /// `machine`, which stands still and is the caller's to give back. If this fails,
    /// `machine` runs on.
    pub(super) async fn roll_back(
        &self,
        machine: &LiveMachine,
        journal: &Journal,
        id: SnapshotId,
    ) -> Result<(LiveMachine, Journal, Resumed), SandboxError> {
        self.common.own_snapshot(self.id, id).await?;
        let site = &self.common.site;
        let owner = self.id.to_string();
        let parent_before = journal.line.parent;
        self.common.snapshots.pin(id, &owner).await?;
        self.set(SandboxState::Resuming, None);
        let back = async {
            machine.vm.stop().await.map_err(MachineError::from)?;
            let mut phases = Phases::default();
            let mut clock = Instant::now();
            let origin = self
                .common
                .origin(id, machine.record.generation + 1, false)
                .await?;
            phases.note("snapshot", &mut clock);
            let (other, restore_id) = self.common.bring_up(&origin, &mut phases).await?;
            let mut journal = journal.restored_from(id);
            let handed = async {
                let handing = HandOver {
                    journal: &mut journal,
                    restore_id: &restore_id,
                    origin: &origin,
                    keep: false,
                };
                let mut certificate = self.hand_over(&other, handing, phases).await?;
                certificate.rolled_back = true;
                // From here on the sandbox is this machine: of two, the later generation is.
                journal.keep(&other.folder)?;
                Ok(certificate)
            };
            match handed.await {
                Ok(certificate) => Ok((other, journal, certificate)),
                Err(error) => {
                    other.give_back(site).await;
                    Err(error)
                }
            }
        };
        match back.await {
            Ok((other, journal, certificate)) => {
                self.publish(&other, &journal, certificate.clone());
                self.activity.touch();
                self.set(SandboxState::Running, None);
                tracing::info!(sandbox = %self.id, snapshot = %id, "rolled back");
                let resumed = Resumed {
                    now: true,
                    certificate,
                };
                Ok((other, journal, resumed))
            }
            Err(error) => {
                thaw(machine).await;
                self.set(SandboxState::Running, None);
                if parent_before != Some(id) {
                    self.let_go(Some(id)).await;
                }
                Err(error)
            }
        }
    }

    /// Makes a paused sandbox one that is paused as `id`.
    pub(super) async fn roll_back_paused(
        &self,
        paused: &Paused,
        id: SnapshotId,
    ) -> Result<Paused, SandboxError> {
        self.common.own_snapshot(self.id, id).await?;
        let owner = self.id.to_string();
        self.common.snapshots.pin(id, &owner).await?;
        let mut back = paused.clone();
        back.snapshot = id;
        back.journal = paused.journal.restored_from(id);
        match back.write(&self.common.site.config.paused_dir()) {
            Ok(()) => Ok(back),
            Err(source) => {
                if paused.snapshot != id {
                    self.let_go(Some(id)).await;
                }
                let id = self.id;
                Err(SandboxError::Journal { id, source })
            }
        }
    }
}

/// How a machine is handed over to its sandbox.
struct HandOver<'a> {
    journal: &'a mut Journal,
    /// What its guest agent waits for.
    restore_id: &'a str,
    /// Where it comes from.
    origin: &'a Origin,
    /// The journal is written first, so that the next agent knows whose the machine was to be,
    /// and again when it is; else it is nobody's until the caller says so.
    keep: bool,
}

/// The limits of a sandbox that is resumed without new ones.
fn still_to_live(lifetime: Lifetime) -> Lifetime {
    let at_least = SystemTime::now() + RESUMED_FOR;
    Lifetime {
        end_at: lifetime.end_at.map(|end| end.max(at_least)),
        ..lifetime
    }
}
