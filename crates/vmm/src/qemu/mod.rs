//! The QEMU driver: any QEMU from 7.2 on, under KVM or in software.
//!
//! The machine is `microvm` with the fewest devices: a console, a disk, a network card. There
//! is no balloon and no free page reporting, which would punch holes into memory that clones
//! share. QEMU opens no path: all comes as descriptors, so that a saved state names none.

mod args;
mod graph;
mod jail;
mod launch;
mod layers;
mod machine;
mod restore;
mod save;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use self::machine::QemuMachine;
pub use self::save::state_file;
use crate::keeper::Launcher;
use crate::probe::{Choice, Driver, HostReport, QEMU_MINIMUM};
use crate::{
    BootSpec, Delta, Fingerprint, KernelFormat, LayerFormat, Machine, MachineSpec, RestoreSpec,
    SealedMemory, ServedSpec, Vmm, VmmError, VmmInfo, create_overlay,
};

/// What the driver needs to know.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// How keepers are started.
    pub launcher: Launcher,
    /// How guests are executed, from [`crate::probe::choose`].
    pub choice: Choice,
    /// The program, `qemu-system-x86_64`.
    pub program: PathBuf,
    /// Its version.
    pub version: String,
    /// Rate of the host's time stamp counter.
    pub tsc_khz: u32,
    /// How slow the host is; see [`VmmInfo::slowness`].
    pub slowness: f64,
}

impl QemuConfig {
    /// The configuration that `report` suggests.
    pub fn from_report(
        report: &HostReport,
        choice: Choice,
        launcher: Launcher,
    ) -> Result<QemuConfig, VmmError> {
        let qemu = report.qemu.as_ref().ok_or(VmmError::NoMonitor)?;
        let version = match (&qemu.version, qemu.usable) {
            (Some(version), true) => version.clone(),
            (Some(version), false) => {
                return Err(VmmError::UnusableMonitor {
                    path: qemu.path.clone(),
                    why: format!(
                        "it has version {version}, and {QEMU_MINIMUM} is the oldest that works; upgrade it"
                    ),
                });
            }
            (None, _) => {
                return Err(VmmError::UnusableMonitor {
                    path: qemu.path.clone(),
                    why: "it does not tell its version; is it QEMU?".into(),
                });
            }
        };
        Ok(QemuConfig {
            launcher,
            choice,
            program: qemu.path.clone(),
            version,
            tsc_khz: report.cpu.tsc_khz,
            slowness: report.cpu.slowness,
        })
    }
}

/// The QEMU driver.
pub struct QemuVmm {
    launcher: Launcher,
    info: VmmInfo,
}

impl QemuVmm {
    /// A driver; starts nothing.
    pub fn new(config: QemuConfig) -> QemuVmm {
        let accelerator = config.choice.accelerator;
        QemuVmm {
            info: VmmInfo {
                kind: Driver::Qemu.kind(),
                path: config.program,
                version: config.version.clone(),
                accelerator,
                why: config.choice.why,
                fingerprint: Fingerprint {
                    vmm: "qemu".into(),
                    version: config.version,
                    machine: args::MACHINE.into(),
                    cpu: args::cpu(accelerator).into(),
                    accelerator,
                    tsc_khz: config.tsc_khz,
                    netdev: "tap".into(),
                    layout: args::LAYOUT,
                },
                slowness: config.slowness,
                layers: LayerFormat::Qcow2,
                kernel: KernelFormat::BzImage,
                page_server: false,
                stands_by: true,
            },
            launcher: config.launcher,
        }
    }

    /// How long QEMU may take to answer a command.
    fn patience(&self) -> Duration {
        self.info.deadline(Duration::from_secs(15))
    }
}

#[async_trait]
impl Vmm for QemuVmm {
    fn info(&self) -> &VmmInfo {
        &self.info
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Machine>, VmmError> {
        let BootSpec { machine, memory } = spec;
        let machine = self.start_cold(machine, &memory).await?;
        machine.resume().await?;
        Ok(Arc::new(machine.claim()))
    }

    async fn boot_private(
        &self,
        machine: MachineSpec,
        memory: Arc<SealedMemory>,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        let machine = self.start_private(machine, &memory).await?;
        Ok(Arc::new(machine.claim()))
    }

    async fn restore(&self, spec: RestoreSpec) -> Result<Arc<dyn Machine>, VmmError> {
        Ok(Arc::new(self.start_saved(spec, None).await?.claim()))
    }

    async fn restore_delta(
        &self,
        spec: RestoreSpec,
        delta: Delta,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        let machine = self.start_saved(spec, Some(delta)).await?;
        Ok(Arc::new(machine.claim()))
    }

    async fn stand_by(
        &self,
        machine: MachineSpec,
        memory: Arc<SealedMemory>,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        let machine = self.start_waiting(machine, &memory).await?;
        Ok(Arc::new(machine.claim()))
    }

    async fn restore_served(&self, _spec: ServedSpec) -> Result<Arc<dyn Machine>, VmmError> {
        Err(VmmError::Unsupported {
            monitor: "QEMU",
            what: "take its memory from a page server",
            why: "it maps the template's memory; use `restore` or `restore_delta`".into(),
        })
    }

    fn create_layer(&self, path: &Path, disk_bytes: u64) -> Result<(), VmmError> {
        Ok(create_overlay(path, disk_bytes)?)
    }

    async fn adopt(&self, dir: &Path) -> Result<Option<Arc<dyn Machine>>, VmmError> {
        let adopted = QemuMachine::adopt(dir, self.patience()).await?;
        Ok(adopted.map(|machine| Arc::new(machine) as Arc<dyn Machine>))
    }
}
