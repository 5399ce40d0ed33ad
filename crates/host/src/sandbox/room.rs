//! Room for one more sandbox: before it is refused, memory is asked back from those that nobody
//! has used for a while.

use std::cmp::Reverse;
use std::time::{Duration, SystemTime};

use wrenn_types::{SandboxState, Shape};

use super::Manager;
use crate::capacity;

/// A sandbox that was not used for so long does not miss its memory at once.
const IDLE_FOR: Duration = Duration::from_secs(60);
/// A request that has not gained so many bytes is not made again of the same sandbox.
const WORTH_WHILE: u64 = 1 << 20;

impl Manager {
    /// Asks idle sandboxes, the longest idle first, for as much memory as one of this shape lacks
    /// to be admitted. Where that cannot be done ([`crate::cgroups::Cgroups::reclaimable`]), or
    /// nothing is lacking, nothing happens: admission decides afterwards.
    pub async fn make_room(&self, shape: Shape) {
        let site = &self.common.site;
        let percent = site.config.expected_use_percent;
        let lacking = || capacity::memory_lacking(shape, percent).unwrap_or(0);
        if lacking() == 0 || site.cgroups.reclaimable().is_err() {
            return;
        }
        for group in self.idle_groups() {
            let mut bytes = lacking();
            while bytes > 0 {
                if !self.ask_back(&group, bytes).await {
                    break;
                }
                // Part of what the kernel took may have counted as available before: it is asked
                // again as long as that helps.
                let still = lacking();
                if still.saturating_add(WORTH_WHILE) > bytes {
                    break;
                }
                bytes = still;
            }
        }
    }

    /// Asks a machine for so many bytes. Whether that could be done.
    async fn ask_back(&self, machine: &str, bytes: u64) -> bool {
        let (cgroups, group) = (self.common.site.cgroups.clone(), machine.to_owned());
        let asked = tokio::task::spawn_blocking(move || cgroups.reclaim(&group, bytes));
        match asked.await {
            Ok(Ok(())) => {
                tracing::info!(machine, bytes, "memory of an idle sandbox asked back");
                true
            }
            Ok(Err(error)) => {
                tracing::warn!(machine, %error, "memory of an idle sandbox stays");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "asking memory back was cut short");
                false
            }
        }
    }

    /// The groups of sandboxes that run and are not used, the longest idle first.
    fn idle_groups(&self) -> Vec<String> {
        let now = SystemTime::now();
        let mut idle: Vec<(Duration, String)> = self
            .living()
            .iter()
            .filter(|handle| handle.view().state == SandboxState::Running)
            .filter_map(|handle| {
                let idle = now.duration_since(handle.activity.last()).ok()?;
                let live = handle.live().filter(|_| idle >= IDLE_FOR)?;
                Some((idle, live.group.clone()))
            })
            .collect();
        idle.sort_unstable_by_key(|(idle, _)| Reverse(*idle));
        idle.into_iter().map(|(_, group)| group).collect()
    }
}
