//! From a specification to a running Firecracker that is recorded and answers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::FirecrackerVmm;
use super::api::{Api, ApiError};
use super::drives::DiskInJail;
use super::files::{blocking, make_jail, open_kernel, own_file, path_of, unreadable};
use super::machine::{FirecrackerMachine, Origin};
use super::model::{
    Balloon, BootSource, Drive, Entropy, InstanceInfo, InstanceState, LoadSnapshot, MachineConfig,
    MemoryBackend, MmdsConfig, NetworkInterface, NetworkOverride, Vsock,
};
use crate::delta_file::{DeltaFile, compose};
use crate::keeper::{self, Bind, Console, FIRST_FD, Jail};
use crate::kernel::{TapOrigin, give_tap, tap_origin};
use crate::machine::{IDENTITY_BYTES, MachineSpec};
use crate::memfd::{copy_of, new_memfd};
use crate::record::Monitor;
use crate::supervised::{DEATH_PATIENCE, Supervised};
use crate::{BootSpec, Delta, Machine, RestoreSpec, ServedSpec, VmmError};

/// The folder that becomes the jail's root, in the machine's folder.
pub(super) const JAIL: &str = "jail";
/// The disk in the jail.
pub(super) const DISK: &str = "disk.img";
/// The one folder in the jail that Firecracker may write to: it makes its sockets there.
pub(super) const RUN: &str = "run";
pub(super) const API_SOCKET: &str = "api.sock";
pub(super) const VSOCK: &str = "vsock.sock";
const PROGRAM: &str = "firecracker";
const PAGES_SOCKET: &str = "pages.sock";

/// Identifiers of devices: a state names them.
pub(super) const DRIVE_ID: &str = "disk";
const INTERFACE_ID: &str = "eth0";
/// Where the metadata service answers a guest, which asks it who it is after a restore; known to
/// `wrenn-envd` too. The default, 169.254.169.254, is where programs look for the metadata of the
/// cloud they run in: from a guest nothing is to answer there (G35). Firecracker takes none of
/// 169.254.0.0/24, so it can be none of the guest's own network.
const IDENTITY_ADDRESS: &str = "169.254.87.1";

/// Firecracker's descriptors. The first two are where it writes what it saves; a later agent
/// finds them under these numbers, see [`FirecrackerMachine::adopt`].
pub(super) const STATE_FD: i32 = FIRST_FD;
pub(super) const SAVED_FD: i32 = FIRST_FD + 1;
/// Kernel or the memory that is restored.
pub(super) const MEMORY_FD: i32 = FIRST_FD + 2;
/// The initial file system or the state that is restored.
const OTHER_FD: i32 = FIRST_FD + 3;

/// Context identifier of the guest behind its vsock; the host side is a socket of its own.
const GUEST_CID: u32 = 3;

/// How long Firecracker may take to move a machine's state and memory.
pub(super) const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(60);

/// How often Firecracker's socket is looked for.
const SOCKET_POLL: Duration = Duration::from_millis(1);

/// A descriptor as Firecracker finds it in its jail.
pub(super) fn in_jail(fd: i32) -> String {
    format!("/fd/{fd}")
}

/// Who serves a machine's memory.
struct Pages {
    socket: PathBuf,
    server: OwnedFd,
}

fn new_delta(memory_bytes: u64) -> Result<DeltaFile, VmmError> {
    DeltaFile::create(memory_bytes).map_err(|source| VmmError::Delta {
        doing: "brought in",
        source,
    })
}

/// What is the same for all ways to start.
struct Ground {
    spec: MachineSpec,
    tap: Option<TapOrigin>,
    disk: Arc<DiskInJail>,
    /// Held open until Firecracker has opened its disk, whose device would go before.
    _disk_used: Option<File>,
    state: File,
}

impl FirecrackerVmm {
    /// Boots a machine that can become a template.
    pub(super) async fn start_cold(&self, spec: BootSpec) -> Result<FirecrackerMachine, VmmError> {
        let BootSpec { machine, memory } = spec;
        machine.check_memory(memory.bytes())?;
        let shared = memory.as_fd().try_clone_to_owned();
        let shared = shared
            .map_err(|source| own_file("cannot share the memory of", &machine.dir, source))?;
        let machine = self.set_up(machine, Origin::Booted(memory), shared).await?;
        let started = machine.resume().await;
        machine.or_end(started).await
    }

    /// Sets up a machine that boots, whose changes of a memory can be saved.
    pub(super) async fn start_private(
        &self,
        machine: MachineSpec,
        memory_bytes: u64,
    ) -> Result<FirecrackerMachine, VmmError> {
        machine.check_memory(memory_bytes)?;
        let all = new_delta(memory_bytes)?;
        let shared = all.share();
        let shared = shared
            .map_err(|source| own_file("cannot share the memory of", &machine.dir, source))?;
        self.set_up(machine, Origin::BootedPrivate(all), shared)
            .await
    }

    /// Sets up a machine to boot; `saved` is where it writes memory that is saved. The guest is
    /// started by the first [`Machine::resume`].
    async fn set_up(
        &self,
        machine: MachineSpec,
        origin: Origin,
        saved: OwnedFd,
    ) -> Result<FirecrackerMachine, VmmError> {
        let boot = machine.boot.clone();
        let (kernel, initramfs) = blocking(move || open_kernel(&boot)).await?;
        let ground = self.prepare(machine).await?;
        let fds = vec![saved, kernel, initramfs];
        let (ground, machine) = self.start(ground, origin, None, fds).await?;
        machine.set_unstarted();
        let configured = self.configure(&ground, &machine).await;
        machine.or_end(configured).await
    }

    async fn configure(
        &self,
        ground: &Ground,
        machine: &FirecrackerMachine,
    ) -> Result<(), VmmError> {
        let spec = &ground.spec;
        let doing = "setting up the machine";
        let config = MachineConfig {
            vcpu_count: spec.shape.vcpus.0,
            mem_size_mib: u64::from(spec.shape.memory.0),
            smt: false,
            track_dirty_pages: true,
        };
        machine.put(doing, "/machine-config", &config).await?;
        let source = BootSource {
            kernel_image_path: in_jail(MEMORY_FD),
            initrd_path: in_jail(OTHER_FD),
            boot_args: &spec.boot.cmdline,
        };
        machine
            .put("reading the kernel", "/boot-source", &source)
            .await?;
        let drive = Drive {
            drive_id: DRIVE_ID,
            path_on_host: &format!("/{DISK}"),
            is_root_device: false,
            is_read_only: false,
            // A running machine does not survive the host; a pause syncs the layer itself.
            cache_type: "Unsafe",
            rate_limiter: spec.disk_limits.into(),
        };
        let path = format!("/drives/{DRIVE_ID}");
        machine.put("opening the disk", &path, &drive).await?;
        if let Some(tap) = &ground.tap {
            let interface = NetworkInterface {
                iface_id: INTERFACE_ID,
                guest_mac: spec.mac.map(|byte| format!("{byte:02x}")).join(":"),
                host_dev_name: &tap.name,
            };
            let path = format!("/network-interfaces/{INTERFACE_ID}");
            machine.put("opening the tap", &path, &interface).await?;
            let mmds = MmdsConfig {
                version: "V2",
                network_interfaces: [INTERFACE_ID],
                ipv4_address: IDENTITY_ADDRESS,
            };
            machine.put(doing, "/mmds/config", &mmds).await?;
            tell_identity(machine, &spec.identity).await?;
        }
        machine.put(doing, "/entropy", &Entropy {}).await?;
        if self.config.devices.balloon {
            let balloon = Balloon {
                amount_mib: 0,
                deflate_on_oom: true,
                stats_polling_interval_s: 0,
            };
            machine.put(doing, "/balloon", &balloon).await?;
        }
        if self.config.devices.vsock {
            let vsock = Vsock {
                guest_cid: GUEST_CID,
                uds_path: &format!("/{RUN}/{VSOCK}"),
            };
            machine.put(doing, "/vsock", &vsock).await?;
        }
        Ok(())
    }

    /// Loads a saved machine on a private mapping of its memory. With a delta that memory is
    /// composed first: Firecracker changes memory while it loads a state (it gives the machine
    /// a new generation identifier), so the delta cannot be written over it afterwards, as the
    /// QEMU driver does before.
    pub(super) async fn start_saved(
        &self,
        spec: RestoreSpec,
        delta: Option<Delta>,
    ) -> Result<FirecrackerMachine, VmmError> {
        let RestoreSpec {
            machine,
            memory,
            state,
        } = spec;
        machine.check_memory(memory.bytes())?;
        let began = Instant::now();
        let (memory, delta) = blocking(move || {
            let made = match delta {
                None => DeltaFile::create(memory.bytes()).map(|delta| (memory, delta)),
                Some(mut delta) => compose(&memory, &mut *delta.pages)
                    .map(|(memory, delta)| (Arc::new(memory), delta)),
            };
            made.map_err(|source| VmmError::Delta {
                doing: "brought in",
                source,
            })
        })
        .await?;
        tracing::debug!(took = ?began.elapsed(), "memory prepared");
        let ground = self.prepare(machine).await?;
        let share = |shared: io::Result<OwnedFd>| {
            shared
                .map_err(|source| own_file("cannot share the memory of", &ground.spec.dir, source))
        };
        let fds = vec![
            share(delta.share())?,
            share(memory.share())?,
            copy_of("wrenn-state", &state).map_err(|source| unreadable(&state, source))?,
        ];
        let origin = Origin::Restored {
            delta,
            memory: Some(memory),
        };
        let backend = MemoryBackend {
            backend_type: "File",
            backend_path: in_jail(MEMORY_FD),
        };
        self.load(ground, origin, None, fds, backend, OTHER_FD, &state)
            .await
    }

    /// Loads a saved machine whose memory comes from a page server.
    pub(super) async fn start_served(
        &self,
        spec: ServedSpec,
    ) -> Result<FirecrackerMachine, VmmError> {
        let ServedSpec {
            machine,
            socket,
            server,
            state,
        } = spec;
        let delta = new_delta(machine.shape.memory.bytes())?;
        let ground = self.prepare(machine).await?;
        let shared = delta.share();
        let fds = vec![
            shared.map_err(|source| {
                own_file("cannot share the memory of", &ground.spec.dir, source)
            })?,
            copy_of("wrenn-state", &state).map_err(|source| unreadable(&state, source))?,
        ];
        let origin = Origin::Restored {
            delta,
            memory: None,
        };
        let backend = MemoryBackend {
            backend_type: "Uffd",
            backend_path: format!("/{PAGES_SOCKET}"),
        };
        self.load(
            ground,
            origin,
            Some(Pages { socket, server }),
            fds,
            backend,
            MEMORY_FD,
            &state,
        )
        .await
    }

    #[expect(clippy::too_many_arguments, reason = "two callers, in this file")]
    async fn load(
        &self,
        ground: Ground,
        origin: Origin,
        pages: Option<Pages>,
        fds: Vec<OwnedFd>,
        mem_backend: MemoryBackend,
        state_fd: i32,
        state: &File,
    ) -> Result<FirecrackerMachine, VmmError> {
        let (ground, machine) = self.start(ground, origin, pages, fds).await?;
        let loaded = async {
            let overrides = ground.tap.iter().map(|tap| NetworkOverride {
                iface_id: INTERFACE_ID,
                host_dev_name: &tap.name,
            });
            let load = LoadSnapshot {
                snapshot_path: in_jail(state_fd),
                mem_backend,
                track_dirty_pages: true,
                resume_vm: false,
                network_overrides: overrides.collect(),
            };
            let patience = SNAPSHOT_PATIENCE.max(self.patience());
            let began = Instant::now();
            let asked = machine.api().put("/snapshot/load", &load, patience).await;
            let why = match machine.explain("loading its state", asked).await {
                Ok(()) => None,
                Err(VmmError::Api {
                    source: ApiError::Refused { message, .. },
                    ..
                }) => Some(message),
                // It ends when it cannot load something, sometimes before its answer is out.
                Err(VmmError::Ended { reason, .. }) => Some(reason.to_string()),
                Err(error) => return Err(error),
            };
            if let Some(why) = why {
                return Err(VmmError::State {
                    doing: "loaded",
                    why: format!(
                        "{}: {why}; start cold from the disk instead, or make the template again here",
                        path_of(state)
                    ),
                });
            }
            tracing::debug!(took = ?began.elapsed(), "state loaded");
            check_shape(&machine, &ground.spec).await?;
            // Those of the machine that was saved are part of its state.
            machine.limit_disk(ground.spec.disk_limits).await?;
            if ground.tap.is_some() {
                // The metadata are not part of a state.
                tell_identity(&machine, &ground.spec.identity).await?;
            }
            Ok(())
        };
        let loaded = loaded.await;
        machine.or_end(loaded).await
    }

    /// Makes the jail, and puts the disk into it.
    async fn prepare(&self, mut spec: MachineSpec) -> Result<Ground, VmmError> {
        let cloning = self.config.cloning.clone();
        let (dir, user) = (spec.dir.clone(), (spec.uid, spec.gid));
        let chain = spec.disk.clone();
        let (disk, disk_used) = blocking(move || {
            make_jail(&dir, user)?;
            DiskInJail::prepare(&cloning, &chain, &dir, user)
        })
        .await?;
        let tap = match spec.tap.take() {
            None => None,
            Some(tap) => {
                let found = give_tap(&tap, spec.uid).and_then(|()| tap_origin(&tap));
                let tap = found.map_err(|source| {
                    own_file(
                        "cannot find the network of the machine in",
                        &spec.dir,
                        source,
                    )
                })?;
                if !tap.stays {
                    return Err(VmmError::Spec(format!(
                        "its tap {} goes when its descriptor is closed, and Firecracker opens it by name after that: set TUNSETPERSIST",
                        tap.name
                    )));
                }
                Some(tap)
            }
        };
        let state = new_memfd("wrenn-state")
            .map_err(|source| own_file("cannot hold the state of", &spec.dir, source))?;
        Ok(Ground {
            spec,
            tap,
            disk: Arc::new(disk),
            _disk_used: disk_used,
            state,
        })
    }

    /// Starts Firecracker under a keeper, records it and waits until it answers. `fds` are its
    /// descriptors from [`SAVED_FD`] on.
    async fn start(
        &self,
        mut ground: Ground,
        origin: Origin,
        pages: Option<Pages>,
        mut fds: Vec<OwnedFd>,
    ) -> Result<(Ground, FirecrackerMachine), VmmError> {
        let began = Instant::now();
        let dir = ground.spec.dir.clone();
        let shared = |source| own_file("cannot share the files of", &dir, source);
        fds.insert(0, ground.state.try_clone().map_err(shared)?.into());
        let network = match &ground.tap {
            Some(tap) => Some(tap.namespace.try_clone().map_err(shared)?),
            None => None,
        };
        let (socket, server) = pages.map(|pages| (pages.socket, pages.server)).unzip();
        let start = keeper::Start {
            monitor: Monitor::Firecracker,
            program: format!("/{PROGRAM}").into(),
            args: vec![
                "--api-sock".into(),
                format!("/{RUN}/{API_SOCKET}").into(),
                // Its log would come between what the guest prints.
                "--log-path".into(),
                in_jail(2).into(),
                "--level".into(),
                "Error".into(),
            ],
            uid: ground.spec.uid,
            gid: ground.spec.gid,
            console: Console::Stdout,
            jail: self.jail(&dir, ground.disk.node(), socket, network.is_some()),
            network,
            guard: server,
            fds,
            companions: std::mem::take(&mut ground.spec.companions),
        };
        let patience = self.info.deadline(keeper::PATIENCE);
        let pids = start.run(&self.config.launcher, &dir, patience).await?;
        let process = Supervised::started(dir.clone(), pids).await?;
        let api = Api::new(dir.join(JAIL).join(RUN), API_SOCKET);
        let version = await_api(&api, &process, self.patience()).await?;
        if version != self.config.version {
            return Err(VmmError::UnusableMonitor {
                path: self.config.program.clone(),
                why: format!(
                    "it had version {} and has {version} now; restart the agent",
                    self.config.version
                ),
            });
        }
        tracing::debug!(answers = ?began.elapsed(), "Firecracker answers");
        let state = ground.state.try_clone().map_err(shared)?;
        let machine = FirecrackerMachine::new(
            api,
            process,
            origin,
            state,
            ground.disk.clone(),
            self.config.cloning.clone(),
            self.patience(),
        );
        Ok((ground, machine))
    }

    fn jail(
        &self,
        dir: &Path,
        disk: Option<PathBuf>,
        pages: Option<PathBuf>,
        network: bool,
    ) -> Jail {
        let mut binds = vec![Bind {
            from: self.config.program.clone(),
            to: PROGRAM.into(),
            executable: true,
        }];
        binds.extend(self.config.libraries.iter().map(|folder| Bind {
            from: folder.clone(),
            to: folder.strip_prefix("/").unwrap_or(folder).into(),
            executable: true,
        }));
        let mut devices: Vec<PathBuf> = vec!["/dev/kvm".into(), "/dev/urandom".into()];
        devices.extend(disk);
        if network {
            devices.push("/dev/net/tun".into());
        }
        if let Some(socket) = pages {
            binds.push(Bind {
                from: socket,
                to: PAGES_SOCKET.into(),
                executable: false,
            });
            let device = Path::new("/dev/userfaultfd");
            if device.exists() {
                devices.push(device.into());
            }
        }
        Jail {
            root: dir.join(JAIL),
            binds,
            devices,
            network,
        }
    }
}

/// Waits for Firecracker's first answer, which tells its version.
async fn await_api(
    api: &Api,
    process: &Supervised,
    patience: Duration,
) -> Result<String, VmmError> {
    let began = Instant::now();
    loop {
        let source = match api.get::<InstanceInfo>("/", patience).await {
            Ok(info) if info.state == InstanceState::NotStarted => return Ok(info.vmm_version),
            Ok(info) => ApiError::Malformed(format!("a new machine is {:?}", info.state)),
            Err(source) => source,
        };
        let dead = || process.ended_within(Duration::ZERO);
        if let Some(reason) = dead().await {
            return Err(VmmError::Ended {
                doing: "starting",
                reason,
            });
        }
        if !matches!(source, ApiError::Connect { .. }) || began.elapsed() >= patience {
            // What it died of says more than a connection that broke.
            if matches!(source, ApiError::Closed(_) | ApiError::Connect { .. })
                && process.shoot().is_ok()
                && let Some(reason) = process.ended_within(DEATH_PATIENCE).await
            {
                return Err(VmmError::Ended {
                    doing: "starting",
                    reason,
                });
            }
            return Err(VmmError::Api {
                doing: "its first request",
                source,
            });
        }
        tokio::time::sleep(SOCKET_POLL).await;
    }
}

/// A shape is fixed with the state: a machine that came out otherwise must not run.
async fn check_shape(machine: &FirecrackerMachine, spec: &MachineSpec) -> Result<(), VmmError> {
    let config: MachineConfig = machine.get("telling its shape", "/machine-config").await?;
    let (vcpus, memory) = (spec.shape.vcpus.0, u64::from(spec.shape.memory.0));
    if (config.vcpu_count, config.mem_size_mib) == (vcpus, memory) {
        return Ok(());
    }
    Err(VmmError::Spec(format!(
        "its state is of {} processors and {} MiB, and {vcpus} processors and {memory} MiB are asked for",
        config.vcpu_count, config.mem_size_mib
    )))
}

/// Gives the guest what QEMU's guests read from `fw_cfg`.
async fn tell_identity(
    machine: &FirecrackerMachine,
    page: &[u8; IDENTITY_BYTES],
) -> Result<(), VmmError> {
    let text = page.split(|byte| *byte == 0).next().unwrap_or_default();
    let document: Value = match text {
        [] => Value::Object(serde_json::Map::new()),
        text => serde_json::from_slice(text).map_err(|error| {
            VmmError::Spec(format!(
                "its identity is not JSON, which Firecracker's metadata service takes: {error}"
            ))
        })?,
    };
    machine
        .put("taking the machine's identity", "/mmds", &document)
        .await
}
