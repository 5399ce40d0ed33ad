//! Rehearsing a freeze while nobody waits for it.
//!
//! A monitor that emulates translates code when it first runs, and what quiesces a guest first
//! runs when somebody asks for a pause: 35 ms of a pause of 65 ms. So the guest is asked to go
//! through it once before, without effects, when its sandbox is quiet.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use wrenn_vmm::Accelerator;

use super::owner::Common;
use crate::activity::Activity;
use crate::guest::{Guest, chain};
use crate::machine::LiveMachine;

/// A sandbox that was not used for so long is quiet.
const QUIET: Duration = Duration::from_millis(500);

/// A rehearsal to come. Given up when it is dropped.
pub(super) struct Rehearsal(Option<JoinHandle<()>>);

impl Drop for Rehearsal {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Rehearsal {
    /// Of this machine's guest, where its code has to be translated.
    pub(super) fn of(
        common: &Arc<Common>,
        machine: &LiveMachine,
        activity: &Arc<Activity>,
    ) -> Rehearsal {
        if machine.vmm.info().accelerator != Accelerator::Tcg {
            return Rehearsal(None);
        }
        let (common, guest, activity) = (common.clone(), machine.guest.clone(), activity.clone());
        Rehearsal(Some(tokio::spawn(async move {
            rehearse(&common, &guest, &activity).await;
        })))
    }
}

async fn rehearse(common: &Common, guest: &Guest, activity: &Activity) {
    loop {
        let quiet_at = activity.last() + QUIET;
        match quiet_at.duration_since(SystemTime::now()) {
            // At least a little, for a sandbox in use is always used just now.
            Ok(left) => tokio::time::sleep(left.max(QUIET / 10)).await,
            Err(_) => break,
        }
    }
    // One after the other: after a restart of the agent there are many. Never closed.
    let _turn = common.merges.acquire().await;
    if let Err(error) = guest.rehearse_snapshot().await {
        // The first pause is slower, and that is all.
        tracing::debug!(error = %chain(&error), "a freeze was not rehearsed");
    }
}
