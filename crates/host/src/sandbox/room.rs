//! Room for one more sandbox: before it is refused, memory is asked back from those that nobody
//! has used for a while.

use std::cmp::Reverse;
use std::time::{Duration, SystemTime};

use wrenn_types::{SandboxState, Shape};

use super::Manager;
use crate::capacity;

/// A sandbox that was not used for so long does not miss its memory at once.
const IDLE_FOR: Duration = Duration::from_secs(60);

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
            let bytes = lacking();
            if bytes == 0 {
                return;
            }
            let cgroups = site.cgroups.clone();
            let work = move || {
                let asked = cgroups.reclaim(&group, bytes);
                (group, asked)
            };
            match tokio::task::spawn_blocking(work).await {
                Ok((group, Ok(()))) => {
                    tracing::info!(
                        machine = group,
                        bytes,
                        "memory of an idle sandbox asked back"
                    );
                }
                Ok((group, Err(error))) => {
                    tracing::warn!(machine = group, %error, "memory of an idle sandbox stays");
                }
                Err(error) => tracing::warn!(%error, "asking memory back was cut short"),
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
