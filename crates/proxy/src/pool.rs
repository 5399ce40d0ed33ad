//! Connections into guests: kept alive, shared per port, ended together.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::task::JoinSet;
use wrenn_types::SandboxId;

use crate::{GuestStream, Target};

/// Idle connections kept per port. More are closed as they become idle.
const MAX_IDLE: usize = 16;

/// An idle connection is not used again after this long: the program in the guest may be about to
/// close it.
const IDLE_FOR: Duration = Duration::from_secs(15);

/// All connections of one sandbox. Dropping it ends them.
#[derive(Default)]
struct Connections {
    /// Drives connections and tunnels; aborted when dropped.
    tasks: JoinSet<()>,
    idle: HashMap<u16, Vec<Idle>>,
}

struct Idle {
    sender: SendRequest<Body>,
    since: Instant,
}

/// Connections into guests.
#[derive(Default, Clone)]
pub(crate) struct Pool {
    sandboxes: Arc<Mutex<HashMap<SandboxId, Connections>>>,
}

impl Pool {
    /// The lock is held for map operations only and never across a panic that leaves them half done.
    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Connections>> {
        self.sandboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle connection to this port that is still good.
    pub(crate) fn take(&self, target: Target) -> Option<SendRequest<Body>> {
        let mut sandboxes = self.lock();
        let idle = sandboxes
            .get_mut(&target.sandbox)?
            .idle
            .get_mut(&target.port)?;
        while let Some(Idle { sender, since }) = idle.pop() {
            if sender.is_ready() && since.elapsed() < IDLE_FOR {
                return Some(sender);
            }
        }
        None
    }

    /// Speaks HTTP/1.1 on a fresh connection.
    pub(crate) async fn open(
        &self,
        target: Target,
        stream: GuestStream,
    ) -> Result<SendRequest<Body>, hyper::Error> {
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .handshake(TokioIo::new(stream))
            .await?;
        self.run(target.sandbox, async move {
            // How it ended is told to whoever waits for an answer on it.
            let _ = connection.with_upgrades().await;
        });
        Ok(sender)
    }

    /// Gives a connection back once its exchange is over, if it can carry another.
    pub(crate) fn give_back(&self, target: Target, mut sender: SendRequest<Body>) {
        let pool = self.clone();
        self.run(target.sandbox, async move {
            if sender.ready().await.is_err() {
                return;
            }
            if let Some(connections) = pool.lock().get_mut(&target.sandbox) {
                let idle = connections.idle.entry(target.port).or_default();
                idle.retain(|i| i.sender.is_ready() && i.since.elapsed() < IDLE_FOR);
                if idle.len() < MAX_IDLE {
                    let since = Instant::now();
                    idle.push(Idle { sender, since });
                }
            }
        });
    }

    /// Runs a task that must not outlive the sandbox's connections.
    pub(crate) fn run(&self, sandbox: SandboxId, task: impl Future<Output = ()> + Send + 'static) {
        let mut sandboxes = self.lock();
        let connections = sandboxes.entry(sandbox).or_default();
        while connections.tasks.try_join_next().is_some() {}
        connections.tasks.spawn(task);
    }

    /// Closes a sandbox's idle connections; busy ones go on.
    pub(crate) fn drop_idle(&self, sandbox: SandboxId) {
        if let Some(connections) = self.lock().get_mut(&sandbox) {
            connections.idle.clear();
        }
    }

    /// Ends all of a sandbox's connections.
    pub(crate) fn forget(&self, sandbox: SandboxId) {
        let gone = self.lock().remove(&sandbox);
        // Dropped outside of the lock: what it aborts may want it.
        drop(gone);
    }

    /// Closes what has been idle for too long and drops what is empty.
    pub(crate) fn prune(&self) {
        self.lock().retain(|_, connections| {
            while connections.tasks.try_join_next().is_some() {}
            connections.idle.retain(|_, idle| {
                idle.retain(|i| i.sender.is_ready() && i.since.elapsed() < IDLE_FOR);
                !idle.is_empty()
            });
            !connections.tasks.is_empty()
        });
    }

    /// Open connections and tunnels of a sandbox.
    pub(crate) fn count(&self, sandbox: SandboxId) -> usize {
        let mut sandboxes = self.lock();
        let Some(connections) = sandboxes.get_mut(&sandbox) else {
            return 0;
        };
        while connections.tasks.try_join_next().is_some() {}
        connections.tasks.len()
    }
}
