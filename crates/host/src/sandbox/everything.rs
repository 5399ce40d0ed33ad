//! What is done to all sandboxes of a host when its agent is told to end.

use std::sync::Arc;

use futures::StreamExt;
use wrenn_types::{SandboxId, SandboxState};

use super::handle::Handle;
use super::{Manager, SandboxError};
use crate::snapshots::Scope;

/// Pauses at the same time: each writes what its guest has changed to one and the same disk.
const PAUSES_AT_ONCE: usize = 4;

/// What came of an operation on everything there is.
#[derive(Debug, Default)]
pub struct Everything {
    /// Those it was done to.
    pub done: Vec<SandboxId>,
    /// Those it could not be done to, and why.
    pub failed: Vec<(SandboxId, SandboxError)>,
}

impl Everything {
    fn note(&mut self, id: SandboxId, outcome: Result<bool, SandboxError>) {
        match outcome {
            Ok(true) => self.done.push(id),
            // It had ended, or was paused, before its turn came.
            Ok(false) | Err(SandboxError::NotFound(_)) => {}
            Err(error) => self.failed.push((id, error)),
        }
    }
}

impl Manager {
    /// Ends all of them, side by side.
    pub async fn destroy_all(&self) -> Everything {
        let ends = self.living().into_iter().map(|handle| async move {
            let ended = handle.destroy().await.map(|()| true);
            (handle.id, ended)
        });
        let mut all = Everything::default();
        for (id, ended) in futures::future::join_all(ends).await {
            all.note(id, ended);
        }
        all
    }

    /// Pauses all that run, after [`Manager::close`]: what is being started is paused as soon as
    /// it runs. What cannot be paused runs on.
    pub async fn pause_all(&self) -> Everything {
        let mut all = Everything::default();
        loop {
            // Again, for a resume that was asked for before this host was closed: there are no more
            // of those.
            let mut open = self.living();
            let given_up = |id| all.failed.iter().any(|(failed, _)| *failed == id);
            open.retain(|handle| may_run(handle) && !given_up(handle.id));
            if open.is_empty() {
                return all;
            }
            let mut pauses = futures::stream::iter(open)
                .map(|handle| async move { (handle.id, pause(&handle).await) })
                .buffer_unordered(PAUSES_AT_ONCE);
            while let Some((id, paused)) = pauses.next().await {
                all.note(id, paused);
            }
        }
    }
}

/// Whether it runs or is about to.
fn may_run(handle: &Arc<Handle>) -> bool {
    let state = handle.view().state;
    state != SandboxState::Paused && !state.is_final()
}

/// Whether it ran until now.
async fn pause(handle: &Arc<Handle>) -> Result<bool, SandboxError> {
    let view = handle.started().await;
    match view.state.is_final() {
        true => Ok(false),
        false => Ok(handle.pause(Scope::Machine).await?.now),
    }
}
