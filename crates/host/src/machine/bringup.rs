//! What it takes to bring a machine up: slot, folder, disk, VM. Whatever fails, the steps before
//! it are given back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use sha2::{Digest, Sha512};
use wrenn_image::Image;
use wrenn_net::Slot;
use wrenn_types::{AccessToken, Shape};
use wrenn_vmm::{
    Accelerator, BootFiles, BootSpec, DiskChain, DiskLimits, IDENTITY_BYTES, KernelFormat, Machine,
    MachineSpec, MemoryFile, VmmError,
};

use super::{MachineError, Site, files, name_of};
use crate::cgroups::Limits;
use crate::guest::Guest;

/// The same in every guest, so that any snapshot runs in any slot.
const GUEST_MAC: [u8; 6] = [0x02, 0xFC, 0x00, 0x00, 0x00, 0x05];

/// What a machine's guest agent learns from its own `fw_cfg` entry: who may call its
/// restore hook, and that this is another restore than any before.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RestoreChannel<'a> {
    #[serde(rename = "restoreID")]
    restore_id: &'a str,
    #[serde(rename = "instanceID")]
    instance_id: &'a str,
    #[serde(rename = "envID")]
    env_id: &'a str,
    access_token_hash: String,
}

/// 128 random bits in hexadecimal.
pub fn new_restore_id() -> Result<String, MachineError> {
    // The first half of a token; both are random bits in hexadecimal.
    Ok(AccessToken::generate()?.reveal()[..32].to_owned())
}

pub(super) fn restore_channel(
    restore_id: &str,
    env_id: &str,
    host_token: &AccessToken,
) -> Result<Box<[u8; IDENTITY_BYTES]>, MachineError> {
    let json = serde_json::to_vec(&RestoreChannel {
        restore_id,
        instance_id: "",
        env_id,
        access_token_hash: hex::encode(Sha512::digest(host_token.reveal().as_bytes())),
    });
    let fail = |source| MachineError::File {
        action: "write the restore channel of",
        path: PathBuf::from(env_id),
        source,
    };
    let json = json.map_err(|e| fail(e.into()))?;
    let mut channel = Box::new([0u8; IDENTITY_BYTES]);
    channel
        .get_mut(..json.len())
        .ok_or_else(|| fail(std::io::Error::other("the template's name is too long")))?
        .copy_from_slice(&json);
    Ok(channel)
}

/// What is common to booting and restoring, before there is a VM.
pub(super) struct Ground {
    pub(super) slot: Slot,
    pub(super) folder: PathBuf,
    pub(super) uid: u32,
}

impl Ground {
    pub(super) async fn take(site: &Site) -> Result<Ground, MachineError> {
        let slot = site.slots.take().await?;
        let uid = site.config.first_uid + slot.index();
        match files::new_folder(&site.config.machines_dir(), uid) {
            Ok(folder) => Ok(Ground { slot, folder, uid }),
            Err(error) => {
                site.slots.give_back(slot).await;
                Err(error)
            }
        }
    }

    pub(super) async fn give_back(self, site: &Site) {
        if let Err(error) = files::remove_folder(&self.folder).await {
            tracing::error!(%error, "the folder of a machine that did not start stays");
        }
        if let Err(error) = site.cgroups.remove(&name_of(&self.folder)).await {
            tracing::error!(%error, "the control group of a machine that did not start stays");
        }
        site.slots.give_back(self.slot).await;
    }

    /// Limits what a machine's processes may use, before its guest runs user code.
    pub(super) fn confine(
        &self,
        site: &Site,
        shape: Shape,
        vm: &Arc<dyn Machine>,
        page_server: Option<u32>,
    ) -> Result<(), MachineError> {
        let pids = vm.pids();
        let (name, limits) = (name_of(&self.folder), Limits::of(shape));
        let pids = [pids.keeper.pid, pids.vmm.pid]
            .into_iter()
            .chain(page_server);
        let confined = site
            .cgroups
            .confine(&name, limits, &pids.collect::<Vec<_>>());
        confined.map_err(|source| MachineError::File {
            action: "limit the processes of",
            path: self.folder.clone(),
            source,
        })
    }

    pub(super) async fn spec(
        &self,
        site: &Site,
        shape: Shape,
        boot: BootFiles,
        disk: DiskChain,
        identity: Box<[u8; IDENTITY_BYTES]>,
    ) -> Result<MachineSpec, MachineError> {
        let relay = self.slot.relay().await?;
        Ok(MachineSpec {
            dir: files::vm_folder(&self.folder),
            uid: self.uid,
            gid: self.uid,
            shape,
            boot,
            disk,
            disk_limits: match site.cgroups.limits_disk() {
                true => DiskLimits::default(),
                false => site.config.disk_limits,
            },
            tap: Some(self.slot.open_tap().await?),
            mac: GUEST_MAC,
            identity,
            companions: relay.into_descriptors(),
        })
    }
}

/// Ends a machine that could not be limited.
pub(super) async fn kill_unconfined(vm: &Arc<dyn Machine>) {
    if let Err(error) = vm.kill().await {
        tracing::error!(%error, "a machine that could not be limited could not be ended either");
    }
}

/// The command line of a kernel that boots on this host.
pub fn kernel_command_line(site: &Site) -> String {
    let fingerprint = &site.vmm.info().fingerprint;
    match fingerprint.accelerator {
        Accelerator::Tcg => wrenn_image::kernel_command_line(fingerprint.tsc_khz),
        Accelerator::Kvm => wrenn_image::kernel_command_line_kvm(),
    }
}

pub(super) fn boot_files(site: &Site, image: &Image, cmdline: String) -> BootFiles {
    BootFiles {
        kernel: match site.vmm.info().kernel {
            KernelFormat::BzImage => image.vmlinuz(),
            KernelFormat::Elf => image.vmlinux(),
        },
        initramfs: image.initramfs(),
        cmdline,
    }
}

/// Size of the guest's disk: that of the image's root file system.
pub fn disk_bytes(image: &Image) -> u64 {
    image
        .manifest
        .files
        .get("rootfs.ext4")
        .map_or(0, |file| file.size)
}

/// A machine that was booted to become a template: its disk and memory will be kept.
pub struct BootedMachine {
    /// The VM.
    pub vm: Arc<dyn Machine>,
    /// Its guest agent.
    pub guest: Guest,
    /// Authorises the host towards it.
    pub host_token: AccessToken,
    /// The restore id its guest agent waits for.
    pub restore_id: String,
    /// Its memory, shared with QEMU until it is sealed.
    pub memory: Arc<MemoryFile>,
    ground: Ground,
}

impl BootedMachine {
    /// Ends the VM and gives everything back but memory and disk, which belong to the
    /// template that is being made.
    pub async fn give_back(self, site: &Site) -> Result<Arc<MemoryFile>, MachineError> {
        let killed = self.vm.kill().await;
        drop(self.vm);
        self.ground.give_back(site).await;
        killed?;
        Ok(self.memory)
    }
}

/// Boots `image` with an empty layer over its root file system at `disk`.
pub async fn boot_for_template(
    site: &Site,
    image: &Image,
    name: &str,
    shape: Shape,
    disk: &Path,
) -> Result<BootedMachine, MachineError> {
    let ground = Ground::take(site).await?;
    let inner = async {
        let host_token = AccessToken::generate()?;
        let restore_id = new_restore_id()?;
        let channel = restore_channel(&restore_id, name, &host_token)?;
        site.vmm.create_layer(disk, disk_bytes(image))?;
        let chain = DiskChain {
            base: image.rootfs(),
            layers: Vec::new(),
            top: disk.to_owned(),
        };
        let boot = boot_files(site, image, kernel_command_line(site));
        let mut machine = ground.spec(site, shape, boot, chain, channel).await?;
        // It is nobody's yet.
        machine.disk_limits = DiskLimits::default();
        let memory = Arc::new(MemoryFile::create(shape.memory.bytes()).map_err(VmmError::from)?);
        let vm = site
            .vmm
            .boot(BootSpec {
                machine,
                memory: memory.clone(),
            })
            .await?;
        if let Err(error) = ground.confine(site, shape, &vm, None) {
            kill_unconfined(&vm).await;
            return Err(error);
        }
        Ok((vm, host_token, restore_id, memory))
    };
    match inner.await {
        Ok((vm, host_token, restore_id, memory)) => {
            let guest = Guest::new(ground.slot.guest());
            Ok(BootedMachine {
                vm,
                guest,
                host_token,
                restore_id,
                memory,
                ground,
            })
        }
        Err(error) => {
            ground.give_back(site).await;
            Err(error)
        }
    }
}
