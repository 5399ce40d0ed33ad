//! Bringing a machine up: slot, folder, disk, VM. Whatever fails, the steps before it are
//! given back.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use sha2::{Digest, Sha512};
use wrenn_image::Image;
use wrenn_net::Slot;
use wrenn_snapshot::{DiskFile, Snapshot, SnapshotError, SnapshotId};
use wrenn_types::{AccessToken, Shape};
use wrenn_vmm::{
    Accelerator, BootFiles, BootSpec, Delta, DiskChain, FIRMWARE_BYTES, Fingerprint,
    IDENTITY_BYTES, KernelFormat, Machine, MachineSpec, MemoryFile, RestoreSpec, ServedSpec,
    VmmError, state_file,
};

use super::page_server::PageServer;
use super::{
    LiveMachine, MachineError, Phases, RECORD, RECORD_VERSION, Record, Site, files, name_of,
    write_json,
};
use crate::cgroups::Limits;
use crate::guest::Guest;
use crate::snapshots::{SnapshotPages, blocking, firmware_part};
use crate::template::LoadedTemplate;

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

fn restore_channel(
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
struct Ground {
    slot: Slot,
    folder: PathBuf,
    uid: u32,
}

impl Ground {
    async fn take(site: &Site) -> Result<Ground, MachineError> {
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

    async fn give_back(self, site: &Site) {
        if let Err(error) = files::remove_folder(&self.folder).await {
            tracing::error!(%error, "the folder of a machine that did not start stays");
        }
        if let Err(error) = site.cgroups.remove(&name_of(&self.folder)).await {
            tracing::error!(%error, "the control group of a machine that did not start stays");
        }
        site.slots.give_back(self.slot).await;
    }

    /// Limits what a machine's processes may use, before its guest runs user code.
    fn confine(
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

    async fn spec(
        &self,
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
            tap: Some(self.slot.open_tap().await?),
            mac: GUEST_MAC,
            identity,
            companions: relay.into_descriptors(),
        })
    }
}

/// Ends a machine that could not be limited.
async fn kill_unconfined(vm: &Arc<dyn Machine>) {
    if let Err(error) = vm.kill().await {
        tracing::error!(%error, "a machine that could not be limited could not be ended either");
    }
}

/// The disk layer, in a machine's folder, that a machine starts to write to.
pub const FIRST_LAYER: &str = "disk";

/// What a machine is restored from.
#[derive(Clone)]
pub struct Origin {
    /// The template.
    pub template: Arc<LoadedTemplate>,
    /// What was saved over it since, if it is not to be the template itself.
    pub snapshot: Option<Arc<Snapshot>>,
    /// How often its line of memory was restored, this time included.
    pub generation: u64,
    /// Of the snapshot only the disk is wanted: it is booted.
    pub disk_only: bool,
}

/// How long the guest agent may take for its restore hook, on the reference machine.
const HOOK_PATIENCE: Duration = Duration::from_secs(20);
/// The same from the first instruction of a boot on, which takes 4 to 6 s there.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(30);

impl Origin {
    /// A template as it was frozen.
    pub fn template(template: Arc<LoadedTemplate>) -> Origin {
        Origin {
            template,
            snapshot: None,
            generation: 1,
            disk_only: false,
        }
    }

    /// Whether a machine from here boots, because there is no memory to go on with.
    pub fn boots(&self) -> bool {
        let without = |snapshot: &Arc<Snapshot>| self.disk_only || snapshot.memory().is_none();
        self.snapshot.as_ref().is_some_and(without)
    }

    /// How long the guest agent of such a machine may take, on the reference machine.
    pub fn patience(&self) -> Duration {
        match self.boots() {
            true => BOOT_PATIENCE,
            false => HOOK_PATIENCE,
        }
    }
}

/// What a machine's processors and memory begin with, read and verified but for the pages,
/// which are when they are brought in.
enum Beginning {
    Boot,
    Template(File),
    Saved(File, Delta),
    /// The memory is this snapshot's, from a page server.
    Served(File, SnapshotId),
}

/// The disk layers over the template's, and what is in memory.
async fn contents(site: &Site, origin: &Origin) -> Result<(Vec<PathBuf>, Beginning), MachineError> {
    let Some(snapshot) = origin.snapshot.clone() else {
        let path = origin.template.state();
        let state = File::open(&path).map_err(|source| MachineError::File {
            action: "open",
            path,
            source,
        })?;
        return Ok((Vec::new(), Beginning::Template(state)));
    };
    if !origin.boots() {
        return saved_contents(site, snapshot).await;
    }
    let layers = blocking(move || snapshot.disk_layers()).await?;
    Ok((layer_paths(site, layers)?, Beginning::Boot))
}

/// Where these layers are, if this host's monitor can have them.
fn layer_paths(site: &Site, layers: Vec<DiskFile>) -> Result<Vec<PathBuf>, MachineError> {
    let format = site.vmm.info().layers.name();
    match layers.iter().find(|layer| layer.layer.format != format) {
        Some(other) => Err(MachineError::OtherFormat(
            other.layer.format.clone(),
            format,
        )),
        None => Ok(layers.into_iter().map(|layer| layer.path).collect()),
    }
}

async fn saved_contents(
    site: &Site,
    snapshot: Arc<Snapshot>,
) -> Result<(Vec<PathBuf>, Beginning), MachineError> {
    let here = site.vmm.info().fingerprint.clone();
    let served = site.vmm.info().page_server;
    let read = blocking(move || {
        let layers = snapshot.disk_layers()?;
        let part = firmware_part()?;
        let firmware = snapshot
            .parts()
            .iter()
            .find(|(name, _)| *name == part)
            .and_then(|(_, content)| <[u8; FIRMWARE_BYTES]>::try_from(&content[..]).ok());
        let (Some(memory), Some(firmware)) = (snapshot.memory(), firmware) else {
            let problem = format!("snapshot {} holds a disk and no machine", snapshot.id());
            return Err(SnapshotError::Incomplete(problem));
        };
        let delta = (!served).then(|| Delta {
            firmware: Box::new(firmware),
            pages: Box::new(SnapshotPages(memory.delta())),
        });
        Ok((
            snapshot.manifest().description.vmm.fingerprint.clone(),
            layers,
            snapshot.device_state().to_vec(),
            delta,
            snapshot.id(),
        ))
    });
    let (fingerprint, layers, state, delta, id) = read.await?;
    let saved: Fingerprint = serde_json::from_value(fingerprint)
        .map_err(|e| MachineError::OtherMonitor(format!("its description is not known: {e}")))?;
    here.accepts(&saved)
        .map_err(|differences| MachineError::OtherMonitor(differences.to_string()))?;
    let state = state_file(&state).map_err(|source| MachineError::File {
        action: "hold the device state of",
        path: site.config.snapshots_dir(),
        source,
    })?;
    let beginning = match delta {
        Some(delta) => Beginning::Saved(state, delta),
        None => Beginning::Served(state, id),
    };
    Ok((layer_paths(site, layers)?, beginning))
}

/// Restores a machine in a slot of its own, or prepares its boot. It is loaded and stopped;
/// the id of the restore that its guest agent waits for is returned with it.
pub async fn restore(
    site: &Site,
    origin: &Origin,
    phases: &mut Phases,
) -> Result<(LiveMachine, String), MachineError> {
    let mut clock = Instant::now();
    let template = &origin.template;
    let (layers, beginning) = contents(site, origin).await?;
    if origin.snapshot.is_some() {
        phases.note("verify", &mut clock);
    }
    let manifest = &template.manifest;
    let format = site.vmm.info().layers.name();
    if manifest.disk_format != format {
        let other = manifest.disk_format.clone();
        return Err(MachineError::OtherFormat(other, format));
    }
    let ground = Ground::take(site).await?;
    phases.note("slot", &mut clock);
    let inner = async {
        let host_token = AccessToken::generate()?;
        let restore_id = new_restore_id()?;
        let channel = restore_channel(&restore_id, &manifest.name, &host_token)?;
        let top = ground.folder.join(FIRST_LAYER);
        site.vmm.create_layer(&top, manifest.disk_bytes)?;
        let disk = DiskChain {
            base: template.image.rootfs(),
            layers: [template.disk()].into_iter().chain(layers).collect(),
            top,
        };
        let record = Record {
            version: RECORD_VERSION,
            slot: ground.slot.index(),
            template_digest: template.digest.clone(),
            shape: manifest.shape,
            disk_mib: manifest.disk_bytes >> 20,
            envd_version: manifest.envd_version.clone(),
            generation: origin.generation,
            fingerprint: Some(site.vmm.info().fingerprint.clone()),
            host_token: host_token.reveal().to_owned(),
        };
        write_json(&ground.folder, RECORD, &record).map_err(|source| MachineError::File {
            action: "write",
            path: ground.folder.join(RECORD),
            source,
        })?;
        let cmdline = match beginning {
            // For the clock of the host that it is now, not of the one it was frozen on.
            Beginning::Boot => kernel_command_line(site),
            _ => manifest.cmdline.clone(),
        };
        let boot = boot_files(site, &template.image, cmdline);
        let machine = ground.spec(manifest.shape, boot, disk, channel).await?;
        phases.note("prepare", &mut clock);
        let (vm, page_server) = start(site, &ground, template, machine, beginning).await?;
        phases.note("restore", &mut clock);
        Ok((vm, page_server, record, restore_id))
    };
    let inner = match inner.await {
        Ok((vm, server, record, restore_id)) => {
            match ground.confine(site, manifest.shape, &vm, server) {
                Ok(()) => Ok((vm, record, restore_id)),
                Err(error) => {
                    kill_unconfined(&vm).await;
                    Err(error)
                }
            }
        }
        Err(error) => Err(error),
    };
    match inner {
        Ok((vm, record, restore_id)) => {
            let guest = Guest::new(ground.slot.guest());
            let Ground { slot, folder, .. } = ground;
            Ok((
                LiveMachine {
                    vm,
                    vmm: site.vmm.clone(),
                    slot,
                    guest,
                    folder,
                    record,
                },
                restore_id,
            ))
        }
        Err(error) => {
            ground.give_back(site).await;
            Err(error)
        }
    }
}

/// Starts a machine; with it goes the number of its page server, if it has one.
async fn start(
    site: &Site,
    ground: &Ground,
    template: &LoadedTemplate,
    machine: MachineSpec,
    beginning: Beginning,
) -> Result<(Arc<dyn Machine>, Option<u32>), MachineError> {
    let memory = template.memory.clone();
    let spec = |machine, state| RestoreSpec {
        machine,
        memory: memory.clone(),
        state,
    };
    let vm = match beginning {
        Beginning::Boot => site.vmm.boot_private(machine, memory).await?,
        Beginning::Template(state) => site.vmm.restore(spec(machine, state)).await?,
        Beginning::Saved(state, delta) => {
            let spec = spec(machine, state);
            site.vmm.restore_delta(spec, delta).await?
        }
        Beginning::Served(state, snapshot) => {
            return start_served(site, ground, template, machine, state, snapshot).await;
        }
    };
    Ok((vm, None))
}

async fn start_served(
    site: &Site,
    ground: &Ground,
    template: &LoadedTemplate,
    machine: MachineSpec,
    state: File,
    snapshot: SnapshotId,
) -> Result<(Arc<dyn Machine>, Option<u32>), MachineError> {
    let server = PageServer::start(site, &ground.folder, ground.uid, template, snapshot).await?;
    let process = server.process().map_err(|source| MachineError::File {
        action: "watch what serves the memory of",
        path: ground.folder.clone(),
        source,
    });
    let started = match process {
        Err(error) => Err(error),
        Ok(process) => {
            let spec = ServedSpec {
                machine,
                socket: server.socket.clone(),
                server: process,
                state,
            };
            site.vmm
                .restore_served(spec)
                .await
                .map_err(MachineError::from)
        }
    };
    match started {
        Ok(vm) => Ok((vm, Some(server.pid))),
        Err(error) => {
            server.end();
            Err(error)
        }
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

fn boot_files(site: &Site, image: &Image, cmdline: String) -> BootFiles {
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
        let machine = ground.spec(shape, boot, chain, channel).await?;
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
