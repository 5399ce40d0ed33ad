//! Machines that wait: restored from the default template, warmed by running what a first
//! command runs, and stopped. Giving one out costs a resume and a run of the restore hook.
//!
//! Why warm: under emulation a fresh restore translates every instruction anew, and
//! `bash -l -c true` takes 215 ms instead of some tens.
//!
//! What was saved can only be restored when it is known what it is. For that monitors stand by,
//! started over the templates of which sandboxes were saved lately; see [`standbys`].

mod standbys;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use self::standbys::Standbys;
use crate::guest::Identity;
use crate::machine::{LiveMachine, MachineError, Origin, Phases, Site, Standby, restore};
use crate::template::{LoadedTemplate, TemplateStore, WarmUp, warm};

/// How long a restored machine may take until its guest agent has run the hook.
const INIT_PATIENCE: Duration = Duration::from_secs(20);
/// After a failed attempt to make one, the pool waits so long.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// A monitor is started to stand by so long after it was seen that one is lacking.
const STANDBY_PAUSE: Duration = Duration::from_secs(1);
/// What a guest is given to notice that its connections are closed.
const SETTLES: Duration = Duration::from_millis(30);

/// Waiting machines.
pub struct Pool {
    site: Arc<Site>,
    templates: Arc<TemplateStore>,
    /// How many warmed machines shall wait. At 0 nothing waits.
    size: usize,
    standbys: Standbys,
    waiting: Mutex<VecDeque<LiveMachine>>,
    /// Poked whenever one was taken.
    wanted: Notify,
    /// Creates under way that found the pool empty; while there are any, the processor is
    /// theirs and the pool makes none.
    busy: Arc<tokio::sync::RwLock<()>>,
    closing: watch::Sender<bool>,
}

impl Pool {
    /// An empty pool for `size` warmed machines; [`Pool::keep_filled`] fills it.
    pub fn new(site: Arc<Site>, templates: Arc<TemplateStore>, size: usize) -> Arc<Self> {
        Arc::new(Pool {
            site,
            templates,
            size,
            standbys: Standbys::default(),
            waiting: Mutex::default(),
            wanted: Notify::new(),
            busy: Arc::default(),
            closing: watch::Sender::new(false),
        })
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<LiveMachine>> {
        // The queue is whole whatever its last user did.
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// How many wait.
    pub fn ready(&self) -> usize {
        self.waiting().len()
    }

    /// A waiting machine of this template, if there is one that lives.
    pub async fn take(&self, template: &LoadedTemplate) -> Option<LiveMachine> {
        loop {
            let machine = {
                let mut waiting = self.waiting();
                let fits = |m: &LiveMachine| m.record.template_digest == template.digest;
                let at = waiting.iter().position(fits)?;
                waiting.remove(at)?
            };
            self.wanted.notify_one();
            if machine.vm.exited().borrow().is_none() {
                return Some(machine);
            }
            tracing::warn!(folder = %machine.folder.display(), "a waiting machine had died");
            machine.give_back(&self.site).await;
        }
    }

    /// A sandbox over this template was saved: what was saved is likely to be restored.
    pub fn expect(&self, template_digest: &str) {
        if self.size > 0 && self.site.vmm.info().stands_by {
            self.standbys.expect(template_digest);
            self.wanted.notify_one();
        }
    }

    /// A monitor that stands by over this template, if there is one that lives.
    pub async fn stand_in(&self, template: &LoadedTemplate) -> Option<Standby> {
        loop {
            let standby = self.standbys.take(template)?;
            self.wanted.notify_one();
            if standby.lives() {
                return Some(standby);
            }
            tracing::warn!("a monitor that stood by had died");
            standby.give_back(&self.site).await;
        }
    }

    /// Held while a machine is restored for somebody who waits: the pool pauses.
    pub async fn pause(&self) -> tokio::sync::OwnedRwLockReadGuard<()> {
        self.busy.clone().read_owned().await
    }

    /// Keeps warmed machines of `template` ready, and monitors standing by, until the pool is
    /// closed.
    pub fn keep_filled(self: &Arc<Self>, template: String) -> JoinHandle<()> {
        let pool = self.clone();
        tokio::spawn(async move {
            while !*pool.closing.borrow() {
                for standby in pool.standbys.unwanted() {
                    standby.give_back(&pool.site).await;
                }
                let lacking = match pool.ready() < pool.size {
                    true => None,
                    false => match pool.standbys.lacking() {
                        Some(digest) => Some(digest),
                        None => {
                            tokio::select! {
                                () = pool.wanted.notified() => {}
                                () = pool.standbys.next_unwanted() => {}
                                () = pool.closed() => return,
                            }
                            continue;
                        }
                    },
                };
                // Waits for creates under way, and does not hold up later ones.
                drop(pool.busy.write().await);
                let made = match &lacking {
                    None => pool.add_warm(&template).await,
                    Some(digest) => pool.add_standby(digest).await,
                };
                match made {
                    Ok(()) => {}
                    Err(_) if *pool.closing.borrow() => return,
                    Err(error) => {
                        tracing::warn!(%error, "the pool could not make a machine");
                        tokio::select! {
                            () = tokio::time::sleep(RETRY_PAUSE) => {}
                            () = pool.closed() => return,
                        }
                    }
                }
            }
        })
    }

    async fn add_warm(&self, template: &str) -> Result<(), String> {
        let loaded = self.templates.get(&self.site, template, None).await;
        let loaded = loaded.map_err(|e| e.to_string())?;
        let machine = self.make(&loaded).await.map_err(|e| e.to_string())?;
        self.waiting().push_back(machine);
        Ok(())
    }

    async fn add_standby(&self, digest: &str) -> Result<(), String> {
        tokio::select! {
            // Whoever was just restored has the processor first.
            () = tokio::time::sleep(STANDBY_PAUSE) => {}
            // A warmed machine may be lacking, which comes first.
            () = self.wanted.notified() => return Ok(()),
            () = self.closed() => return Ok(()),
        }
        match self.start_standby(digest).await {
            Ok(standby) => {
                self.standbys.add(standby);
                Ok(())
            }
            Err(error) => {
                // As of a template of another monitor. The next save asks again.
                self.standbys.forget(digest);
                Err(error)
            }
        }
    }

    async fn start_standby(&self, digest: &str) -> Result<Standby, String> {
        let loaded = self.templates.of_snapshot(digest).await;
        let loaded = loaded.map_err(|e| e.to_string())?;
        let standby = Standby::start(&self.site, &loaded).await;
        standby.map_err(|e| e.to_string())
    }

    async fn make(&self, template: &Arc<LoadedTemplate>) -> Result<LiveMachine, MachineError> {
        let started = Instant::now();
        let mut phases = Phases::default();
        let origin = Origin::template(template.clone());
        let (mut machine, restore_id) = restore(&self.site, &origin, &mut phases).await?;
        let prepare = async {
            machine.vm.resume().await?;
            let token = machine.host_token();
            let identity = Identity {
                restore_id: &restore_id,
                generation: machine.record.generation,
                access_token: token.reveal(),
                env_vars: &BTreeMap::new(),
                sandbox_id: "",
                template_id: &template.manifest.name,
                hostname: "wrenn",
                default_user: "user",
            };
            let patience = self.site.vmm.info().deadline(INIT_PATIENCE);
            machine.guest.init(&identity, &token, patience).await?;
            machine.guest.set_token(Some(token));
            warm(&machine.guest, WarmUp::POOL).await?;
            // No connection lasts across the stop (G26): who waits holds none, and has put its
            // end away, lest it be busy with that when it is wanted.
            machine.reset_guest();
            tokio::time::sleep(SETTLES).await;
            machine.vm.stop().await?;
            Ok::<(), MachineError>(())
        };
        // Cut short when the pool closes, so that nobody waits for a machine to warm up
        // that is not needed any more.
        let prepared = tokio::select! {
            prepared = prepare => prepared,
            () = self.closed() => Err(MachineError::PoolClosed),
        };
        match prepared {
            Ok(()) => {
                tracing::debug!(took_ms = started.elapsed().as_millis(), "a machine waits");
                Ok(machine)
            }
            Err(error) => {
                machine.give_back(&self.site).await;
                Err(error)
            }
        }
    }

    async fn closed(&self) {
        // The sender lives as long as the pool.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }

    /// Makes no more machines and ends those that wait. `filler` is what
    /// [`Pool::keep_filled`] returned.
    pub async fn close(&self, filler: JoinHandle<()>) {
        self.closing.send_replace(true);
        if let Err(error) = filler.await {
            tracing::error!(%error, "the task that fills the pool broke");
        }
        let machines: Vec<_> = self.waiting().drain(..).collect();
        for machine in machines {
            machine.give_back(&self.site).await;
        }
        for standby in self.standbys.drain() {
            standby.give_back(&self.site).await;
        }
    }
}
