//! Machines that wait: restored from the default template, warmed by running what a first
//! command runs, and stopped. Giving one out costs a resume and a run of the restore hook.
//!
//! Why warm: under emulation a fresh restore translates every instruction anew, and
//! `bash -l -c true` takes 215 ms instead of some tens.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::guest::Identity;
use crate::machine::{LiveMachine, MachineError, Origin, Phases, Site, restore};
use crate::template::{LoadedTemplate, TemplateStore, WarmUp, warm};

/// How long a restored machine may take until its guest agent has run the hook.
const INIT_PATIENCE: Duration = Duration::from_secs(20);
/// After a failed attempt to make one, the pool waits so long.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Waiting machines of one template.
pub struct Pool {
    site: Arc<Site>,
    templates: Arc<TemplateStore>,
    waiting: Mutex<VecDeque<LiveMachine>>,
    /// Poked whenever one was taken.
    wanted: Notify,
    /// Creates under way that found the pool empty; while there are any, the processor is
    /// theirs and the pool makes none.
    busy: Arc<tokio::sync::RwLock<()>>,
    closing: watch::Sender<bool>,
}

impl Pool {
    /// An empty pool; [`Pool::keep_filled`] fills it.
    pub fn new(site: Arc<Site>, templates: Arc<TemplateStore>) -> Arc<Self> {
        Arc::new(Pool {
            site,
            templates,
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

    /// Held while a machine is restored for somebody who waits: the pool pauses.
    pub async fn pause(&self) -> tokio::sync::OwnedRwLockReadGuard<()> {
        self.busy.clone().read_owned().await
    }

    /// Keeps `size` machines of `template` ready until the pool is closed.
    pub fn keep_filled(self: &Arc<Self>, template: String, size: usize) -> JoinHandle<()> {
        let pool = self.clone();
        tokio::spawn(async move {
            while !*pool.closing.borrow() {
                if pool.ready() >= size {
                    tokio::select! {
                        () = pool.wanted.notified() => continue,
                        () = pool.closed() => return,
                    }
                }
                // Waits for creates under way, and does not hold up later ones.
                drop(pool.busy.write().await);
                let made = match pool.templates.get(&pool.site, &template, None).await {
                    Ok(loaded) => pool.make(&loaded).await.map_err(|e| e.to_string()),
                    Err(error) => Err(error.to_string()),
                };
                match made {
                    Ok(machine) => pool.waiting().push_back(machine),
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
                // No connection lasts across the stop (G26): who waits holds none.
                machine.reset_guest();
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
    }
}
