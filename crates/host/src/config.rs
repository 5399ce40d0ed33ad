//! What an operator decides about a host.

use std::path::{Path, PathBuf};

use wrenn_types::{HostId, MemoryMib, ShapeLimits, Vcpus};
use wrenn_vmm::Accelerator;

/// Settings of one host agent.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Root of everything the agent keeps; see docs/architecture.md.
    pub data_dir: PathBuf,
    /// How this host is known to the control plane.
    pub host_id: HostId,
    /// Program and first arguments that start a keeper: this binary and `keeper`.
    pub keeper: (PathBuf, Vec<String>),
    /// Prefix of namespaces, links and firewall tables, so that two agents on one machine
    /// (tests, above all) keep apart.
    pub network_prefix: String,
    /// The slots' outside addresses come from here, `10.212.0.0/16`.
    pub subnet: String,
    /// How many machines wait restored, warmed and stopped.
    pub pool_size: usize,
    /// Forces an accelerator; none: what a probe finds.
    pub accelerator: Option<Accelerator>,
    /// The template that the pool holds ready.
    pub default_template: String,
    /// Bounds of what may be asked for.
    pub shapes: ShapeLimits,
    /// First of the user ids that VM processes run as; slot `n` gets `first_uid + n`.
    pub first_uid: u32,
}

impl HostConfig {
    /// The settings of `wrenn up` for a data folder.
    pub fn new(data_dir: PathBuf, host_id: HostId, keeper: (PathBuf, Vec<String>)) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        HostConfig {
            data_dir,
            host_id,
            keeper,
            network_prefix: "wrenn".to_owned(),
            subnet: "10.212.0.0/16".to_owned(),
            // A waiting machine costs some 40 MiB and no processor time.
            pool_size: (2 * cpus).clamp(2, 16),
            accelerator: None,
            default_template: "minimal".to_owned(),
            shapes: ShapeLimits {
                max_vcpus: Vcpus(cpus.max(1) as u32),
                max_memory: MemoryMib(max_guest_memory_mib()),
            },
            // Above what adduser, systemd's dynamic users (61184–65519) and the usual
            // subordinate ranges (from 100000) hand out.
            first_uid: 900_000_000,
        }
    }

    pub(crate) fn images_dir(&self) -> PathBuf {
        self.data_dir.join("images")
    }

    pub(crate) fn templates_dir(&self) -> PathBuf {
        self.data_dir.join("templates")
    }

    /// Where each VM has its folder.
    pub fn machines_dir(&self) -> PathBuf {
        machines_dir(&self.data_dir)
    }

    pub(crate) fn network_dir(&self) -> PathBuf {
        self.data_dir.join("network")
    }
}

/// Where each VM of a data folder has its own.
pub fn machines_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("machines")
}

/// Half of the host's memory, even, and never more than fits the type.
fn max_guest_memory_mib() -> u32 {
    let half = crate::capacity::memory_total().unwrap_or(1 << 30) / 2;
    u32::try_from(half >> 20).unwrap_or(u32::MAX) & !1
}
