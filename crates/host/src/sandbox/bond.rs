//! What ties something that is under way in a guest to the machine it is under way in.
//!
//! A dead guest closes no connection: whoever waits for one waits for ever. So does whoever
//! waits for a machine whose place another has taken.

use std::sync::{Arc, Weak};

use tokio::sync::watch;
use wrenn_types::{SandboxId, SandboxState};

use super::SandboxError;
use super::handle::{Live, SharedLive, View};

/// Watches one machine of a sandbox, and holds nothing of it.
#[derive(Clone)]
pub struct Bond {
    pub(super) id: SandboxId,
    pub(super) view: watch::Receiver<View>,
    pub(super) shared: SharedLive,
    pub(super) machine: Weak<Live>,
}

/// What became of a machine.
pub enum Fate {
    /// It was saved and given back: its sandbox is paused.
    PutAway,
    /// The sandbox runs as this one now.
    Replaced(Arc<Live>),
    /// So did the sandbox; why.
    Ended(SandboxError),
}

impl Bond {
    /// Waits until its sandbox has this machine no more. While it is saved, which may fail,
    /// the sandbox has it.
    pub async fn broken(&mut self) -> Fate {
        self.until(Some).await
    }

    /// The same, for something that ends with its machine: why that is.
    pub async fn lost(&mut self) -> SandboxError {
        match self.broken().await {
            Fate::PutAway => SandboxError::PutAway(self.id),
            Fate::Replaced(_) => SandboxError::Replaced(self.id),
            Fate::Ended(error) => error,
        }
    }

    /// Waits until a sandbox whose machine is put away runs again.
    pub async fn mended(&mut self) -> Result<Arc<Live>, SandboxError> {
        self.until(|fate| match fate {
            Fate::PutAway => None,
            Fate::Replaced(live) => Some(Ok(live)),
            Fate::Ended(error) => Some(Err(error)),
        })
        .await
    }

    /// Whose machine it is.
    pub fn sandbox(&self) -> SandboxId {
        self.id
    }

    /// Watches this machine from now on.
    pub fn follow(&mut self, machine: &Arc<Live>) {
        self.machine = Arc::downgrade(machine);
    }

    async fn until<T>(&mut self, wanted: impl Fn(Fate) -> Option<T>) -> T {
        loop {
            if let Some(found) = self.fate().and_then(&wanted) {
                return found;
            }
            if self.view.changed().await.is_err() {
                // An owner that is gone without a last word ends with its agent.
                let ending = || wanted(Fate::Ended(SandboxError::Ending));
                if let Some(found) = self.fate().and_then(&wanted).or_else(ending) {
                    return found;
                }
            }
        }
    }

    fn fate(&mut self) -> Option<Fate> {
        use SandboxState as S;
        let view = self.view.borrow_and_update();
        match view.state {
            S::Running => {
                let now = self.shared.read();
                let now = now.unwrap_or_else(|e| e.into_inner()).clone()?;
                let same = std::ptr::eq(Arc::as_ptr(&now), self.machine.as_ptr());
                (!same).then_some(Fate::Replaced(now))
            }
            S::Paused => Some(Fate::PutAway),
            S::Stopping | S::Stopped | S::Error | S::Missing => {
                let id = self.id;
                Some(Fate::Ended(match (view.died, &view.reason) {
                    (Some(cause), reason) => SandboxError::Died {
                        id,
                        cause,
                        reason: reason.clone().unwrap_or_default(),
                    },
                    (None, Some(reason)) => SandboxError::Over {
                        id,
                        reason: reason.clone(),
                    },
                    (None, None) => SandboxError::NotRunning {
                        id,
                        state: view.state,
                    },
                }))
            }
            // On its way, which may be a way back.
            S::Pending | S::Starting | S::Pausing | S::Snapshotting | S::Resuming => None,
        }
    }
}
