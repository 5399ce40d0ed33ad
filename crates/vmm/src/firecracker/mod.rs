//! The Firecracker driver: any Firecracker from 1.15.1 on, on hardware KVM.
//!
//! Firecracker opens paths where QEMU takes descriptors, and writes some of them into the
//! states it saves. So each one runs in a jail (see `keeper/jail.rs`), in which everything has
//! the same name always: a state names nothing of the host, and is loaded under any path.
//!
//! ```text
//! machine's folder                        jail
//!   machine.json, console.log, exit.json
//!   jail/disk.img ───────────────────────▶ /disk.img     second name of the top layer; or a link
//!                                                        to /dev/dm-N, the layer's name then is
//!                                                        jail/disk.layer (see `drives`)
//!   jail/run/api.sock ───────────────────▶ /run/api.sock
//!   the program ─────────────────────────▶ /firecracker
//!   the page server's socket ────────────▶ /pages.sock
//!   descriptors: states, memory, kernel ─▶ /fd/N         memory files, which have no path
//! ```
//!
//! Memory: a machine that boots is given none (Firecracker makes its own); the first save
//! writes all of it into the [`crate::MemoryFile`]. A restored one maps the sealed memory
//! privately, which clones share, or is served page by page. Diff snapshots go into a
//! [`DeltaFile`](crate::delta_file), from which [`crate::ChangedPages`] are read.
//!
//! What a Linux guest does in it can only be shown on a host with hardware virtualisation; the
//! driver's tests run on any KVM, with a guest of a hundred bytes.

mod api;
mod config;
mod drives;
mod files;
mod launch;
mod machine;
mod model;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use self::api::ApiError;
pub use self::config::{Devices, FirecrackerConfig};
pub(crate) use self::drives::layers_in;
pub use self::drives::{CloneWay, Cloning, MappedDisk};
pub use self::machine::{FirecrackerMachine, left_layer};
use crate::probe::Driver;
use crate::{
    Accelerator, BootSpec, Delta, Fingerprint, KernelFormat, Machine, MachineSpec, RestoreSpec,
    SealedMemory, ServedSpec, Vmm, VmmError, VmmInfo,
};

/// Version of the driver's device layout; see [`Fingerprint::layout`].
const LAYOUT: u32 = 1;

/// The Firecracker driver.
pub struct FirecrackerVmm {
    config: FirecrackerConfig,
    info: VmmInfo,
}

impl FirecrackerVmm {
    /// A driver; starts nothing.
    pub fn new(config: FirecrackerConfig) -> FirecrackerVmm {
        let info = VmmInfo {
            kind: Driver::Firecracker.kind(),
            path: config.program.clone(),
            version: config.version.clone(),
            accelerator: Accelerator::Kvm,
            why: config.why.clone(),
            fingerprint: Fingerprint {
                vmm: "firecracker".into(),
                version: config.version.clone(),
                machine: format!("snapshot format {}", config.snapshot_format),
                cpu: config.cpu.clone(),
                accelerator: Accelerator::Kvm,
                tsc_khz: config.tsc_khz,
                netdev: "tap".into(),
                layout: LAYOUT,
            },
            slowness: config.slowness,
            layers: config.cloning.layers(),
            kernel: KernelFormat::Elf,
            page_server: config.userfaultfd,
            stands_by: false,
        };
        FirecrackerVmm { config, info }
    }

    /// How long Firecracker may take to answer a request that moves no memory.
    fn patience(&self) -> Duration {
        self.info.deadline(Duration::from_secs(15))
    }

    /// [`Vmm::boot`], with what only Firecracker's machines can do.
    pub async fn boot_machine(&self, spec: BootSpec) -> Result<FirecrackerMachine, VmmError> {
        Ok(self.start_cold(spec).await?.claim())
    }

    /// [`Vmm::adopt`], with what only Firecracker's machines can do.
    pub async fn adopt_machine(&self, dir: &Path) -> Result<Option<FirecrackerMachine>, VmmError> {
        FirecrackerMachine::adopt(dir, self.config.cloning.clone(), self.patience()).await
    }
}

#[async_trait]
impl Vmm for FirecrackerVmm {
    fn info(&self) -> &VmmInfo {
        &self.info
    }

    async fn boot(&self, spec: BootSpec) -> Result<Arc<dyn Machine>, VmmError> {
        Ok(Arc::new(self.boot_machine(spec).await?))
    }

    async fn boot_private(
        &self,
        machine: MachineSpec,
        memory: Arc<SealedMemory>,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        // It makes the memory of a boot itself, so of the template's only the size counts.
        let machine = self.start_private(machine, memory.bytes()).await?;
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
        _machine: MachineSpec,
        _memory: Arc<SealedMemory>,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        Err(no_standby("start a machine before its state is known"))
    }

    async fn restore_served(&self, spec: ServedSpec) -> Result<Arc<dyn Machine>, VmmError> {
        Ok(Arc::new(self.start_served(spec).await?.claim()))
    }

    fn create_layer(&self, path: &Path, _disk_bytes: u64) -> Result<(), VmmError> {
        drives::create_empty(path)
    }

    async fn adopt(&self, dir: &Path) -> Result<Option<Arc<dyn Machine>>, VmmError> {
        let adopted = self.adopt_machine(dir).await?;
        Ok(adopted.map(|machine| Arc::new(machine) as Arc<dyn Machine>))
    }
}

/// It starts within some milliseconds, and what it is given at its start depends on the state.
fn no_standby(what: &'static str) -> VmmError {
    VmmError::Unsupported {
        monitor: "Firecracker",
        what,
        why: "it starts fast enough; use `restore`".into(),
    }
}
