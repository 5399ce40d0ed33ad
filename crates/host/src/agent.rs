//! The agent as a whole: start, adopt, serve, stop.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use wrenn_image::ImageStore;
use wrenn_net::{NetConfig, NetError, SlotPool};
use wrenn_snapshot::SnapshotError;
use wrenn_types::SandboxId;
use wrenn_vmm::probe::Driver;
use wrenn_vmm::{
    FirecrackerConfig, FirecrackerVmm, Launcher, QemuConfig, QemuVmm, Vmm, VmmError, driver_in,
    lives_in,
};
use wrenn_wire::wrenn::host::v1::HostServiceExt;

use crate::activity::InUse;
use crate::cgroups::Cgroups;
use crate::config::HostConfig;
use crate::drain::Drain;
use crate::events::EventLog;
use crate::guest::chain;
use crate::machine::{
    MachineError, Site, is_a_sandboxs, machine_folders, name_of, record_in, sweep_unfinished,
    vm_folder,
};
use crate::metrics;
use crate::pool::Pool;
use crate::rpc::HostRpc;
use crate::sandbox::{Common, DialFailure, Diffs, Everything, Manager, Paused};
use crate::snapshots::Snapshots;
use crate::template::{TemplateError, TemplateStore};

/// Restores under way at the same time, for each processor of the host.
const RESTORES_PER_CPU: usize = 2;
/// How long a guest agent may take to say how busy its guest is, on the reference machine.
const LOOK_PATIENCE: Duration = Duration::from_secs(5);
/// Network slots held ready beyond those of waiting machines.
const SPARE_SLOTS: usize = 4;

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// VMs, namespaces and taps need root.
    #[error("running sandboxes needs root: try `sudo wrenn up`")]
    NotRoot,
    /// Another agent has this data folder.
    #[error(
        "another wrenn runs on {data_dir}: end it with `wrenn down`, or use another --data-dir"
    )]
    Occupied {
        /// The data folder.
        data_dir: PathBuf,
    },
    /// The data folder cannot be used.
    #[error("cannot use {path} as data folder: {source}")]
    DataDir {
        /// What could not be made or opened.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Looking at the host was cut short.
    #[error("the probe of this host did not finish")]
    Probe(#[source] tokio::task::JoinError),
    /// No VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Machines of another monitor run here, which cannot be used any more.
    #[error(
        "{driver} runs {machines} machines of {data_dir}, and cannot be used any more; they run on, and nothing was changed: make it usable again, or start the agent as it was started before"
    )]
    OtherMonitor {
        /// What runs them.
        driver: Driver,
        /// How many.
        machines: usize,
        /// The data folder.
        data_dir: PathBuf,
        /// Why it cannot be used.
        source: Box<VmmError>,
    },
    /// No network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The images cannot be opened.
    #[error("cannot open the images: {0}")]
    Images(#[from] wrenn_image::ImageError),
    /// What an earlier agent left cannot be looked at.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The snapshots cannot be opened.
    #[error("cannot open the snapshots")]
    Snapshots(#[from] SnapshotError),
    /// The default template cannot be had.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// What the agent is made of.
pub struct Parts {
    pub(crate) config: HostConfig,
    pub(crate) site: Arc<Site>,
    pub(crate) templates: Arc<TemplateStore>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) manager: Arc<Manager>,
    pub(crate) events: Arc<EventLog>,
    pub(crate) drain: Arc<Drain>,
}

/// Holds the data folder for this process.
pub(crate) struct DataDirLock(#[allow(dead_code, reason = "held, not read")] File);

/// Makes the data folder where it is missing and takes it for this process.
pub(crate) fn lock_data_dir(config: &HostConfig) -> Result<DataDirLock, AgentError> {
    if !rustix::process::geteuid().is_root() {
        return Err(AgentError::NotRoot);
    }
    let fail = |path: PathBuf| move |source| AgentError::DataDir { path, source };
    let dirs = [
        config.data_dir.clone(),
        config.images_dir(),
        config.templates_dir(),
        config.machines_dir(),
        config.network_dir(),
    ];
    for dir in dirs {
        // Passable for the VMs' users, whose own folders lie below.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&dir)
            .map_err(fail(dir.clone()))?;
    }
    // What a guest's memory held is nobody else's.
    for dir in [
        config.snapshots_dir(),
        config.working_sets_dir(),
        config.paused_dir(),
    ] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(fail(dir.clone()))?;
    }
    let path = config.data_dir.join("agent.lock");
    let file = File::create(&path).map_err(fail(path.clone()))?;
    match file.try_lock() {
        Ok(()) => Ok(DataDirLock(file)),
        Err(std::fs::TryLockError::WouldBlock) => Err(AgentError::Occupied {
            data_dir: config.data_dir.clone(),
        }),
        Err(std::fs::TryLockError::Error(source)) => Err(fail(path)(source)),
    }
}

/// The driver and the network of this host.
pub(crate) async fn build_site(config: HostConfig) -> Result<Site, AgentError> {
    let (program, args) = config.keeper.clone();
    let launcher = Launcher {
        program,
        args: args.into_iter().map(Into::into).collect(),
    };
    let (data_dir, driver, accelerator) =
        (config.data_dir.clone(), config.driver, config.accelerator);
    let others = other_machines(&config.machines_dir())?;
    let probed = tokio::task::spawn_blocking(move || {
        let report = wrenn_vmm::probe::host(Some(&data_dir))?;
        let chosen = wrenn_vmm::probe::choose_driver(&report, driver)?;
        let made = |driver, accelerator, why| -> Result<Arc<dyn Vmm>, VmmError> {
            let launcher = launcher.clone();
            Ok(match driver {
                Driver::Firecracker => {
                    let config = FirecrackerConfig::from_report(&report, why, launcher, &data_dir)?;
                    let disks = &config.cloning;
                    tracing::info!(way = %disks.way, why = disks.why, "Firecracker's disks");
                    Arc::new(FirecrackerVmm::new(config))
                }
                Driver::Qemu => {
                    let choice = wrenn_vmm::probe::choose(&report, accelerator)?;
                    let config = QemuConfig::from_report(&report, choice, launcher)?;
                    Arc::new(QemuVmm::new(config))
                }
            })
        };
        let vmm = made(chosen.driver, accelerator, chosen.why)?;
        let others = others
            .into_iter()
            .filter(|(other, _)| *other != chosen.driver);
        let others = others.map(|(driver, machines)| {
            tracing::info!(%driver, machines, "machines of another monitor run here");
            let why = "machines that it runs are here".to_owned();
            made(driver, None, why).map_err(|source| AgentError::OtherMonitor {
                driver,
                machines,
                data_dir: data_dir.clone(),
                source: Box::new(source),
            })
        });
        Ok::<_, AgentError>((vmm, others.collect::<Result<Vec<_>, _>>()?))
    });
    let (vmm, others) = probed.await.map_err(AgentError::Probe)??;
    let info = vmm.info();
    tracing::info!(vmm = info.kind, version = info.version, accelerator = %info.accelerator, why = info.why, "virtual machine monitor");
    let mut net = NetConfig::new(config.network_dir());
    net.name_prefix = config.network_prefix.clone();
    net.subnet = config.subnet.parse()?;
    net.ready = SPARE_SLOTS;
    net.limits = config.guest_limits;
    let slots = SlotPool::start(net).await?;
    let cgroups = Cgroups::probe(&config.network_prefix);
    match cgroups.describe() {
        Ok(what) => tracing::info!(what, "control groups"),
        Err(why) => tracing::warn!(
            why,
            "machines run without limits of their own: no control groups"
        ),
    }
    Ok(Site {
        config,
        vmm,
        others,
        slots,
        cgroups,
    })
}

/// How many sandboxes' machines of which driver live here. What cannot be read is told when it is adopted.
fn other_machines(machines: &Path) -> Result<Vec<(Driver, usize)>, AgentError> {
    let folders = machine_folders(machines)?;
    let sandboxes = folders.iter().filter(|folder| is_a_sandboxs(folder));
    let living = sandboxes.map(|folder| vm_folder(folder));
    let living = living.filter(|dir| lives_in(dir).unwrap_or(false));
    let drivers: Vec<_> = living.filter_map(|dir| driver_in(&dir).ok()?).collect();
    let count = |driver| drivers.iter().filter(|each| **each == driver).count();
    let counted = [Driver::Qemu, Driver::Firecracker].map(|driver| (driver, count(driver)));
    Ok(counted.into_iter().filter(|(_, n)| *n > 0).collect())
}

/// Limits what machines may use of the disk, where that was asked for.
fn limit_disk(site: &mut Site) {
    let HostConfig {
        data_dir,
        disk_limits,
        ..
    } = &site.config;
    // What they cannot do, the monitors do.
    if let Err(why) = site.cgroups.limit_disk(data_dir, *disk_limits) {
        tracing::info!(why, "monitors limit what sandboxes use of the disk");
    }
}

/// Takes over what an earlier agent left: paused sandboxes, machines, and pins of snapshots.
/// Returns the slots that are in use.
async fn adopt_all(
    config: &HostConfig,
    manager: &Manager,
    snapshots: &Snapshots,
) -> Result<HashSet<u32>, AgentError> {
    let dir = config.paused_dir();
    let left = snapshots.inventory().await?;
    let mut needed = HashSet::new();
    // What cannot be read may need any snapshot.
    let mut all_read = true;
    sweep_unfinished(&dir).map_err(|source| AgentError::DataDir {
        path: dir.clone(),
        source,
    })?;
    let paused = Paused::read_all(&dir).map_err(|source| AgentError::DataDir {
        path: dir.clone(),
        source,
    })?;
    for paused in paused {
        match paused {
            Ok(paused) => {
                needed.insert((paused.snapshot, paused.journal.sandbox.to_string()));
                manager.adopt_paused(paused);
            }
            Err(error) => {
                tracing::error!(folder = %dir.display(), %error, "a paused sandbox is not there until this is mended");
                all_read = false;
            }
        }
    }
    let mut in_use = HashSet::new();
    for folder in newest_first(machine_folders(&config.machines_dir())?) {
        match manager.adopt(folder.clone()).await {
            Ok(adopted) => {
                needed.extend(adopted.pin);
                in_use.extend(adopted.slot);
            }
            // One that cannot be read must not keep the others from running on.
            Err(error) => {
                tracing::error!(folder = %folder.display(), error = %chain(&error), "not adopted");
                all_read = false;
                // If its machine runs on, it does so with its network.
                in_use.extend(record_in(&folder).map(|record| record.slot));
            }
        }
    }
    if all_read {
        match snapshots.sweep(left, needed).await {
            Ok(0) => {}
            Ok(swept) => tracing::info!(swept, "snapshots that nobody needs are deleted"),
            // One that is damaged must not keep the agent from starting.
            Err(error) => {
                tracing::error!(error = %chain(&error), "snapshots that nobody needs may stay");
            }
        }
    } else {
        tracing::warn!("snapshots that nobody needs stay, for not everything could be read");
    }
    Ok(in_use)
}

/// Removes the control groups of machines that have no folder any more.
pub(crate) async fn sweep_cgroups(site: &Site) -> Result<(), MachineError> {
    let folders = machine_folders(&site.config.machines_dir())?;
    let alive: Vec<String> = folders.iter().map(|folder| name_of(folder)).collect();
    let removed = site.cgroups.sweep(&alive).await;
    if !removed.is_empty() {
        tracing::info!(machines = ?removed, "control groups swept");
    }
    Ok(())
}

/// Of two machines of one sandbox the one that was restored later is adopted first, and so is
/// the sandbox's. Folders that cannot be read come last.
fn newest_first(folders: Vec<PathBuf>) -> Vec<PathBuf> {
    let mut folders: Vec<_> = folders
        .into_iter()
        .map(|folder| (record_in(&folder).map(|record| record.generation), folder))
        .collect();
    folders.sort_by(|a, b| b.cmp(a));
    folders.into_iter().map(|(_, folder)| folder).collect()
}

/// The agent of this host.
pub struct HostAgent {
    parts: Arc<Parts>,
    filler: JoinHandle<()>,
    collector: JoinHandle<()>,
    sampler: JoinHandle<()>,
    _lock: DataDirLock,
}

impl HostAgent {
    /// Starts the agent: takes the data folder, adopts machines that an earlier agent left
    /// running, sweeps what is dead, and begins to fill the pool.
    pub async fn start(config: HostConfig) -> Result<HostAgent, AgentError> {
        let lock = lock_data_dir(&config)?;
        let images = ImageStore::open(config.images_dir())?;
        let templates = Arc::new(TemplateStore::open(config.templates_dir(), images));
        let mut site = build_site(config.clone()).await?;
        limit_disk(&mut site);
        let site = Arc::new(site);
        let pool = Pool::new(site.clone(), templates.clone(), config.pool_size);
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        let snapshots = {
            let (dir, sets) = (config.snapshots_dir(), config.working_sets_dir());
            let opened = tokio::task::spawn_blocking(move || Snapshots::open(&dir, sets));
            opened.await.map_err(AgentError::Probe)??
        };
        let events = EventLog::open(&config.data_dir).map_err(|source| AgentError::DataDir {
            path: config.data_dir.clone(),
            source,
        })?;
        let events = Arc::new(events);
        let drain = Drain::open(&config.data_dir).map_err(|source| AgentError::DataDir {
            path: config.data_dir.clone(),
            source,
        })?;
        if drain.since().is_some() {
            tracing::warn!("this host drains and starts nothing until `wrenn drain --off`");
        }
        let drain = Arc::new(drain);
        let manager = Arc::new(Manager::new(Arc::new(Common {
            site: site.clone(),
            templates: templates.clone(),
            pool: pool.clone(),
            snapshots: snapshots.clone(),
            diffs: Diffs::default(),
            merges: tokio::sync::Semaphore::new(1),
            restores: tokio::sync::Semaphore::new(cpus * RESTORES_PER_CPU),
            events: events.clone(),
            drain: drain.clone(),
        })));
        let in_use = adopt_all(&config, &manager, &snapshots).await?;
        sweep_cgroups(&site).await?;
        let swept = site.slots.sweep(&in_use).await?;
        if !swept.removed.is_empty() {
            tracing::info!(slots = ?swept.removed, "swept");
        }
        for (slot, error) in &swept.failed {
            tracing::warn!(slot, error = %chain(error), "a network slot that nobody uses stays");
        }
        let filler = pool.keep_filled(config.default_template.clone());
        let collector = snapshots.keep_collected();
        let sampler = metrics::sample(
            manager.clone(),
            events.clone(),
            config.network_prefix.clone(),
            site.vmm.info().deadline(LOOK_PATIENCE),
        );
        let parts = Arc::new(Parts {
            config,
            site,
            templates,
            pool,
            snapshots,
            manager,
            events,
            drain,
        });
        Ok(HostAgent {
            parts,
            filler,
            collector,
            sampler,
            _lock: lock,
        })
    }

    /// Has the default template ready, booting and freezing it first where it must be.
    pub async fn prepare(&self) -> Result<(), AgentError> {
        let parts = &self.parts;
        parts
            .templates
            .get(&parts.site, &parts.config.default_template, None)
            .await?;
        Ok(())
    }

    /// The RPC service, to be called in this process or served to a control plane.
    pub fn router(&self) -> connectrpc::Router {
        Arc::new(HostRpc::new(self.parts.clone())).register(connectrpc::Router::new())
    }

    /// Opens connections to ports of sandboxes, for the proxy.
    pub fn dialer(&self) -> InProcessHost {
        InProcessHost(self.parts.clone())
    }

    /// Sandboxes that have a machine.
    pub fn alive(&self) -> Vec<SandboxId> {
        let handles = self.parts.manager.list();
        handles
            .iter()
            .filter(|h| h.live().is_some())
            .map(|h| h.id)
            .collect()
    }

    /// Pauses all sandboxes that run, and starts nothing any more. What cannot be paused runs on.
    pub async fn pause_all(&self) -> Everything {
        self.parts.manager.close();
        self.parts.manager.pause_all().await
    }

    /// Ends all sandboxes, paused ones included, and starts nothing any more.
    pub async fn destroy_all(&self) -> Everything {
        self.parts.manager.close();
        self.parts.manager.destroy_all().await
    }

    /// Ends the agent. Machines that wait are ended; sandboxes live on for the next agent,
    /// or are ended with `destroy`.
    pub async fn shutdown(self, destroy: bool) {
        self.parts.manager.close();
        self.parts.manager.end_diffs().await;
        self.sampler.abort();
        if destroy {
            for (id, error) in self.parts.manager.destroy_all().await.failed {
                tracing::warn!(sandbox = %id, error = %chain(&error), "could not be ended");
            }
        }
        self.parts.pool.close(self.filler).await;
        // Half-way it leaves nothing that the next agent does not find and finish.
        self.collector.abort();
        if let Err(error) = self.parts.snapshots.collect().await {
            tracing::warn!(error = %chain(&error), "deleted snapshots still take their space");
        }
        self.parts.site.slots.shutdown().await;
        self.parts.site.cgroups.close();
    }
}

/// The way into sandboxes for whoever lives in the agent's process.
#[derive(Clone)]
pub struct InProcessHost(Arc<Parts>);

impl InProcessHost {
    /// Opens a connection to a port of a running sandbox; the guard counts as use.
    pub async fn dial(
        &self,
        sandbox: SandboxId,
        port: u16,
    ) -> Result<(TcpStream, InUse), DialFailure> {
        self.0.manager.dial(sandbox, port).await
    }
}
