//! What the whole agent shares: what the host has told it, and whether the guest is frozen.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use crate::auth::AccessToken;
use crate::cgroups::Cgroups;
use crate::handover::Handover;

/// How long a request waits for the end of a freeze.
pub const FREEZE_WAIT: Duration = Duration::from_secs(5);

/// What does not change while the agent runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Inside a VM of ours: restore hook, cgroups, clock and kernel randomness are ours.
    pub in_vm: bool,
    /// Port the agent listens on, which is never forwarded.
    pub port: u16,
    /// The user of requests that name none, until `/init` names another.
    pub default_user: String,
    /// Soft and hard limit of open files for programs, where the agent has raised its own.
    pub child_open_files: Option<(u64, u64)>,
}

/// What the host has told us, replaced as a whole by each `/init`.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Demanded of every request; `None`: the agent is open.
    pub access_token: Option<AccessToken>,
    /// The user of requests that name none.
    pub default_user: String,
    /// Where programs start whose request does not say.
    pub default_workdir: Option<PathBuf>,
    /// Variables of every program: the sandbox's identity, then those that were given.
    pub envs: BTreeMap<String, String>,
    /// Those that were given.
    pub given_envs: BTreeMap<String, String>,
    /// Whether `/init` has been called; inside a VM nobody else is heard before.
    pub initialised: bool,
    /// Identity of this sandbox.
    pub sandbox_id: Option<String>,
    /// Identity of the template it comes from.
    pub template_id: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct State {
    /// What does not change.
    pub settings: Settings,
    /// Where programs are born.
    pub cgroups: Cgroups,
    /// Who keeps what a crash would lose; none outside a guest.
    pub handover: Option<Arc<Handover>>,
    config: RwLock<Arc<Config>>,
    gate: Arc<tokio::sync::RwLock<()>>,
}

/// The guest is frozen and did not thaw while a request waited.
#[derive(Debug, thiserror::Error)]
#[error("the sandbox is being frozen or restored; try again")]
pub struct Frozen;

impl State {
    /// The state of a new agent: no token, the settings' default user.
    pub fn new(
        settings: Settings,
        cgroups: Cgroups,
        handover: Option<Arc<Handover>>,
    ) -> Arc<State> {
        let config = Config {
            default_user: settings.default_user.clone(),
            ..Config::default()
        };
        Arc::new(State {
            settings,
            cgroups,
            handover,
            config: RwLock::new(Arc::new(config)),
            gate: Arc::default(),
        })
    }

    /// What the host has told us last.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces it.
    pub fn set_config(&self, config: Config) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    /// Waits until the guest is not frozen; while the guard lives, no freeze begins. For
    /// what must not be caught half-way, such as starting a program.
    pub async fn enter(&self) -> Result<OwnedRwLockReadGuard<()>, Frozen> {
        tokio::time::timeout(FREEZE_WAIT, Arc::clone(&self.gate).read_owned())
            .await
            .map_err(|_| Frozen)
    }

    /// Waits until all that entered have left; while the guard lives, nobody enters.
    pub async fn close_gate(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.gate).write_owned().await
    }
}
