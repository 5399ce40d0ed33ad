//! Restoring a machine from a template or a snapshot, at once or with a monitor that waits.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wrenn_snapshot::{DiskFile, Snapshot, SnapshotError, SnapshotId};
use wrenn_types::AccessToken;
use wrenn_vmm::{
    Delta, DiskChain, DiskLayer, FIRMWARE_BYTES, Fingerprint, LayerFormat, LoadSpec, Machine,
    MachineSpec, RestoreSpec, ServedSpec, state_file,
};

use super::bringup::{
    Ground, boot_files, kernel_command_line, kill_unconfined, new_restore_id, restore_channel,
};
use super::page_server::PageServer;
use super::{LiveMachine, MachineError, Phases, RECORD_VERSION, Record, Site};
use crate::guest::Guest;
use crate::snapshots::{SnapshotPages, blocking, firmware_part};
use crate::template::LoadedTemplate;

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
    /// The template's state, or one saved over it and what it changed of the memory.
    Loaded(File, Option<Delta>),
    /// The memory is this snapshot's, from a page server.
    Served(File, SnapshotId),
}

/// The disk layers over the template's, and what is in memory.
async fn contents(
    site: &Site,
    origin: &Origin,
) -> Result<(Vec<DiskLayer>, Beginning), MachineError> {
    let Some(snapshot) = origin.snapshot.clone() else {
        let path = origin.template.state();
        let state = File::open(&path).map_err(|source| MachineError::File {
            action: "open",
            path,
            source,
        })?;
        return Ok((Vec::new(), Beginning::Loaded(state, None)));
    };
    if !origin.boots() {
        return saved_contents(site, snapshot).await;
    }
    let layers = blocking(move || snapshot.disk_layers()).await?;
    Ok((layer_files(site, layers)?, Beginning::Boot))
}

/// Where these layers are, if this host's monitor can have them.
fn layer_files(site: &Site, layers: Vec<DiskFile>) -> Result<Vec<DiskLayer>, MachineError> {
    let usable = |file: DiskFile| {
        let format = usable_format(site, &file.layer.format)?;
        Ok(DiskLayer::new(format, file.path))
    };
    layers.into_iter().map(usable).collect()
}

/// The disk format of this name, if this host's monitor can build on it.
fn usable_format(site: &Site, name: &str) -> Result<LayerFormat, MachineError> {
    let here = site.vmm.info().layers;
    LayerFormat::from_name(name)
        .filter(|format| here.builds_on(*format))
        .ok_or_else(|| MachineError::OtherFormat(name.to_owned(), here.name()))
}

async fn saved_contents(
    site: &Site,
    snapshot: Arc<Snapshot>,
) -> Result<(Vec<DiskLayer>, Beginning), MachineError> {
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
        Some(delta) => Beginning::Loaded(state, Some(delta)),
        None => Beginning::Served(state, id),
    };
    Ok((layer_files(site, layers)?, beginning))
}

/// Restores a machine in a slot of its own, or prepares its boot. It is loaded and stopped;
/// the id of the restore that its guest agent waits for is returned with it.
pub async fn restore(
    site: &Site,
    origin: &Origin,
    phases: &mut Phases,
) -> Result<(LiveMachine, String), MachineError> {
    let (layers, beginning) = verified(site, origin, phases).await?;
    restore_from(site, origin, layers, beginning, phases).await
}

async fn verified(
    site: &Site,
    origin: &Origin,
    phases: &mut Phases,
) -> Result<(Vec<DiskLayer>, Beginning), MachineError> {
    let mut clock = Instant::now();
    let contents = contents(site, origin).await?;
    if origin.snapshot.is_some() {
        phases.note("verify", &mut clock);
    }
    Ok(contents)
}

async fn restore_from(
    site: &Site,
    origin: &Origin,
    layers: Vec<DiskLayer>,
    beginning: Beginning,
    phases: &mut Phases,
) -> Result<(LiveMachine, String), MachineError> {
    let mut clock = Instant::now();
    let template = &origin.template;
    check_format(site, template)?;
    let ground = Ground::take(site).await?;
    phases.note("slot", &mut clock);
    let started = async {
        let cmdline = match beginning {
            // For the clock of the host that it is now, not of the one it was frozen on.
            Beginning::Boot => kernel_command_line(site),
            _ => template.manifest.cmdline.clone(),
        };
        let prepared = prepare(site, &ground, template, layers, cmdline, origin.generation).await?;
        phases.note("prepare", &mut clock);
        let (vm, page_server) = start(site, &ground, template, prepared.spec, beginning).await?;
        phases.note("restore", &mut clock);
        Ok(Started {
            vm,
            page_server,
            record: prepared.record,
            restore_id: prepared.restore_id,
        })
    };
    let started = started.await;
    finish(site, ground, started).await
}

/// A machine that was started and has no limits yet.
struct Started {
    vm: Arc<dyn Machine>,
    /// Number of the process that serves its memory, if one does.
    page_server: Option<u32>,
    record: Record,
    restore_id: String,
}

/// Limits a machine that was started on its ground, or gives everything back.
async fn finish(
    site: &Site,
    ground: Ground,
    started: Result<Started, MachineError>,
) -> Result<(LiveMachine, String), MachineError> {
    let confined = match started {
        Ok(it) => match ground.confine(site, it.record.shape, &it.vm, it.page_server) {
            Ok(()) => Ok(it),
            Err(error) => {
                kill_unconfined(&it.vm).await;
                Err(error)
            }
        },
        Err(error) => Err(error),
    };
    match confined {
        Ok(Started {
            vm,
            record,
            restore_id,
            ..
        }) => {
            let guest = Guest::new(ground.slot.guest());
            let Ground { slot, folder, .. } = ground;
            let machine = LiveMachine {
                vm,
                vmm: site.vmm.clone(),
                slot,
                guest,
                folder,
                record,
            };
            Ok((machine, restore_id))
        }
        Err(error) => {
            ground.give_back(site).await;
            Err(error)
        }
    }
}

fn check_format(site: &Site, template: &LoadedTemplate) -> Result<(), MachineError> {
    usable_format(site, &template.manifest.disk_format).map(drop)
}

/// How many layers of a disk are below those of what was saved: the image's root file system and
/// the template's layer; see [`prepare`].
pub const BELOW_SAVED: usize = 2;

/// What a monitor is started with.
struct Prepared {
    spec: MachineSpec,
    record: Record,
    restore_id: String,
}

async fn prepare(
    site: &Site,
    ground: &Ground,
    template: &LoadedTemplate,
    layers: Vec<DiskLayer>,
    cmdline: String,
    generation: u64,
) -> Result<Prepared, MachineError> {
    let manifest = &template.manifest;
    let host_token = AccessToken::generate()?;
    let restore_id = new_restore_id()?;
    let channel = restore_channel(&restore_id, &manifest.name, &host_token)?;
    let top = ground.folder.join(FIRST_LAYER);
    site.vmm.create_layer(&top, manifest.disk_bytes)?;
    let format = usable_format(site, &manifest.disk_format)?;
    let base = DiskLayer::new(format, template.disk());
    let disk = DiskChain {
        base: template.image.rootfs(),
        layers: [base].into_iter().chain(layers).collect(),
        top,
    };
    let record = Record {
        version: RECORD_VERSION,
        slot: ground.slot.index(),
        template_digest: template.digest.clone(),
        shape: manifest.shape,
        disk_mib: manifest.disk_bytes >> 20,
        envd_version: manifest.envd_version.clone(),
        generation,
        fingerprint: Some(site.vmm.info().fingerprint.clone()),
        host_token: host_token.reveal().to_owned(),
    };
    record.write(&ground.folder)?;
    let boot = boot_files(site, &template.image, cmdline);
    let spec = ground
        .spec(site, manifest.shape, boot, disk, channel)
        .await?;
    Ok(Prepared {
        spec,
        record,
        restore_id,
    })
}

/// A machine whose monitor runs and waits to be told what it becomes: any state saved over its
/// template, or the template itself. Starting the monitor is most of what a restore takes.
pub struct Standby {
    machine: LiveMachine,
    restore_id: String,
}

impl Standby {
    /// Starts one.
    pub async fn start(
        site: &Site,
        template: &Arc<LoadedTemplate>,
    ) -> Result<Standby, MachineError> {
        check_format(site, template)?;
        let ground = Ground::take(site).await?;
        let started = async {
            let cmdline = template.manifest.cmdline.clone();
            let prepared = prepare(site, &ground, template, Vec::new(), cmdline, 0).await?;
            let memory = template.memory.clone();
            let vm = site.vmm.stand_by(prepared.spec, memory).await?;
            Ok(Started {
                vm,
                page_server: None,
                record: prepared.record,
                restore_id: prepared.restore_id,
            })
        };
        let started = started.await;
        let (machine, restore_id) = finish(site, ground, started).await?;
        Ok(Standby {
            machine,
            restore_id,
        })
    }

    /// Digest of the template it waits for a state over.
    pub fn template_digest(&self) -> &str {
        &self.machine.record.template_digest
    }

    /// Whether its monitor still runs.
    pub fn lives(&self) -> bool {
        self.machine.vm.exited().borrow().is_none()
    }

    /// As [`restore`], with this machine.
    pub async fn restore(
        self,
        site: &Site,
        origin: &Origin,
        phases: &mut Phases,
    ) -> Result<(LiveMachine, String), MachineError> {
        let (layers, beginning) = match verified(site, origin, phases).await {
            Ok(contents) => contents,
            Err(error) => {
                self.give_back(site).await;
                return Err(error);
            }
        };
        let (state, delta) = match beginning {
            Beginning::Loaded(state, delta) => (state, delta),
            other => {
                self.give_back(site).await;
                return restore_from(site, origin, layers, other, phases).await;
            }
        };
        let Standby {
            mut machine,
            restore_id,
        } = self;
        let mut clock = Instant::now();
        machine.record.generation = origin.generation;
        let loaded = async {
            machine.record.write(&machine.folder)?;
            let memory = origin.template.memory.clone();
            let spec = LoadSpec {
                layers: layers.into_iter().map(|layer| layer.path).collect(),
                memory,
                state,
                delta,
            };
            Ok(machine.vm.load(spec).await?)
        };
        match loaded.await {
            Ok(()) => {
                phases.note("restore", &mut clock);
                Ok((machine, restore_id))
            }
            Err(error) => {
                machine.give_back(site).await;
                Err(error)
            }
        }
    }

    /// Ends it.
    pub async fn give_back(self, site: &Site) {
        self.machine.give_back(site).await;
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
        Beginning::Loaded(state, None) => site.vmm.restore(spec(machine, state)).await?,
        Beginning::Loaded(state, Some(delta)) => {
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
