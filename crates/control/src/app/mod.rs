//! Use cases: what the API can do, without HTTP. Both HTTP layers only translate.

mod create;
mod diff;
mod drain;
mod exec;
mod failure;
mod files;
mod fork;
mod history;
mod idempotency;
mod info;
mod keys;
mod moves;
mod network;
mod sandboxes;
mod snapshots;

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Mutex as AsyncMutex;
use wrenn_proxy::Proxy;
use wrenn_store::{Store, Timestamp};
use wrenn_types::{SandboxId, TeamId};

pub(crate) use create::{Clock, CreateSpec, Phase};
pub(crate) use diff::{Against, Compared};
pub use drain::Everything;
pub(crate) use drain::since;
pub(crate) use exec::{ExecDone, ExecSpec, Following, Input, OUTPUT_LIMIT, ProcessEvent, Selector};
pub(crate) use failure::chain;
pub use failure::{Code, Failure};
pub(crate) use files::Upload;
pub(crate) use fork::Fork;
pub(crate) use history::EVENTS_KEEP_SECS;
pub(crate) use info::{DEFAULT_TEMPLATE, template_name};
pub(crate) use keys::NewApiKey;
pub(crate) use moves::{Certificate, Moved, Resume};
pub(crate) use sandboxes::{Destroyed, Sandbox};
pub(crate) use snapshots::{ListedTemplate, Take, TemplateKey, TemplateKind};

use crate::ControlConfig;
use crate::host::{HostClient, HostInfo};

/// The state all requests share.
pub(crate) struct App {
    pub(crate) config: ControlConfig,
    pub(crate) store: Store,
    pub(crate) host: HostClient,
    pub(crate) proxy: Proxy,
    /// Who owns what an embedded server makes.
    pub(crate) team: TeamId,
    /// When this server began: what was under way before is nobody's now.
    began: Timestamp,
    pub(crate) busy: Busy,
    /// This server is about to end and starts nothing new.
    closing: AtomicBool,
    ends: Turns,
    /// Shared while a snapshot is taken and gets its row, exclusive while the host is told which
    /// ones have none: two rows may name the same one.
    kept: tokio::sync::RwLock<()>,
    /// The host's last self-description, to check requests without asking each time.
    info: AsyncMutex<Option<(Instant, Arc<HostInfo>)>>,
}

impl App {
    pub(crate) fn new(
        config: ControlConfig,
        store: Store,
        host: HostClient,
        proxy: Proxy,
        team: TeamId,
    ) -> Self {
        App {
            config,
            store,
            host,
            proxy,
            team,
            began: Timestamp::now(),
            busy: Busy::default(),
            closing: AtomicBool::new(false),
            ends: Turns::default(),
            kept: Default::default(),
            info: AsyncMutex::new(None),
        }
    }
}

/// The sandboxes on which this process is at work right now. The reconciler leaves them alone:
/// whoever is at work will leave the transitional state by itself.
#[derive(Default, Clone)]
pub(crate) struct Busy(Arc<Mutex<HashSet<SandboxId>>>);

impl Busy {
    /// Marks a sandbox; `None` when somebody is at work on it already.
    pub(crate) fn claim(&self, id: SandboxId) -> Option<Claim> {
        let mut set = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.insert(id).then(|| Claim {
            busy: self.clone(),
            id,
        })
    }

    /// Whether somebody is at work on it.
    pub(crate) fn is_claimed(&self, id: SandboxId) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&id)
    }
}

/// A mark in [`Busy`], gone when dropped.
pub(crate) struct Claim {
    busy: Busy,
    id: SandboxId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut set = self.busy.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.remove(&self.id);
    }
}

/// One at a time for each sandbox. A few locks for all of them: that two sandboxes share one
/// costs a wait and no more.
#[derive(Default)]
struct Turns([AsyncMutex<()>; 32]);

impl Turns {
    async fn turn(&self, id: SandboxId) -> tokio::sync::MutexGuard<'_, ()> {
        // The last byte of an id is random.
        let [.., last] = *id.uuid().as_bytes();
        self.0[usize::from(last) % self.0.len()].lock().await
    }
}
