//! The owner of one sandbox: a task that starts its machine, answers life-cycle requests
//! one after the other, watches the machine and the clock, and gives everything back.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use wrenn_net::GuestDialer;
use wrenn_types::{AccessToken, SandboxId, SandboxState};
use wrenn_vmm::Machine;

use super::journal::Journal;
use super::{CreateSandbox, SandboxError};
use crate::activity::{Activity, InUse};
use crate::guest::{Guest, Identity, chain};
use crate::lifetime::Lifetime;
use crate::machine::{LiveMachine, Phases, Record, Site, new_restore_id, restore};
use crate::pool::Pool;
use crate::template::TemplateStore;

/// How long the guest agent may take for its restore hook, on the reference machine.
const INIT_PATIENCE: Duration = Duration::from_secs(20);
/// What of the console goes into the reason when a machine dies.
const LAST_WORDS: usize = 1024;
/// The longest sleep towards a deadline; wall clocks are moved, so it is looked at again.
const LONGEST_NAP: Duration = Duration::from_secs(60);

/// What can be seen of a sandbox.
#[derive(Debug, Clone)]
pub struct View {
    /// Where it is in its life.
    pub state: SandboxState,
    /// Why, when that is not by request.
    pub reason: Option<String>,
    /// How long it may live.
    pub lifetime: Lifetime,
    /// When it was given to its user.
    pub started_at: SystemTime,
}

/// What can be asked of the owner. Answers come in the order of the questions.
enum Request {
    Destroy(oneshot::Sender<Result<(), SandboxError>>),
    SetLifetime(Lifetime, oneshot::Sender<Result<(), SandboxError>>),
}

/// What a running sandbox is reached by.
pub struct Live {
    /// Its guest agent.
    pub guest: Guest,
    /// Its ports.
    pub dialer: GuestDialer,
    /// Its VM.
    pub vm: Arc<dyn Machine>,
    /// What its machine is.
    pub record: Record,
    /// The token its guest agent demands of everybody else.
    pub token: Option<AccessToken>,
    /// Where the time of its creation went; empty for an adopted one.
    pub phases: Phases,
}

/// A machine's way in, for as long as it has one: an ended sandbox is remembered for its
/// reason, and must hold no connection or descriptor of what is gone.
type SharedLive = Arc<RwLock<Option<Arc<Live>>>>;

fn set_live(shared: &SharedLive, live: Option<Live>) {
    // A pointer is replaced; that is whole or not done.
    *shared.write().unwrap_or_else(PoisonError::into_inner) = live.map(Arc::new);
}

/// Everybody's end of a sandbox.
pub struct Handle {
    /// Which sandbox.
    pub id: SandboxId,
    /// Name of its template as it was asked for.
    pub template: String,
    /// Its use.
    pub activity: Arc<Activity>,
    view: watch::Receiver<View>,
    live: SharedLive,
    requests: mpsc::Sender<Request>,
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

    /// Its machine, when it is running.
    pub fn running(&self) -> Result<Arc<Live>, SandboxError> {
        let state = self.view.borrow().state;
        match self.live() {
            Some(live) if state == SandboxState::Running => Ok(live),
            _ => Err(SandboxError::NotRunning { id: self.id, state }),
        }
    }

    /// Its machine when it is running, in use until the guard is dropped.
    pub fn in_use(&self) -> Result<(Arc<Live>, InUse), SandboxError> {
        Ok((self.running()?, self.activity.begin()))
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

    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), SandboxError>>) -> Request,
    ) -> Result<(), SandboxError> {
        let (answer, answered) = oneshot::channel();
        let gone = || SandboxError::NotFound(self.id);
        self.requests
            .send(request(answer))
            .await
            .map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

/// What owners share.
pub struct Common {
    /// This host.
    pub site: Arc<Site>,
    /// Where machines come from.
    pub templates: Arc<TemplateStore>,
    /// Where they come from at once.
    pub pool: Arc<Pool>,
    /// How many may be restored at the same time: more would only slow each other down.
    pub restores: tokio::sync::Semaphore,
}

/// A sandbox's owner before it runs.
pub struct Owner {
    id: SandboxId,
    common: Arc<Common>,
    view: watch::Sender<View>,
    live: SharedLive,
    activity: Arc<Activity>,
    requests: mpsc::Receiver<Request>,
}

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
            lifetime,
            started_at,
        });
        let (sender, requests) = mpsc::channel(32);
        let activity = Activity::since(SystemTime::now());
        let live = SharedLive::default();
        let handle = Handle {
            id,
            template: template.to_owned(),
            activity: activity.clone(),
            view: seen,
            live: live.clone(),
            requests: sender,
        };
        (
            Owner {
                id,
                common,
                view,
                live,
                activity,
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
                // Nobody waiting is no failure (G1).
                let _ = started.send(Ok(()));
                self.run(machine, journal).await;
            }
            Err(error) => {
                let reason = chain(&error);
                tracing::warn!(sandbox = %self.id, %reason, "could not be started");
                self.set(SandboxState::Error, Some(reason));
                let _ = started.send(Err(error));
                self.refuse_rest();
            }
        }
    }

    /// Owns a machine that runs already.
    pub async fn adopt(self, machine: LiveMachine, journal: Journal) {
        let token = journal.token();
        machine
            .guest
            .set_token(Some(token.clone().unwrap_or_else(|| machine.host_token())));
        self.publish(&machine, token, Phases::default());
        self.set(SandboxState::Running, None);
        self.run(machine, journal).await;
    }

    fn publish(&self, machine: &LiveMachine, token: Option<AccessToken>, phases: Phases) {
        let live = Live {
            guest: machine.guest.clone(),
            dialer: machine.slot.guest(),
            vm: machine.vm.clone(),
            record: machine.record.clone(),
            token,
            phases,
        };
        set_live(&self.live, Some(live));
    }

    fn set(&self, state: SandboxState, reason: Option<String>) {
        self.view.send_modify(|view| {
            view.state = state;
            view.reason = reason;
        });
    }

    /// Gets a machine, writes it down as this sandbox's, lets it run and tells its guest
    /// agent who it is.
    async fn start(&self, create: &CreateSandbox) -> Result<(LiveMachine, Journal), SandboxError> {
        let Common {
            site,
            templates,
            pool,
            restores,
        } = &*self.common;
        let mut phases = Phases::default();
        let mut clock = Instant::now();
        let template = templates.get(site, &create.template, create.shape).await?;
        phases.note("template", &mut clock);
        let (machine, restore_id) = match pool.take(&template).await {
            Some(machine) => (machine, new_restore_id()?),
            None => {
                let _pool_waits = pool.pause().await;
                // The semaphore is never closed.
                let _turn = restores.acquire().await;
                phases.note("queue", &mut clock);
                restore(site, &template, &mut phases).await?
            }
        };
        clock = Instant::now();
        match self
            .hand_over(create, &machine, &restore_id, &mut phases, &mut clock)
            .await
        {
            Ok((journal, token)) => {
                self.publish(&machine, token, phases);
                Ok((machine, journal))
            }
            Err(error) => {
                machine.give_back(site).await;
                Err(error)
            }
        }
    }

    async fn hand_over(
        &self,
        create: &CreateSandbox,
        machine: &LiveMachine,
        restore_id: &str,
        phases: &mut Phases,
        clock: &mut Instant,
    ) -> Result<(Journal, Option<AccessToken>), SandboxError> {
        let site = &self.common.site;
        let token = match create.secure {
            true => Some(AccessToken::generate().map_err(crate::machine::MachineError::from)?),
            false => None,
        };
        let journal = Journal::new(
            self.id,
            create.template.clone(),
            token.as_ref(),
            create.lifetime,
            create.envs.clone(),
            create.allow_internet,
        );
        journal
            .write(&machine.folder)
            .map_err(|source| SandboxError::Journal {
                id: self.id,
                source,
            })?;
        if !create.allow_internet {
            machine
                .slot
                .set_internet(false)
                .await
                .map_err(crate::machine::MachineError::from)?;
        }
        phases.note("journal", clock);
        machine
            .vm
            .resume()
            .await
            .map_err(crate::machine::MachineError::from)?;
        phases.note("resume", clock);
        let id = self.id.to_string();
        let identity = Identity {
            restore_id,
            generation: machine.record.generation,
            access_token: token.as_ref().map_or("", AccessToken::reveal),
            env_vars: &create.envs,
            sandbox_id: &id,
            template_id: &create.template,
            hostname: &id,
            default_user: "user",
        };
        let patience = site.vmm.info().deadline(INIT_PATIENCE);
        machine
            .guest
            .init(&identity, &machine.host_token(), patience)
            .await?;
        machine.guest.set_token(token.clone());
        phases.note("init", clock);
        self.activity.touch();
        Ok((journal, token))
    }

    /// Serves requests until the sandbox ends, by request, by its clock or by itself.
    async fn run(mut self, machine: LiveMachine, mut journal: Journal) {
        let mut exited = machine.vm.exited();
        let (state, reason, asked) = loop {
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(Request::SetLifetime(lifetime, answer)) => {
                        let set = self.set_lifetime(lifetime, &machine, &mut journal);
                        // The asker may have hung up; the limit holds all the same.
                        let _ = answer.send(set);
                    }
                    Some(Request::Destroy(answer)) => {
                        break (SandboxState::Stopped, None, Some(answer));
                    }
                    // All handles are gone: the agent is ending and leaves the VM running.
                    None => return,
                },
                ended = exited.wait_for(Option::is_some) => {
                    let how = ended.ok().and_then(|reason| Some(reason.as_ref()?.to_string()));
                    let how = how.unwrap_or_else(|| "its machine is not watched any more".into());
                    break (SandboxState::Error, Some(last_words(&machine, &how)), None);
                }
                over = nap(journal.lifetime.deadline(self.activity.last())) => {
                    if over && self.is_over(&journal) {
                        let reason = "its time was over".to_owned();
                        break (SandboxState::Stopped, Some(reason), None);
                    }
                }
            }
        };
        tracing::info!(sandbox = %self.id, %state, reason = reason.as_deref(), "ends");
        self.set(SandboxState::Stopping, reason.clone());
        set_live(&self.live, None);
        machine.give_back(&self.common.site).await;
        self.set(state, reason);
        if let Some(answer) = asked {
            let _ = answer.send(Ok(()));
        }
        self.refuse_rest();
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
        changed
            .write(&machine.folder)
            .map_err(|source| SandboxError::Journal {
                id: self.id,
                source,
            })?;
        *journal = changed;
        self.view.send_modify(|view| view.lifetime = lifetime);
        Ok(())
    }

    /// Requests that came too late: whoever wanted an end has it.
    fn refuse_rest(&mut self) {
        self.requests.close();
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Destroy(answer) => drop(answer.send(Ok(()))),
                Request::SetLifetime(_, answer) => {
                    drop(answer.send(Err(SandboxError::NotFound(self.id))));
                }
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

fn last_words(machine: &LiveMachine, how: &str) -> String {
    let console = machine.vm.console_tail(LAST_WORDS).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    match console.trim() {
        "" => how.to_owned(),
        console => format!("{how}; its console ended with: {console}"),
    }
}
