//! The pool: slots made ahead of time, handed out, recycled.
//!
//! ```text
//!            make ──▶ idle ──take──▶ taken ──give_back──▶ recycling ──▶ idle
//!                                      ▲                      │ (damaged, or enough idle)
//!  left by an earlier agent ──adopt────┘                      └──▶ removed
//!                           └─sweep──▶ removed
//! ```
//!
//! Making and removing run in the background; a slot is in exactly one of these states, by
//! index, so that no index is used twice.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, Semaphore, oneshot};

use crate::config::NetConfig;
use crate::error::NetError;
use crate::host::Host;
use crate::netns::{Visitor, on_own_thread};
use crate::plumbing::{self, Plumbing};
use crate::slot::{Slot, blocking};
use crate::sweep::{self, SweepReport};

/// Slots made or removed at the same time. The work is mostly waiting for the kernel, but it
/// waits under the lock of all links, so more would only queue.
const PARALLEL: usize = 2;

/// Numbers about the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStats {
    /// Slots ready to be taken.
    pub ready: usize,
    /// Slots in use by this process.
    pub taken: usize,
    /// Slots being made, recycled or removed.
    pub working: usize,
    /// Slots of an earlier agent, neither adopted nor swept yet.
    pub left_over: usize,
    /// The limit for all of them together.
    pub max_slots: usize,
    /// Whether the host forwarded IPv4 packets before the pool was first started here; it must
    /// and does now, and this is left as it is afterwards.
    pub forwarded_before: bool,
}

/// The pool of network slots of this host. Clones are handles to the same pool.
#[derive(Debug, Clone)]
pub struct SlotPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Arc<NetConfig>,
    visitor: Visitor,
    host: Host,
    state: Mutex<State>,
    workers: Semaphore,
    /// Called whenever background work ends.
    work_ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    idle: VecDeque<Arc<Plumbing>>,
    taken: HashSet<u32>,
    working: HashSet<u32>,
    left_over: HashSet<u32>,
    making: usize,
    /// Takers that found nothing: told when there may be something, or why there is not.
    waiting: VecDeque<oneshot::Sender<Result<(), NetError>>>,
    closed: bool,
}

impl State {
    fn total(&self) -> usize {
        self.idle.len() + self.taken.len() + self.working.len() + self.left_over.len()
    }

    fn free_index(&self, max: usize) -> Option<u32> {
        if self.total() >= max {
            return None;
        }
        // Left-overs of an agent with a higher limit may have any index.
        (1..).find(|index| {
            !self.taken.contains(index)
                && !self.working.contains(index)
                && !self.left_over.contains(index)
                && !self.idle.iter().any(|slot| slot.index == *index)
        })
    }

    fn tell_next(&mut self, mut news: Result<(), NetError>) {
        while let Some(taker) = self.waiting.pop_front() {
            match taker.send(news) {
                Ok(()) => return,
                Err(unheard) => news = unheard,
            }
        }
        if let Err(error) = news {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no network slot could be made"
            );
        }
    }
}

impl SlotPool {
    /// Sets the host up (IPv4 forwarding, the nftables table), makes the first slot if any are
    /// to be kept ready, and starts making the others. Slots of an earlier agent are left
    /// alone until [`Self::adopt`] or [`Self::sweep`].
    ///
    /// # Errors
    /// [`NetError::NotRoot`], [`NetError::BadSetting`], [`NetError::InUse`],
    /// [`NetError::SubnetClash`], [`NetError::MissingFeature`], [`NetError::Step`].
    pub async fn start(config: NetConfig) -> Result<Self, NetError> {
        config.check()?;
        let config = Arc::new(config);
        let for_host = Arc::clone(&config);
        let (host, found) = blocking(move || {
            let host = Host::set_up(&for_host)?;
            let found = sweep::find(&for_host)?;
            Ok::<_, NetError>((host, found))
        })
        .await??;
        let visitor =
            Visitor::start().map_err(|e| NetError::step("start a thread", "wrenn-netns", e))?;
        let pool = Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    left_over: found,
                    ..State::default()
                }),
                config,
                visitor,
                host,
                workers: Semaphore::new(PARALLEL),
                work_ended: Notify::new(),
            }),
        };
        if pool.shared.config.ready > 0 {
            // The proof that this kernel can do all that a slot needs, before anybody waits.
            let slot = pool.take_slot().await?;
            let mut state = pool.shared.lock();
            state.taken.remove(&slot.index);
            state.idle.push_back(slot);
        }
        pool.shared.refill();
        Ok(pool)
    }

    /// Takes a slot: a ready one in microseconds, else one that is made meanwhile (tens of
    /// milliseconds). Cancelling is safe.
    ///
    /// # Errors
    /// [`NetError::OutOfSlots`], [`NetError::Closed`], and what making one may fail with.
    pub async fn take(&self) -> Result<Slot, NetError> {
        Ok(self.slot(self.take_slot().await?))
    }

    async fn take_slot(&self) -> Result<Arc<Plumbing>, NetError> {
        loop {
            let news = {
                let mut state = self.shared.lock();
                if state.closed {
                    return Err(NetError::Closed);
                }
                if let Some(slot) = state.idle.pop_front() {
                    state.taken.insert(slot.index);
                    drop(state);
                    self.shared.refill();
                    return Ok(slot);
                }
                // With background work under way a slot may yet come free.
                let max = self.shared.config.max_slots;
                if state.working.is_empty() && state.total() >= max {
                    return Err(NetError::OutOfSlots { max });
                }
                let (taker, news) = oneshot::channel();
                state.waiting.push_back(taker);
                news
            };
            self.shared.refill();
            news.await.unwrap_or(Err(NetError::Closed))?;
        }
    }

    fn slot(&self, plumbing: Arc<Plumbing>) -> Slot {
        Slot::new(
            plumbing,
            Arc::clone(&self.shared.config),
            self.shared.visitor.clone(),
        )
    }

    /// Gives a slot back. Its dialers stop working; its tap must be closed by now or within two
    /// seconds; its connections are forgotten and its policy reset. It then goes back to the
    /// pool or, if the pool is full or the slot did not come clean, is removed in the
    /// background. Goes on to the end even if the caller does not wait for it.
    pub async fn give_back(&self, slot: Slot) {
        slot.held.store(false, Ordering::Release);
        let plumbing = Arc::clone(&slot.plumbing);
        drop(slot);
        {
            let mut state = self.shared.lock();
            if !state.taken.remove(&plumbing.index) {
                tracing::error!(
                    slot = plumbing.name,
                    "given back to a pool it was not taken from"
                );
                return;
            }
            state.working.insert(plumbing.index);
        }
        let shared = Arc::clone(&self.shared);
        let work = tokio::spawn(async move { shared.recycle(plumbing).await });
        if let Err(error) = work.await {
            tracing::error!(%error, "recycling a network slot was cut short");
        }
    }

    /// Takes over the slot of a living machine that an earlier agent started.
    ///
    /// # Errors
    /// [`NetError::NoSuchSlot`] if it does not exist, [`NetError::AlreadyTaken`] if this pool
    /// handed it out itself.
    pub async fn adopt(&self, index: u32) -> Result<Slot, NetError> {
        {
            let mut state = self.shared.lock();
            let idle = state.idle.iter().any(|slot| slot.index == index);
            if idle || state.taken.contains(&index) || state.working.contains(&index) {
                return Err(NetError::AlreadyTaken { index });
            }
            state.left_over.remove(&index);
            state.taken.insert(index);
        }
        let config = Arc::clone(&self.shared.config);
        let opened = on_own_thread(move || plumbing::open(&config, index))
            .await
            .map_err(|e| NetError::step("start a thread", "adopt", e))
            .and_then(|opened| opened);
        match opened {
            Ok(plumbing) => Ok(self.slot(Arc::new(plumbing))),
            Err(error) => {
                let mut state = self.shared.lock();
                state.taken.remove(&index);
                // Whatever there is of it is the next sweep's.
                if !matches!(error, NetError::NoSuchSlot { .. }) {
                    state.left_over.insert(index);
                }
                Err(error)
            }
        }
    }

    /// Numbers about the pool.
    pub fn stats(&self) -> PoolStats {
        let state = self.shared.lock();
        PoolStats {
            ready: state.idle.len(),
            taken: state.taken.len(),
            working: state.working.len(),
            left_over: state.left_over.len(),
            max_slots: self.shared.config.max_slots,
            forwarded_before: self.shared.host.forwarded_before,
        }
    }

    /// Removes what earlier agents left and nobody uses: all namespaces and links of our name
    /// whose index is neither in `in_use` nor this pool's own.
    ///
    /// # Errors
    /// [`NetError::Step`] if the host's namespaces or links cannot be listed. What could not be
    /// removed is in the report.
    pub async fn sweep(&self, in_use: &HashSet<u32>) -> Result<SweepReport, NetError> {
        let config = Arc::clone(&self.shared.config);
        let found = blocking(move || sweep::find(&config)).await??;
        let doomed: Vec<u32> = {
            let mut state = self.shared.lock();
            let ours = |index: &u32| {
                state.taken.contains(index)
                    || state.working.contains(index)
                    || state.idle.iter().any(|slot| slot.index == *index)
            };
            let doomed: Vec<u32> = found
                .iter()
                .copied()
                .filter(|index| !in_use.contains(index) && !ours(index))
                .collect();
            state.left_over = found
                .into_iter()
                .filter(|index| in_use.contains(index) && !ours(index))
                .collect();
            state.working.extend(&doomed);
            doomed
        };
        let config = Arc::clone(&self.shared.config);
        let swept = doomed.clone();
        let report = blocking(move || sweep::remove_all(&config, &swept)).await;
        let mut state = self.shared.lock();
        for index in doomed {
            state.working.remove(&index);
            if report
                .as_ref()
                .is_ok_and(|report| report.failed.iter().any(|(of, _)| *of == index))
            {
                state.left_over.insert(index);
            }
        }
        drop(state);
        self.shared.refill();
        report
    }

    /// Ends the pool: idle slots are removed; taken ones stay for a later agent, and while
    /// there are any the host's table stays too, for it protects the host from them.
    pub async fn shutdown(&self) {
        let idle = {
            let mut state = self.shared.lock();
            state.closed = true;
            while let Some(taker) = state.waiting.pop_front() {
                // A taker that gave up needs no answer.
                drop(taker.send(Err(NetError::Closed)));
            }
            let idle: Vec<_> = state.idle.drain(..).collect();
            state.working.extend(idle.iter().map(|slot| slot.index));
            idle
        };
        for slot in idle {
            let shared = Arc::clone(&self.shared);
            tokio::spawn(async move { shared.discard(slot).await });
        }
        loop {
            let ended = self.shared.work_ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.shared.lock().working.is_empty() {
                break;
            }
            ended.await;
        }
        let (taken, left_over) = {
            let state = self.shared.lock();
            (state.taken.len(), state.left_over.len())
        };
        if taken + left_over > 0 {
            tracing::info!(
                taken,
                left_over,
                "network slots stay for the sandboxes that run on"
            );
        } else {
            let shared = Arc::clone(&self.shared);
            let removed = blocking(move || shared.host.tear_down(&shared.config)).await;
            if let Err(error) = removed.and_then(|removed| removed) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "the host's nftables table stays");
            }
        }
        // Not left to the last clone of the pool: the next process may start now.
        self.shared.host.release();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while locked cannot leave it half-changed in a way that matters: sets only.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts making as many slots as are wanted and allowed.
    fn refill(self: &Arc<Self>) {
        let mut state = self.lock();
        while !state.closed
            && state.idle.len() + state.making < self.config.ready + state.waiting.len()
        {
            let max = self.config.max_slots;
            let Some(index) = state.free_index(max) else {
                // Nothing under way that could free one: nobody must wait for ever.
                while state.working.is_empty() && !state.waiting.is_empty() {
                    state.tell_next(Err(NetError::OutOfSlots { max }));
                }
                return;
            };
            state.working.insert(index);
            state.making += 1;
            let shared = Arc::clone(self);
            tokio::spawn(async move { shared.make(index).await });
        }
    }

    async fn make(self: Arc<Self>, index: u32) {
        let permit = self.workers.acquire().await;
        let config = Arc::clone(&self.config);
        let made = on_own_thread(move || plumbing::make(&config, index))
            .await
            .map_err(|e| NetError::step("start a thread", "make", e))
            .and_then(|made| made);
        drop(permit);
        let doomed = {
            let mut state = self.lock();
            state.making -= 1;
            match made {
                Ok(slot) if state.closed => Some(slot),
                Ok(slot) => {
                    state.working.remove(&index);
                    state.idle.push_back(Arc::new(slot));
                    state.tell_next(Ok(()));
                    None
                }
                Err(error) => {
                    state.working.remove(&index);
                    state.tell_next(Err(error));
                    None
                }
            }
        };
        if let Some(slot) = doomed {
            return self.discard(Arc::new(slot)).await;
        }
        self.work_ended.notify_waiters();
        // Others who wait get their own attempt, and if it fails the reason; without them a
        // failure is not repeated until somebody takes a slot.
        if !self.lock().waiting.is_empty() {
            self.refill();
        }
    }

    async fn recycle(self: Arc<Self>, slot: Arc<Plumbing>) {
        let cleaned = self.clean(&slot).await;
        if let Err(error) = &cleaned {
            let error: &dyn std::error::Error = error;
            tracing::warn!(
                slot = slot.name,
                error,
                "a network slot did not come clean and is removed"
            );
        }
        {
            let mut state = self.lock();
            let wanted = state.idle.len() < self.config.ready || !state.waiting.is_empty();
            if cleaned.is_ok() && wanted && !state.closed {
                state.working.remove(&slot.index);
                state.idle.push_back(slot);
                state.tell_next(Ok(()));
                drop(state);
                self.work_ended.notify_waiters();
                return;
            }
        }
        tokio::spawn(async move { self.discard(slot).await });
    }

    async fn clean(&self, slot: &Arc<Plumbing>) -> Result<(), NetError> {
        let config = Arc::clone(&self.config);
        let plumbing = Arc::clone(slot);
        blocking(move || plumbing.recycle(&config)).await??;
        // Nobody may still listen where the next guest will ask for names.
        self.visitor
            .visit(&slot.namespace, || plumbing::bind_dns().map(drop))
            .await
            .map_err(|e| NetError::step("find the resolver's port free", slot.name.clone(), e))
    }

    async fn discard(self: Arc<Self>, slot: Arc<Plumbing>) {
        let permit = self.workers.acquire().await;
        let (index, name) = (slot.index, slot.name.clone());
        drop(slot);
        let subject = name.clone();
        let config = Arc::clone(&self.config);
        let removed = on_own_thread(move || plumbing::remove(&config, &subject))
            .await
            .map_err(|e| NetError::step("start a thread", "remove", e))
            .and_then(|removed| removed);
        drop(permit);
        {
            let mut state = self.lock();
            state.working.remove(&index);
            if let Err(error) = removed {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(
                    slot = name,
                    error,
                    "a network slot stays until the next sweep"
                );
                state.left_over.insert(index);
            }
        }
        self.work_ended.notify_waiters();
        self.refill();
    }
}
