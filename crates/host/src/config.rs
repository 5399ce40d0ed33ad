//! What an operator decides about a host.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use wrenn_net::Limits;
use wrenn_snapshot::SnapshotId;
use wrenn_types::{HostId, MemoryMib, ShapeLimits, Vcpus};
use wrenn_vmm::Accelerator;
use wrenn_vmm::DiskLimits;
use wrenn_vmm::probe::Driver;

/// Settings of one host agent.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Root of everything the agent keeps; see docs/architecture.md.
    pub data_dir: PathBuf,
    /// How this host is known to the control plane.
    pub host_id: HostId,
    /// Program and first arguments that start a keeper: this binary and `keeper`.
    pub keeper: (PathBuf, Vec<String>),
    /// The same for a page server, see [`crate::serve_pages`]: this binary and `page-server`.
    pub page_server: (PathBuf, Vec<String>),
    /// Prefix of namespaces, links and firewall tables, so that two agents on one machine
    /// (tests, above all) keep apart.
    pub network_prefix: String,
    /// The slots' outside addresses come from here, `10.212.0.0/16`.
    pub subnet: String,
    /// What each guest may use of the network.
    pub guest_limits: Limits,
    /// What each machine may use of the data folder's disk.
    pub disk_limits: DiskLimits,
    /// How many machines wait restored, warmed and stopped.
    pub pool_size: usize,
    /// Forces a virtual machine monitor; none: what a probe finds.
    pub driver: Option<Driver>,
    /// Forces an accelerator; none: what a probe finds.
    pub accelerator: Option<Accelerator>,
    /// The template that the pool holds ready.
    pub default_template: String,
    /// So many percent of a sandbox's memory are counted when it is admitted; 100: no memory is
    /// promised twice.
    pub expected_use_percent: u32,
    /// Bounds of what may be asked for.
    pub shapes: ShapeLimits,
    /// First of the user ids that VM processes run as; slot `n` gets `first_uid + n`.
    pub first_uid: u32,
}

impl HostConfig {
    /// The settings of `wrenn up` for a data folder. `program` is this binary, which is started
    /// again as keeper and as page server.
    pub fn new(data_dir: PathBuf, host_id: HostId, program: PathBuf) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let names = Names::of(&data_dir);
        HostConfig {
            data_dir,
            host_id,
            page_server: (program.clone(), vec!["page-server".to_owned()]),
            keeper: (program, vec!["keeper".to_owned()]),
            network_prefix: names.prefix,
            subnet: names.subnet,
            guest_limits: Limits::default(),
            disk_limits: DiskLimits::default(),
            // A waiting machine costs some 40 MiB and no processor time.
            pool_size: (2 * cpus).clamp(2, 16),
            driver: None,
            accelerator: None,
            default_template: "minimal".to_owned(),
            expected_use_percent: crate::capacity::EXPECTED_USE_PERCENT,
            shapes: ShapeLimits {
                max_vcpus: Vcpus(cpus.max(1) as u32),
                max_memory: MemoryMib(max_guest_memory_mib()),
            },
            first_uid: names.first_uid,
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

    /// Where snapshots of sandboxes are kept.
    pub(crate) fn snapshots_dir(&self) -> PathBuf {
        self.data_dir.join("snapshots")
    }

    /// Which pages of snapshots are asked for first.
    pub(crate) fn working_sets_dir(&self) -> PathBuf {
        self.data_dir.join("working-sets")
    }

    /// The same of one snapshot.
    pub(crate) fn working_set(&self, snapshot: SnapshotId) -> PathBuf {
        self.working_sets_dir().join(snapshot.to_string())
    }

    /// Where the journals of paused sandboxes are.
    pub(crate) fn paused_dir(&self) -> PathBuf {
        self.data_dir.join("paused")
    }

    pub(crate) fn network_dir(&self) -> PathBuf {
        self.data_dir.join("network")
    }
}

/// The data folder of the one server that a machine usually has.
const DEFAULT_DATA_DIR: &str = "/var/lib/wrenn";
/// User ids of VMs lie above what adduser, systemd's dynamic users (61184–65519) and the
/// usual subordinate ranges (from 100000) hand out.
const FIRST_UID: u32 = 900_000_000;
/// Room for the slots of one agent.
const UIDS_EACH: u32 = 10_000;

/// What an agent occupies on the whole machine and not only in its data folder. Agents on
/// other data folders (tests, a second installation) get names derived from theirs, so that
/// they keep apart; the usual one has the usual names.
struct Names {
    prefix: String,
    subnet: String,
    first_uid: u32,
}

impl Names {
    fn of(data_dir: &Path) -> Names {
        if data_dir == Path::new(DEFAULT_DATA_DIR) {
            return Names {
                prefix: "wrenn".to_owned(),
                subnet: "10.212.0.0/16".to_owned(),
                first_uid: FIRST_UID,
            };
        }
        let digest = Sha256::digest(data_dir.as_os_str().as_encoded_bytes());
        // One of the 128 pieces of 4,096 addresses from 10.213.0.0 to 10.220.255.255.
        let piece = u32::from(u16::from_be_bytes([digest[0], digest[1]])) % 128;
        Names {
            prefix: format!("wr{}", hex::encode(&digest[2..5])),
            subnet: format!("10.{}.{}.0/20", 213 + piece / 16, piece % 16 * 16),
            first_uid: FIRST_UID + UIDS_EACH * (1 + piece),
        }
    }
}

/// How the names of all namespaces, links and firewall tables begin that belong to the agent
/// on this data folder.
pub fn network_prefix(data_dir: &Path) -> String {
    Names::of(data_dir).prefix
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_on_other_folders_keep_apart() {
        let usual = Names::of(Path::new(DEFAULT_DATA_DIR));
        let (a, b) = (
            Names::of(Path::new("/srv/a")),
            Names::of(Path::new("/srv/b")),
        );
        assert_eq!(usual.prefix, "wrenn");
        assert_ne!(a.prefix, b.prefix);
        assert_ne!(a.subnet, usual.subnet);
        assert_ne!(a.first_uid, usual.first_uid);
        assert!(a.prefix.len() <= 9, "network links leave no more room");
        a.subnet.parse::<wrenn_net::Ipv4Net>().unwrap();
    }
}
