//! The owner of one sandbox: a task that answers life-cycle requests one after the other,
//! watches the machine and the clock, and gives everything back.
//!
//! ```text
//!            ┌────── Live ◀──────┐  create, resume, rollback
//!   pause, or its time was over  │
//!            └─────▶ Paused ─────┘
//!                 └──┬──┘ destroy, its time, its machine's death
//!                    ▼
//!                   over
//! ```

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use wrenn_snapshot::SnapshotId;
use wrenn_types::{SandboxId, SandboxState};
use wrenn_vmm::RunState;

use super::death::{End, certificate, console_of, cpu_ms, death};
use super::diff::Diffs;
use super::handle::{
    Answer, Certificate, Handle, LastCommand, Request, Resume, Resumed, SharedLive, View, set_live,
};
use super::journal::Journal;
use super::merging::Merging;
use super::paused::Paused;
use super::rehearsal::Rehearsal;
use super::{CreateSandbox, SandboxError};
use crate::activity::Activity;
use crate::drain::Drain;
use crate::events::{Actor, DeathCertificate, EventLog, Kind};
use crate::guest::{Restored, chain};
use crate::lifetime::Lifetime;
use crate::machine::{LiveMachine, Phases, Site, name_of};
use crate::metrics::Series;
use crate::pool::Pool;
use crate::sandbox::handle::PauseDone;
use crate::snapshots::{Scope, Snapshots, go_on, thaw};
use crate::template::TemplateStore;

/// The longest sleep towards a deadline; wall clocks are moved, so it is looked at again.
const LONGEST_NAP: Duration = Duration::from_secs(60);
/// A sandbox whose time is over and that could not be paused is tried again after this.
const PAUSE_AGAIN: Duration = Duration::from_secs(30);
/// Why a sandbox ended or was paused by its clock.
const TIME_OVER: &str = "its time was over";

/// What owners share.
pub struct Common {
    /// This host.
    pub site: Arc<Site>,
    /// Where machines come from.
    pub templates: Arc<TemplateStore>,
    /// Where they come from at once.
    pub pool: Arc<Pool>,
    /// Where they are saved.
    pub snapshots: Arc<Snapshots>,
    /// How many may be restored at the same time: more would only slow each other down.
    pub restores: tokio::sync::Semaphore,
    /// Comparisons under way.
    pub diffs: Diffs,
    /// How many chains of saves may be merged at the same time.
    pub merges: tokio::sync::Semaphore,
    /// Where what happens is written down.
    pub events: Arc<EventLog>,
    /// Whether anything is started at all.
    pub drain: Arc<Drain>,
}

/// A sandbox's owner.
pub struct Owner {
    pub(super) id: SandboxId,
    pub(super) common: Arc<Common>,
    pub(super) view: watch::Sender<View>,
    pub(super) live: SharedLive,
    pub(super) activity: Arc<Activity>,
    metrics: Arc<Series>,
    last_command: Arc<LastCommand>,
    requests: mpsc::Receiver<Request>,
}

/// What an owner owns.
pub(super) enum Body {
    /// A machine.
    Live(Box<(LiveMachine, Journal)>),
    /// A snapshot.
    Paused(Box<Paused>),
}

/// What comes after a body: another, or nothing.
type Next = ControlFlow<(), Body>;

impl Owner {
    /// An owner and the handle to it, in state `state`.
    pub fn new(
        id: SandboxId,
        template: &str,
        common: Arc<Common>,
        state: SandboxState,
        lifetime: Lifetime,
        started_at: SystemTime,
    ) -> (Owner, Arc<Handle>) {
        let (view, seen) = watch::channel(View {
            state,
            reason: None,
            died: None,
            lifetime,
            started_at,
            about: None,
        });
        let (sender, requests) = mpsc::channel(32);
        let activity = Activity::since(SystemTime::now());
        let live = SharedLive::default();
        let metrics = Arc::new(Series::default());
        let last_command = Arc::new(LastCommand::default());
        let handle = Handle {
            id,
            template: template.to_owned(),
            activity: activity.clone(),
            view: seen,
            live: live.clone(),
            metrics: metrics.clone(),
            last_command: last_command.clone(),
            requests: sender,
        };
        (
            Owner {
                id,
                common,
                view,
                live,
                activity,
                metrics,
                last_command,
                requests,
            },
            Arc::new(handle),
        )
    }

    /// Starts a sandbox and owns it to its end. How the start went is told to `started`,
    /// whether or not somebody still waits for it.
    pub async fn create(
        mut self,
        create: CreateSandbox,
        started: oneshot::Sender<Result<(), SandboxError>>,
    ) {
        match self.start(&create).await {
            Ok((machine, journal)) => {
                self.set(SandboxState::Running, None);
                self.happened(Kind::Started, Actor::Request, None);
                // Nobody waiting is no failure (G1).
                let _ = started.send(Ok(()));
                self.own(Body::Live(Box::new((machine, journal)))).await;
            }
            Err(error) => {
                let reason = chain(&error);
                tracing::warn!(sandbox = %self.id, %reason, "could not be started");
                let end = End::at_start(reason.clone());
                let certificate = DeathCertificate {
                    state: end.state.to_string(),
                    cause: end.cause.to_owned(),
                    ..DeathCertificate::default()
                };
                self.over(&end, certificate);
                let _ = started.send(Err(error));
                self.refuse_rest();
            }
        }
    }

    /// Owns a machine that runs already. One that was being saved when its agent died is told
    /// to go on.
    pub async fn adopt(self, machine: LiveMachine, journal: Journal) {
        let token = journal.token();
        machine
            .guest
            .set_token(Some(token.unwrap_or_else(|| machine.host_token())));
        if *machine.vm.run_state().borrow() == RunState::Stopped {
            thaw(&machine).await;
        } else {
            // It may have been quieted and not stopped. Nobody waits for a guest that hangs.
            let guest = machine.guest.clone();
            tokio::spawn(async move { go_on(&guest).await });
        }
        let certificate = Certificate {
            generation: machine.record.generation,
            restored: Restored::default(),
            phases: Phases::default(),
            booted: journal.line.booted,
            rolled_back: false,
        };
        self.publish(&machine, &journal, certificate);
        self.set(SandboxState::Running, None);
        self.happened(Kind::Adopted, Actor::Host, None);
        self.own(Body::Live(Box::new((machine, journal)))).await;
    }

    /// Owns a sandbox that an earlier agent paused.
    pub async fn adopt_paused(self, paused: Paused) {
        self.show_paused(&paused);
        self.own(Body::Paused(Box::new(paused))).await;
    }

    /// Serves requests until the sandbox ends.
    async fn own(mut self, mut body: Body) {
        loop {
            let next = match body {
                Body::Live(live) => self.own_live(live.0, live.1).await,
                Body::Paused(paused) => self.own_paused(*paused).await,
            };
            body = match next {
                ControlFlow::Continue(body) => body,
                ControlFlow::Break(()) => break,
            };
        }
        self.refuse_rest();
    }

    async fn own_live(&mut self, machine: LiveMachine, mut journal: Journal) -> Next {
        let mut exited = machine.vm.exited();
        let mut pause_again: Option<SystemTime> = None;
        let mut merging = Merging::of(&self.common, self.id, journal.line.parent);
        let _rehearsal = Rehearsal::of(&self.common, &machine, &self.activity);
        loop {
            let deadline = journal.lifetime.deadline(self.activity.last());
            let deadline = deadline.map(|at| pause_again.map_or(at, |again| at.max(again)));
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(Request::SetLifetime(lifetime, answer)) => {
                        let set = self.set_lifetime(lifetime, &machine, &mut journal);
                        // The asker may have hung up; the limit holds all the same.
                        let _ = answer.send(set);
                    }
                    Some(Request::Resume(resume, answer)) => {
                        let set = match resume.lifetime {
                            Some(lifetime) => self.set_lifetime(lifetime, &machine, &mut journal),
                            None => Ok(()),
                        };
                        let _ = answer.send(set.map(|()| Resumed {
                            now: false,
                            certificate: self.certificate(),
                        }));
                    }
                    Some(Request::Hold(_, answer)) => drop(answer.send(Ok(None))),
                    Some(Request::Network(change)) => {
                        self.network(change, &machine, &mut journal).await;
                    }
                    Some(Request::Save(order, answer)) => {
                        let saved = self.save(&machine, &mut journal, order).await;
                        if saved.is_ok() {
                            self.happened(Kind::Saved, Actor::Request, None);
                            merging = Merging::of(&self.common, self.id, journal.line.parent);
                        }
                        let _ = answer.send(saved);
                    }
                    Some(Request::Pause(scope, answer)) => {
                        match self.pause(&machine, &mut journal, scope, None).await {
                            Ok((paused, phases)) => {
                                self.put_away(machine, &paused, Actor::Request).await;
                                let _ = answer.send(Ok(PauseDone { now: true, phases }));
                                return Next::Continue(Body::Paused(Box::new(paused)));
                            }
                            Err(error) => {
                                let reason = Some(chain(&error));
                                self.happened(Kind::PauseFailed, Actor::Request, reason);
                                let _ = answer.send(Err(error));
                            }
                        }
                    }
                    Some(Request::Rollback(id, answer)) => {
                        match self.roll_back(&machine, &journal, id).await {
                            Ok((other, new_journal, resumed)) => {
                                machine.give_back(&self.common.site).await;
                                self.release_parent(journal.line.parent, id).await;
                                self.happened(Kind::RolledBack, Actor::Request, None);
                                let _ = answer.send(Ok(resumed));
                                return Next::Continue(Body::Live(Box::new((other, new_journal))));
                            }
                            Err(error) => drop(answer.send(Err(error))),
                        }
                    }
                    Some(Request::Destroy(answer)) => {
                        return self.end(machine, &journal, End::by_request(), Some(answer)).await;
                    }
                    // All handles are gone: the agent is ending and leaves the VM running.
                    None => return Next::Break(()),
                },
                merged = merging.done() => {
                    self.take_merged(merged, &machine, &mut journal).await;
                }
                how = death(&mut exited) => {
                    let group = name_of(&machine.folder);
                    let killed = self.common.site.cgroups.oom_kills(&group);
                    let end = End::by_itself(how.as_ref(), &console_of(&machine));
                    let end = end.after_memory_failure(&machine.folder);
                    let end = if killed > 0 { end.out_of_memory() } else { end };
                    return self.end(machine, &journal, end, None).await;
                }
                over = nap(deadline) => {
                    if !over || !self.is_over(&journal) {
                        continue;
                    }
                    if !journal.pause_at_end {
                        let end = End::by_clock(TIME_OVER);
                        return self.end(machine, &journal, end, None).await;
                    }
                    let reason = Some(TIME_OVER.to_owned());
                    let scope = Scope::of(journal.pause_disk_only);
                    match self.pause(&machine, &mut journal, scope, reason).await {
                        Ok((paused, _)) => {
                            self.put_away(machine, &paused, Actor::Clock).await;
                            return Next::Continue(Body::Paused(Box::new(paused)));
                        }
                        Err(error) => {
                            let reason = Some(chain(&error));
                            self.happened(Kind::PauseFailed, Actor::Clock, reason);
                            tracing::error!(sandbox = %self.id, error = %chain(&error), "its time is over and it could not be paused; it runs on");
                            pause_again = SystemTime::now().checked_add(PAUSE_AGAIN);
                        }
                    }
                }
            }
        }
    }

    /// Gives the machine of a sandbox back that is paused from now on.
    async fn put_away(&self, machine: LiveMachine, paused: &Paused, actor: Actor) {
        set_live(&self.live, None);
        machine.give_back(&self.common.site).await;
        self.show_paused(paused);
        self.happened(Kind::Paused, actor, paused.reason.clone());
        tracing::info!(sandbox = %self.id, snapshot = %paused.snapshot, "paused");
    }

    async fn own_paused(&mut self, mut paused: Paused) -> Next {
        let mut merging = Merging::of(&self.common, self.id, Some(paused.snapshot));
        loop {
            let request = tokio::select! {
                request = self.requests.recv() => request,
                merged = merging.done() => {
                    self.take_merged_paused(merged, &mut paused).await;
                    self.show_paused(&paused);
                    continue;
                }
            };
            match request {
                Some(Request::SetLifetime(_, answer)) => {
                    drop(answer.send(Err(SandboxError::NotRunning {
                        id: self.id,
                        state: SandboxState::Paused,
                    })))
                }
                Some(Request::Network(change)) => {
                    self.no_network(change, || SandboxError::NotRunning {
                        id: self.id,
                        state: SandboxState::Paused,
                    });
                }
                Some(Request::Hold(owner, answer)) => {
                    let held = self.common.snapshots.pin(paused.snapshot, &owner).await;
                    let held = held.map(|()| Some(paused.snapshot));
                    let _ = answer.send(held.map_err(Into::into));
                }
                Some(Request::Pause(_, answer)) => drop(answer.send(Ok(PauseDone {
                    now: false,
                    phases: Phases::default(),
                }))),
                Some(Request::Save(order, answer)) => {
                    let kept = self.keep_paused(&paused, order).await;
                    if kept.is_ok() {
                        self.happened(Kind::Saved, Actor::Request, None);
                    }
                    let _ = answer.send(kept);
                }
                Some(Request::Resume(resume, answer)) => {
                    let asked = match resume.pause_at_end {
                        true => paused.to_pause_again(),
                        false => paused.clone(),
                    };
                    match self.resume(&asked, resume).await {
                        Ok((machine, journal, resumed)) => {
                            self.happened(Kind::Resumed, resume.actor, None);
                            let _ = answer.send(Ok(resumed));
                            return Next::Continue(Body::Live(Box::new((machine, journal))));
                        }
                        Err(error) => {
                            tracing::error!(sandbox = %self.id, error = %chain(&error), "could not be resumed; it stays paused");
                            self.show_paused(&paused);
                            let _ = answer.send(Err(error));
                        }
                    }
                }
                Some(Request::Rollback(id, answer)) => {
                    match self.roll_back_paused(&paused, id).await {
                        Ok(back) => {
                            let left = paused.snapshot;
                            paused = back;
                            self.release_parent(Some(left), id).await;
                            let resume = Resume {
                                rolled_back: true,
                                ..Resume::by(Actor::Request)
                            };
                            match self.resume(&paused, resume).await {
                                Ok((machine, journal, resumed)) => {
                                    self.happened(Kind::RolledBack, Actor::Request, None);
                                    let _ = answer.send(Ok(resumed));
                                    return Next::Continue(Body::Live(Box::new((
                                        machine, journal,
                                    ))));
                                }
                                Err(error) => {
                                    self.show_paused(&paused);
                                    drop(answer.send(Err(error)));
                                }
                            }
                        }
                        Err(error) => drop(answer.send(Err(error))),
                    }
                }
                Some(Request::Destroy(answer)) => return self.end_paused(&paused, answer).await,
                None => return Next::Break(()),
            }
        }
    }

    async fn end(
        &self,
        machine: LiveMachine,
        journal: &Journal,
        end: End,
        asked: Option<Answer<()>>,
    ) -> Next {
        self.view.send_modify(|view| {
            view.state = SandboxState::Stopping;
            view.reason.clone_from(&end.reason);
            view.died = end.is_death().then_some(end.cause);
        });
        set_live(&self.live, None);
        let mut certificate = certificate(&end, journal, &console_of(&machine));
        let cpu = cpu_ms(machine.vm.pids().vmm.pid);
        // A dead monitor's time is only known from when it was last looked at.
        certificate.cpu_ms = cpu.unwrap_or_else(|| self.metrics.cpu_ms());
        machine.give_back(&self.common.site).await;
        self.let_go(journal.line.parent).await;
        self.over(&end, certificate);
        if let Some(answer) = asked {
            let _ = answer.send(Ok(()));
        }
        Next::Break(())
    }

    /// The sandbox is over, for this reason; nothing of it is left.
    pub(super) fn over(&self, end: &End, mut certificate: DeathCertificate) {
        let End { state, reason, .. } = end;
        tracing::info!(sandbox = %self.id, %state, cause = end.cause, reason = reason.as_deref(), "ended");
        if let Some(last) = self.metrics.latest() {
            certificate.memory_bytes = last.mem_used;
            certificate.disk_bytes = last.disk_used;
        }
        certificate.last_command = self.last_command.get();
        self.metrics.finish();
        self.set(*state, reason.clone());
        let (reason, death) = (reason.clone(), Some(certificate));
        let events = &self.common.events;
        events.add(self.id, Kind::Ended, end.actor, reason, death);
    }

    async fn end_paused(&self, paused: &Paused, answer: Answer<()>) -> Next {
        tracing::info!(sandbox = %self.id, "a paused sandbox ends");
        self.set(SandboxState::Stopping, None);
        let dir = self.common.site.config.paused_dir();
        if let Err(source) = Paused::remove(&dir, self.id) {
            self.show_paused(paused);
            let id = self.id;
            let _ = answer.send(Err(SandboxError::Journal { id, source }));
            return Next::Continue(Body::Paused(Box::new(paused.clone())));
        }
        self.let_go(Some(paused.snapshot)).await;
        let end = End::by_request();
        self.over(&end, certificate(&end, &paused.journal, &[]));
        let _ = answer.send(Ok(()));
        Next::Break(())
    }

    /// The sandbox needs this snapshot no more.
    pub(super) async fn let_go(&self, snapshot: Option<SnapshotId>) {
        if let Some(id) = snapshot {
            self.common.snapshots.let_go(id, &self.id.to_string()).await;
        }
    }

    /// The same, unless it is `now` what the sandbox goes on from.
    async fn release_parent(&self, before: Option<SnapshotId>, now: SnapshotId) {
        self.let_go(before.filter(|id| *id != now)).await;
    }

    fn is_over(&self, journal: &Journal) -> bool {
        let deadline = journal.lifetime.deadline(self.activity.last());
        deadline.is_some_and(|deadline| deadline <= SystemTime::now())
    }

    fn set_lifetime(
        &self,
        lifetime: Lifetime,
        machine: &LiveMachine,
        journal: &mut Journal,
    ) -> Result<(), SandboxError> {
        let changed = journal.with_lifetime(lifetime);
        changed.keep(&machine.folder)?;
        *journal = changed;
        self.view.send_modify(|view| view.lifetime = lifetime);
        Ok(())
    }

    /// Requests that came too late: whoever wanted an end has it.
    fn refuse_rest(&mut self) {
        self.requests.close();
        let gone = || SandboxError::NotFound(self.id);
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Destroy(answer) => drop(answer.send(Ok(()))),
                Request::SetLifetime(_, answer) => drop(answer.send(Err(gone()))),
                Request::Pause(_, answer) => drop(answer.send(Err(gone()))),
                Request::Resume(_, answer) => drop(answer.send(Err(gone()))),
                Request::Save(_, answer) => drop(answer.send(Err(gone()))),
                Request::Rollback(_, answer) => drop(answer.send(Err(gone()))),
                Request::Hold(_, answer) => drop(answer.send(Err(gone()))),
                Request::Network(change) => self.no_network(change, gone),
            }
        }
    }
}

/// Sleeps towards `deadline`; `true` when it is worth looking whether it has come.
async fn nap(deadline: Option<SystemTime>) -> bool {
    let Some(deadline) = deadline else {
        return std::future::pending().await;
    };
    let left = deadline
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    tokio::time::sleep(left.min(LONGEST_NAP)).await;
    left <= LONGEST_NAP
}
