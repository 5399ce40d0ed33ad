//! A machine on this host: a VM, its network slot, its folder and the client of its guest
//! agent, brought up together and given back together.

mod bringup;
mod files;
mod page_server;
mod phases;
mod restore;
mod sweep;

pub use bringup::{
    BootedMachine, boot_for_template, disk_bytes, kernel_command_line, new_restore_id,
};
pub use files::{
    read_json, remove_folder, sweep_unfinished, sync_json, unfinished, vm_folder, write_json,
};
pub use page_server::{failure as memory_failure, serve as serve_pages};
pub use phases::{Phases, crash_by, reached};
pub use restore::{BELOW_SAVED, BOOT_PATIENCE, FIRST_LAYER, Origin, Standby, restore};
pub use sweep::{SweepError, SweepReport, machine_folders, sweep};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wrenn_net::{NetError, Slot, SlotPool};
use wrenn_snapshot::SnapshotError;
use wrenn_types::{AccessToken, SecretError, Shape};
use wrenn_vmm::probe::Driver;
use wrenn_vmm::{Fingerprint, Machine, Vmm, VmmError, driver_in, end_in, lives_in};

use crate::cgroups::Cgroups;
use crate::config::HostConfig;
use crate::guest::{Guest, GuestError};
use crate::sandbox::Journal;

/// What all machines of this host share.
pub struct Site {
    /// The operator's settings.
    pub config: HostConfig,
    /// The driver that runs VMs here.
    pub vmm: Arc<dyn Vmm>,
    /// Those of machines that an earlier agent left, which had another.
    pub others: Vec<Arc<dyn Vmm>>,
    /// Where their networks come from.
    pub slots: SlotPool,
    /// What limits their processes.
    pub cgroups: Cgroups,
}

impl Site {
    /// The driver of this kind.
    fn driver(&self, driver: Driver) -> Option<&Arc<dyn Vmm>> {
        let mut all = [&self.vmm].into_iter().chain(&self.others);
        all.find(|vmm| vmm.info().kind == driver.kind())
    }
}

/// Why a machine cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No network slot.
    #[error("no network slot for the machine: {0}")]
    Net(#[from] NetError),
    /// The VMM failed.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The guest agent failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// No secrets could be made.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// It was being made for the pool, which is closed now.
    #[error("the pool closed while the machine was being made")]
    PoolClosed,
    /// The snapshot it comes from cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The snapshot it comes from was saved on a host unlike this one.
    #[error(
        "the snapshot cannot be restored here: {0}; its disk can be booted: resume it without its memory"
    )]
    OtherMonitor(String),
    /// The disk it comes from is of another monitor.
    #[error(
        "the disk is in the format {0}, and the monitor of this host takes {1}: start the agent with the monitor that made it (--vmm)"
    )]
    OtherFormat(String, &'static str),
    /// It is of a monitor that this agent has no driver for.
    #[error("{driver} runs the machine in {folder}, and this agent has no driver for it")]
    NoDriver {
        /// What runs it.
        driver: Driver,
        /// Its folder.
        folder: PathBuf,
    },
    /// A file of the machine could not be handled.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What the agent must know of a machine to take it over; `record.json` in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u32,
    /// Its network slot.
    pub slot: u32,
    /// Digest of the template it was restored from.
    pub template_digest: String,
    /// Processors and memory.
    pub shape: Shape,
    /// Size of its disk in MiB.
    pub disk_mib: u64,
    /// The guest agent's version as E2B's clients read it.
    pub envd_version: String,
    /// How often its line of memory was restored.
    pub generation: u64,
    /// What a state of it can be loaded by: the monitor that runs it, which may be another than a
    /// later agent's. Records from before that was noted have none.
    #[serde(default)]
    pub fingerprint: Option<Fingerprint>,
    /// Authorises the host towards its guest agent.
    host_token: String,
}

const RECORD: &str = "record.json";
const RECORD_VERSION: u32 = 1;

/// What is written about the machine in this folder, of whatever version; `None` when nothing is.
pub fn read_record(folder: &Path) -> std::io::Result<Option<Record>> {
    read_json(folder, RECORD)
}

/// What is written about the machine in this folder; `None` when that cannot be read.
pub fn record_in(folder: &Path) -> Option<Record> {
    let record = read_record(folder).ok().flatten();
    record.filter(|record| record.version == RECORD_VERSION)
}

impl Record {
    /// Writes it down in this folder.
    fn write(&self, folder: &Path) -> Result<(), MachineError> {
        write_json(folder, RECORD, self).map_err(|source| MachineError::File {
            action: "write",
            path: folder.join(RECORD),
            source,
        })
    }

    fn host_token(&self) -> AccessToken {
        AccessToken::from_kept(self.host_token.clone())
    }
}

/// Whether the machine in this folder is a sandbox; where that cannot be told it may be.
pub fn is_a_sandboxs(folder: &Path) -> bool {
    match Journal::read(folder) {
        Ok(journal) => journal.is_some_and(|journal| journal.handed),
        Err(_) => true,
    }
}

/// What a machine is called after its folder: `m-…`.
pub fn name_of(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// A machine that is up, running or stopped.
pub struct LiveMachine {
    /// Its VM.
    pub vm: Arc<dyn Machine>,
    /// What drives it.
    pub vmm: Arc<dyn Vmm>,
    /// Its network.
    pub slot: Slot,
    /// Its guest agent.
    pub guest: Guest,
    /// Its folder.
    pub folder: PathBuf,
    /// What is written in that folder about it.
    pub record: Record,
}

impl LiveMachine {
    /// The token that lets the host call the restore hook.
    pub fn host_token(&self) -> AccessToken {
        self.record.host_token()
    }

    /// Drops all connections to the guest agent; the next request opens a new one.
    pub fn reset_guest(&mut self) {
        self.guest = Guest::new(self.slot.guest());
    }

    /// Ends the VM and gives everything back. Goes on after a failure, so that one thing
    /// that sticks does not keep the rest; what stuck is logged, and swept at the next
    /// start.
    pub async fn give_back(self, site: &Site) {
        let LiveMachine {
            vm, slot, folder, ..
        } = self;
        if let Err(error) = vm.kill().await {
            tracing::error!(folder = %folder.display(), %error, "the VM could not be ended");
        }
        drop(vm);
        page_server::ended(&folder).await;
        let name = name_of(&folder);
        let (folder, group, ()) = tokio::join!(
            files::remove_folder(&folder),
            site.cgroups.remove(&name),
            site.slots.give_back(slot),
        );
        if let Err(error) = folder {
            tracing::error!(%error, "the machine's folder stays");
        }
        if let Err(error) = group {
            tracing::error!(%error, "the machine's control group stays");
        }
    }

    /// Takes over the machine of an earlier agent; `None` when its VM is dead.
    pub async fn adopt(site: &Site, folder: PathBuf) -> Result<Option<Self>, MachineError> {
        let record: Option<Record> =
            read_json(&folder, RECORD).map_err(|source| MachineError::File {
                action: "read",
                path: folder.join(RECORD),
                source,
            })?;
        let Some(record) = record.filter(|record| record.version == RECORD_VERSION) else {
            return Ok(None);
        };
        let vm_folder = files::vm_folder(&folder);
        let Some(driver) = driver_in(&vm_folder)? else {
            return Ok(None);
        };
        let Some(vmm) = site.driver(driver).cloned() else {
            if lives_in(&vm_folder)? && is_a_sandboxs(&folder) {
                return Err(MachineError::NoDriver { driver, folder });
            }
            end_in(&vm_folder).await?;
            return Ok(None);
        };
        let Some(vm) = vmm.adopt(&vm_folder).await? else {
            return Ok(None);
        };
        let slot = match site.slots.adopt(record.slot).await {
            Ok(slot) => slot,
            Err(error) => {
                // Nobody can reach it any more, and nothing would ever end it.
                tracing::error!(folder = %folder.display(), %error, "a machine without its network is ended");
                vm.kill().await?;
                return Ok(None);
            }
        };
        let guest = Guest::new(slot.guest());
        Ok(Some(LiveMachine {
            vm,
            vmm,
            slot,
            guest,
            folder,
            record,
        }))
    }
}
