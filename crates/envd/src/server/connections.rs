//! Connections across a freeze.
//!
//! ```text
//!   accepted (epoch e) ──prepare──▶ closes as soon as it is idle after a request; epoch e+1
//!                                   begins
//!                      ──restore──▶ closed at once, if it is of an older epoch
//! ```
//!
//! What is accepted while the guest is prepared may be accepted before the freeze or after
//! the restore. So it is marked with the identity the machine has at that moment, and a
//! restore closes it too unless the mark is its own. Until then it is [`Guard::brief`]: it
//! carries one request, lest it be open and idle at the freeze.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// When this many connections were open and most of them have gone, their memory is given
/// back to the kernel.
const CROWD: usize = 128;

/// What a connection is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Serve.
    Serve,
    /// Finish what is under way, take nothing new.
    Finish,
    /// Close now.
    Close,
}

/// Names a connection in the requests it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

#[derive(Debug)]
struct Tracked {
    epoch: u64,
    /// The machine's identity when it was accepted, if that was while prepared.
    mark: Option<String>,
    brief: Arc<AtomicBool>,
    order: watch::Sender<Order>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    epoch: u64,
    prepared: bool,
    /// The identity for which old connections were closed last.
    restored_for: Option<String>,
    /// The most that were open since memory was last given back.
    peak: usize,
    open: HashMap<ConnectionId, Tracked>,
}

/// See the module.
#[derive(Debug)]
pub struct Connections {
    inner: Mutex<Inner>,
}

impl Connections {
    /// No connections, on a machine with this identity.
    pub fn new(identity: Option<String>) -> Arc<Connections> {
        let inner = Inner {
            restored_for: identity,
            ..Inner::default()
        };
        Arc::new(Connections {
            inner: Mutex::new(inner),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tracks a new connection. `identity` is asked for the machine's identity only while
    /// the guest is prepared.
    pub fn accepted(self: &Arc<Self>, identity: impl FnOnce() -> Option<String>) -> Guard {
        let prepared = self.lock().prepared;
        let mark = if prepared { identity() } else { None };
        let (order, orders) = watch::channel(Order::Serve);
        let mut inner = self.lock();
        inner.next += 1;
        let id = ConnectionId(inner.next);
        let brief = Arc::new(AtomicBool::new(prepared));
        let tracked = Tracked {
            epoch: inner.epoch,
            mark,
            brief: Arc::clone(&brief),
            order,
        };
        inner.open.insert(id, tracked);
        inner.peak = inner.peak.max(inner.open.len());
        Guard {
            id,
            orders,
            brief,
            all: Arc::clone(self),
        }
    }

    /// Before a freeze: all connections close when what they carry is done, and new ones
    /// are of a new epoch, and brief. Again is harmless.
    pub fn prepare(&self) {
        let mut inner = self.lock();
        if !inner.prepared {
            inner.epoch += 1;
            inner.prepared = true;
        }
        for tracked in inner.open.values() {
            // Never weakens an order to close.
            tracked.order.send_if_modified(|order| {
                let changed = *order == Order::Serve;
                if changed {
                    *order = Order::Finish;
                }
                changed
            });
        }
    }

    /// The freeze did not come: new connections last. Those that were told to finish do.
    pub fn undo(&self) {
        self.lock().prepared = false;
    }

    /// After a restore: closes what was accepted before it, `carrier` never. `identity` is
    /// what the machine is now. Again is harmless.
    pub fn restored(&self, carrier: Option<ConnectionId>, identity: Option<&str>) {
        let mut inner = self.lock();
        let same = inner.restored_for.as_deref() == identity;
        inner.restored_for = identity.map(str::to_owned);
        if !inner.prepared {
            if same {
                return;
            }
            // Frozen without notice: what came before the carrier may be older than the
            // restore, and cannot be told apart.
            for (id, tracked) in &inner.open {
                if carrier.is_some_and(|carrier| *id < carrier) {
                    tracked.order.send_replace(Order::Close);
                }
            }
            return;
        }
        inner.prepared = false;
        let epoch = inner.epoch;
        for (id, tracked) in &inner.open {
            let newer = tracked.epoch >= epoch && tracked.mark.as_deref() == identity;
            if newer {
                // The next request, which may be under way already, need not open another.
                tracked.brief.store(false, Ordering::Relaxed);
            } else if Some(*id) != carrier {
                tracked.order.send_replace(Order::Close);
            }
        }
    }

    /// How many are open.
    pub fn count(&self) -> usize {
        self.lock().open.len()
    }
}

/// A tracked connection; forgotten on drop.
#[derive(Debug)]
pub struct Guard {
    /// Its name.
    pub id: ConnectionId,
    /// What it is told.
    pub orders: watch::Receiver<Order>,
    /// Whether it is to close with the answer to its request.
    pub brief: Arc<AtomicBool>,
    all: Arc<Connections>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut inner = self.all.lock();
        inner.open.remove(&self.id);
        let over = inner.peak >= CROWD && inner.open.len() < inner.peak / 4;
        if over {
            inner.peak = inner.open.len();
            inner.open.shrink_to_fit();
        }
        drop(inner);
        if over {
            crate::sys::trim_heap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(guard: &Guard) -> Order {
        *guard.orders.borrow()
    }

    fn brief(guard: &Guard) -> bool {
        guard.brief.load(Ordering::Relaxed)
    }

    #[test]
    fn g25_a_restore_closes_what_is_older_and_spares_what_is_newer() {
        let all = Connections::new(Some("template".to_owned()));
        let template = || Some("template".to_owned());
        let clone = || Some("clone".to_owned());
        let old = all.accepted(template);
        assert!(!brief(&old));
        all.prepare();
        all.prepare();
        assert_eq!(order(&old), Order::Finish);
        let just_before = all.accepted(template);
        assert!(brief(&just_before));
        // Frozen and restored as another machine.
        let newer = all.accepted(clone);
        let carrier = all.accepted(clone);
        assert!(brief(&newer) && brief(&carrier));
        all.restored(Some(carrier.id), Some("clone"));
        assert!(!brief(&newer) && !brief(&carrier) && brief(&just_before));
        assert_eq!(
            (order(&old), order(&just_before)),
            (Order::Close, Order::Close)
        );
        assert_eq!(
            (order(&newer), order(&carrier)),
            (Order::Serve, Order::Serve)
        );
        let after = all.accepted(clone);
        assert!(!brief(&after));
        // Initialised again without a freeze: what came after the restore stays.
        let again = all.accepted(clone);
        all.restored(Some(again.id), Some("clone"));
        assert_eq!(
            (order(&newer), order(&carrier), order(&after)),
            (Order::Serve, Order::Serve, Order::Serve)
        );
        assert_eq!(all.count(), 6);
        drop((old, just_before, newer, carrier, after, again));
        assert_eq!(all.count(), 0);
    }

    #[test]
    fn a_freeze_without_notice_closes_what_came_before_the_carrier() {
        let all = Connections::new(None);
        let old = all.accepted(|| None);
        let carrier = all.accepted(|| None);
        let newer = all.accepted(|| None);
        // Outside a VM nothing is ever restored.
        all.restored(Some(carrier.id), None);
        assert_eq!(order(&old), Order::Serve);
        all.restored(Some(carrier.id), Some("clone"));
        assert_eq!(order(&old), Order::Close);
        assert_eq!(
            (order(&carrier), order(&newer)),
            (Order::Serve, Order::Serve)
        );
    }
}
