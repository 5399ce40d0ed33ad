//! What Firecracker's interface takes and gives, as far as this driver uses it. Field names
//! are Firecracker's; see its `firecracker.yaml`.

use serde::{Deserialize, Serialize};

use crate::DiskLimits;

/// `PUT` and `GET /machine-config`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MachineConfig {
    pub(super) vcpu_count: u32,
    pub(super) mem_size_mib: u64,
    pub(super) smt: bool,
    /// Without it a diff snapshot would take every page that is present for a changed one.
    pub(super) track_dirty_pages: bool,
}

/// `PUT /boot-source`.
#[derive(Debug, Serialize)]
pub(super) struct BootSource<'a> {
    pub(super) kernel_image_path: String,
    pub(super) initrd_path: String,
    pub(super) boot_args: &'a str,
}

/// `PUT /drives/{id}`.
#[derive(Debug, Serialize)]
pub(super) struct Drive<'a> {
    pub(super) drive_id: &'a str,
    pub(super) path_on_host: &'a str,
    /// Whether Firecracker adds `root=` to the command line.
    pub(super) is_root_device: bool,
    pub(super) is_read_only: bool,
    /// `Unsafe` where the guest's flushes need not reach the platter.
    pub(super) cache_type: &'a str,
    pub(super) rate_limiter: RateLimiter,
}

/// What a device may do.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct RateLimiter {
    pub(super) bandwidth: Bucket,
    pub(super) ops: Bucket,
}

/// How much of something; one of nothing is no limit.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Bucket {
    pub(super) size: u64,
    /// Milliseconds.
    pub(super) refill_time: u64,
}

impl From<DiskLimits> for RateLimiter {
    fn from(limits: DiskLimits) -> RateLimiter {
        let bucket = |per_second: Option<u64>| Bucket {
            size: per_second.unwrap_or_default(),
            refill_time: per_second.map_or(0, |_| 1000),
        };
        RateLimiter {
            bandwidth: bucket(limits.bytes_per_sec),
            ops: bucket(limits.operations_per_sec),
        }
    }
}

/// `PATCH /drives/{id}`, the other half of it.
#[derive(Debug, Serialize)]
pub(super) struct DriveLimits<'a> {
    pub(super) drive_id: &'a str,
    pub(super) rate_limiter: RateLimiter,
}

/// `PATCH /drives/{id}`.
#[derive(Debug, Serialize)]
pub(super) struct DrivePatch<'a> {
    pub(super) drive_id: &'a str,
    pub(super) path_on_host: &'a str,
}

/// `PUT /network-interfaces/{id}`.
#[derive(Debug, Serialize)]
pub(super) struct NetworkInterface<'a> {
    pub(super) iface_id: &'a str,
    pub(super) guest_mac: String,
    pub(super) host_dev_name: &'a str,
}

/// `PUT /mmds/config`.
#[derive(Debug, Serialize)]
pub(super) struct MmdsConfig<'a> {
    pub(super) version: &'a str,
    pub(super) network_interfaces: [&'a str; 1],
    pub(super) ipv4_address: &'a str,
}

/// `PUT /balloon`.
#[derive(Debug, Serialize)]
pub(super) struct Balloon {
    pub(super) amount_mib: u64,
    pub(super) deflate_on_oom: bool,
    pub(super) stats_polling_interval_s: u64,
}

/// `PATCH /balloon`.
#[derive(Debug, Serialize)]
pub(super) struct BalloonPatch {
    pub(super) amount_mib: u64,
}

/// `PUT /vsock`.
#[derive(Debug, Serialize)]
pub(super) struct Vsock<'a> {
    pub(super) guest_cid: u32,
    pub(super) uds_path: &'a str,
}

/// `PUT /entropy`.
#[derive(Debug, Serialize)]
pub(super) struct Entropy {}

/// `PUT /actions`.
#[derive(Debug, Serialize)]
pub(super) struct Action<'a> {
    pub(super) action_type: &'a str,
}

/// `PATCH /vm`.
#[derive(Debug, Serialize)]
pub(super) struct VmState<'a> {
    pub(super) state: &'a str,
}

/// `GET /`.
#[derive(Debug, Deserialize)]
pub(super) struct InstanceInfo {
    pub(super) state: InstanceState,
    pub(super) vmm_version: String,
}

/// State of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// `PUT /snapshot/create`.
#[derive(Debug, Serialize)]
pub(super) struct CreateSnapshot<'a> {
    pub(super) snapshot_type: &'a str,
    pub(super) snapshot_path: String,
    pub(super) mem_file_path: String,
}

/// `PUT /snapshot/load`.
#[derive(Debug, Serialize)]
pub(super) struct LoadSnapshot<'a> {
    pub(super) snapshot_path: String,
    pub(super) mem_backend: MemoryBackend,
    pub(super) track_dirty_pages: bool,
    pub(super) resume_vm: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) network_overrides: Vec<NetworkOverride<'a>>,
}

/// Where a loaded machine's memory comes from.
#[derive(Debug, Serialize)]
pub(super) struct MemoryBackend {
    /// `File` or `Uffd`.
    pub(super) backend_type: &'static str,
    pub(super) backend_path: String,
}

/// The tap of a loaded machine.
#[derive(Debug, Serialize)]
pub(super) struct NetworkOverride<'a> {
    pub(super) iface_id: &'a str,
    pub(super) host_dev_name: &'a str,
}
