//! How many sandboxes fit on this host.

use std::path::Path;

use serde_json::{Value, json};
use wrenn_host::capacity::{
    DISK_EACH, DISK_RESERVE, EXPECTED_USE_PERCENT, IDLE_MACHINE, MEMORY_RESERVE, expected_use,
};
use wrenn_types::Shape;
use wrenn_vmm::probe::Limits;

use crate::output::bytes;

/// What there is, and how many sandboxes that is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capacity {
    memory_available: u64,
    /// Bytes; `None` where the folder cannot be asked.
    pub(super) disk_free: Option<u64>,
}

impl Capacity {
    /// Of this host, with sandboxes in `folder`.
    pub(super) fn of(limits: &Limits, folder: Option<&Path>) -> Self {
        let disk_free = folder
            .and_then(|folder| rustix::fs::statvfs(folder).ok())
            .map(|state| state.f_bavail.saturating_mul(state.f_frsize));
        Capacity {
            memory_available: limits.memory_available_bytes,
            disk_free,
        }
    }

    fn by_memory(self, each: u64) -> u64 {
        self.memory_available.saturating_sub(MEMORY_RESERVE) / each
    }

    fn by_disk(self) -> u64 {
        self.disk_free.map_or(u64::MAX, |free| {
            free.saturating_sub(DISK_RESERVE) / DISK_EACH
        })
    }

    /// So many that mostly wait.
    fn idle(self) -> u64 {
        self.by_memory(IDLE_MACHINE).min(self.by_disk())
    }

    /// So many that all work.
    fn at_work(self) -> u64 {
        self.by_memory(expected_use(Shape::DEFAULT, EXPECTED_USE_PERCENT))
            .min(self.by_disk())
    }

    /// For people.
    pub(super) fn rows(self) -> [(&'static str, String); 2] {
        [
            (
                "sandboxes that fit",
                format!(
                    "about {} that all work, {} that mostly wait ({} each)",
                    self.at_work(),
                    self.idle(),
                    Shape::DEFAULT
                ),
            ),
            (
                "counted with",
                format!(
                    "{} each and {EXPECTED_USE_PERCENT} % of its memory at work, {} of disk; {} and {} stay free",
                    bytes(IDLE_MACHINE),
                    bytes(DISK_EACH),
                    bytes(MEMORY_RESERVE),
                    bytes(DISK_RESERVE)
                ),
            ),
        ]
    }

    /// For programs.
    pub(super) fn to_json(self) -> Value {
        json!({
            "atWork": self.at_work(),
            "idle": self.idle(),
            "diskFreeBytes": self.disk_free,
            "memoryAvailableBytes": self.memory_available,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scarcer_of_memory_and_disk_decides() {
        let capacity = |memory, disk| Capacity {
            memory_available: memory,
            disk_free: disk,
        };
        assert_eq!(
            capacity(MEMORY_RESERVE + 10 * IDLE_MACHINE, None).idle(),
            10
        );
        assert_eq!(
            capacity(
                MEMORY_RESERVE + 10 * IDLE_MACHINE,
                Some(DISK_RESERVE + 3 * DISK_EACH)
            )
            .idle(),
            3
        );
        assert_eq!(capacity(MEMORY_RESERVE - 1, None).idle(), 0);
        assert_eq!(capacity(u64::MAX, Some(0)).at_work(), 0);
        let host = capacity(8 << 30, Some(1 << 40));
        assert!(host.at_work() < host.idle());
    }
}
