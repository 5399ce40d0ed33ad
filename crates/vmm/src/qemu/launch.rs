//! From a specification to a running QEMU that is recorded and answers.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use tokio::net::{UnixListener, UnixStream};

use super::QemuVmm;
use super::args::{Descriptors, Format, Image, Plan, Start};
use super::machine::QemuMachine;
use super::record::{CONSOLE, CONTROL, EXIT, Record};
use crate::keeper::{Channel, Commit, Launcher, Orders, Report};
use crate::machine::{DiskChain, MachinePids, MachineSpec};
use crate::process::boot_id;
use crate::{MemoryFile, VmmError};

/// How long a keeper may take to start QEMU, on the reference machine.
const KEEPER_PATIENCE: Duration = Duration::from_secs(15);

/// What a kernel is loaded from.
pub(super) struct Kernel {
    pub(super) image: OwnedFd,
    pub(super) initramfs: Option<OwnedFd>,
}

impl QemuVmm {
    /// Boots a machine.
    pub(super) async fn start_cold(
        &self,
        spec: MachineSpec,
        memory: &MemoryFile,
    ) -> Result<QemuMachine, VmmError> {
        check_memory(&spec, memory.bytes())?;
        let memory = memory
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| own_file("cannot share the memory of", &spec.dir, source))?;
        let boot = spec.boot.clone();
        let kernel = tokio::task::spawn_blocking(move || -> Result<Kernel, VmmError> {
            Ok(Kernel {
                image: copy_to_memfd(&boot.kernel)?,
                initramfs: Some(copy_to_memfd(&boot.initramfs)?),
            })
        })
        .await
        .map_err(|error| VmmError::Spec(format!("the kernel was not read: {error}")))??;
        self.start(spec, Start::Cold, memory, kernel).await
    }

    /// Starts QEMU under a keeper, records it and connects to it.
    pub(super) async fn start(
        &self,
        spec: MachineSpec,
        start: Start,
        memory: OwnedFd,
        kernel: Kernel,
    ) -> Result<QemuMachine, VmmError> {
        let MachineSpec {
            dir,
            uid,
            gid,
            shape,
            boot,
            disk,
            tap,
            mac,
            identity,
            companions,
        } = spec;
        let began = Instant::now();
        let listener = listen(&dir)?;
        let mut fds = Descriptors::default();
        let images = open_disk(&disk, &mut fds)?;
        let identity = sealed_memfd("wrenn-identity", &identity[..])
            .map_err(|source| own_file("cannot hold the identity of", &dir, source))?;
        let control = listener
            .as_fd()
            .try_clone_to_owned()
            .map_err(|source| own_file("cannot share the socket of", &dir, source))?;
        let plan = Plan {
            accelerator: self.info.accelerator,
            start,
            shape,
            memory: fds.add(memory),
            kernel: fds.add(kernel.image),
            initramfs: kernel.initramfs.map(|fd| fds.add(fd)),
            cmdline: &boot.cmdline,
            identity: fds.add(identity),
            control: fds.add(control),
            disk: &images,
            network: tap.map(|tap| (fds.add(tap), mac)),
        };
        let args = plan.args();
        let monitor = fds.into_fds();
        let orders = Orders {
            program: self.info.path.clone(),
            args,
            uid,
            gid,
            monitor_fds: monitor.len(),
            companion_fds: companions.len(),
        };
        let console = new_file(&dir, CONSOLE)?;
        let exit = new_file(&dir, EXIT)?;
        let mut passed = vec![OwnedFd::from(console), OwnedFd::from(exit)];
        passed.extend(monitor);
        passed.extend(companions);
        let channel = spawn_keeper(&self.launcher, &orders, passed)?;
        let patience = self.info.deadline(KEEPER_PATIENCE);
        let (pids, channel) = await_report(channel, patience).await?;
        let started = began.elapsed();
        let boot_id = boot_id().map_err(|source| VmmError::Probe {
            what: "its boot id",
            source,
        })?;
        Record::new(boot_id, pids).write(&dir)?;
        channel.send(&Commit, &[]).map_err(|error| {
            VmmError::Keeper(format!("it ended before the machine was recorded: {error}"))
        })?;
        // QEMU's copy must be the last one, or its end would not close our connection.
        drop(listener);
        let recorded = began.elapsed();
        let machine = QemuMachine::connect(dir, pids, self.patience()).await?;
        tracing::debug!(?started, ?recorded, connected = ?began.elapsed(), "QEMU answers");
        Ok(machine)
    }
}

pub(super) fn check_memory(spec: &MachineSpec, bytes: u64) -> Result<(), VmmError> {
    let asked = spec.shape.memory.bytes();
    if asked == bytes {
        return Ok(());
    }
    Err(VmmError::Spec(format!(
        "its shape has {asked} bytes of memory and its memory file {bytes}"
    )))
}

fn own_file(what: &'static str, dir: &Path, source: io::Error) -> VmmError {
    VmmError::File {
        what,
        path: dir.to_owned(),
        source,
    }
}

/// A socket in `dir` for one control connection at a time. Bound through the folder's
/// descriptor, since a socket's path may have no more than 107 bytes.
fn listen(dir: &Path) -> Result<UnixListener, VmmError> {
    let failed = |source| VmmError::File {
        what: "cannot listen on",
        path: dir.join(CONTROL),
        source,
    };
    match std::fs::remove_file(dir.join(CONTROL)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let (_held, path) = short_path(dir).map_err(failed)?;
    UnixListener::bind(path).map_err(failed)
}

/// A connection to the socket in `dir`.
pub(super) async fn connect(dir: &Path) -> io::Result<UnixStream> {
    let (_held, path) = short_path(dir)?;
    UnixStream::connect(path).await
}

fn short_path(dir: &Path) -> io::Result<(OwnedFd, String)> {
    let held = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let path = format!("/proc/self/fd/{}/{CONTROL}", held.as_raw_fd());
    Ok((held, path))
}

fn new_file(dir: &Path, name: &str) -> Result<File, VmmError> {
    let path = dir.join(name);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| VmmError::File {
            what: "cannot create",
            path,
            source,
        })
}

fn open_disk(disk: &DiskChain, fds: &mut Descriptors) -> Result<Vec<Image>, VmmError> {
    let open = |path: &Path, writable| {
        OpenOptions::new()
            .read(true)
            .write(writable)
            .open(path)
            .map_err(|source| VmmError::File {
                what: "cannot open the disk",
                path: path.to_owned(),
                source,
            })
    };
    let mut images = Vec::with_capacity(disk.layers.len() + 2);
    images.push(Image {
        fd: fds.add(open(&disk.base, false)?),
        format: Format::Raw,
        spare: None,
    });
    for layer in &disk.layers {
        images.push(Image {
            fd: fds.add(open(layer, false)?),
            format: Format::Qcow2,
            spare: None,
        });
    }
    images.push(Image {
        fd: fds.add(open(&disk.top, true)?),
        format: Format::Qcow2,
        spare: Some(fds.add(open(&disk.top, false)?)),
    });
    Ok(images)
}

/// A memfd with this content that nobody can change. QEMU opens it anew as a user that may
/// have no right to the original file.
pub(super) fn sealed_memfd(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = new_memfd(name)?;
    io::Write::write_all(&mut file, content)?;
    seal(file)
}

fn copy_to_memfd(path: &Path) -> Result<OwnedFd, VmmError> {
    let copy = || {
        let mut from = File::open(path)?;
        let mut file = new_memfd("wrenn-boot")?;
        io::copy(&mut from, &mut file)?;
        seal(file)
    };
    copy().map_err(|source| VmmError::File {
        what: "cannot read",
        path: path.to_owned(),
        source,
    })
}

pub(super) fn new_memfd(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(rustix::fs::memfd_create(name, flags)?))
}

fn seal(file: File) -> io::Result<OwnedFd> {
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(file.into())
}

/// Starts a keeper and gives it its orders. Without a hook between fork and exec, so that
/// the standard library may use vfork: the agent may be large.
fn spawn_keeper(
    launcher: &Launcher,
    orders: &Orders,
    fds: Vec<OwnedFd>,
) -> Result<Channel, VmmError> {
    let failed =
        |error: io::Error| VmmError::Keeper(format!("{}: {error}", launcher.program.display()));
    let (channel, theirs) = Channel::pair().map_err(failed)?;
    let mut child = tokio::process::Command::new(&launcher.program)
        .args(&launcher.args)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(false)
        .spawn()
        .map_err(failed)?;
    tokio::spawn(async move {
        // Only so that it does not stay a zombie: how the machine ended is in exit.json.
        if let Err(error) = child.wait().await {
            tracing::warn!(%error, "a keeper could not be waited for");
        }
    });
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    channel.send(orders, &borrowed).map_err(failed)?;
    Ok(channel)
}

/// Waits for the keeper's word and gives the channel back.
async fn await_report(
    channel: Channel,
    patience: Duration,
) -> Result<(MachinePids, Channel), VmmError> {
    let failed = |error: io::Error| VmmError::Keeper(error.to_string());
    let readable = crate::kernel::await_readable(channel.into_fd()).map_err(failed)?;
    match tokio::time::timeout(patience, readable.readable()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(failed(error)),
        Err(_) => {
            return Err(VmmError::Keeper(format!(
                "it gave no sign of life within {} s",
                patience.as_secs()
            )));
        }
    }
    let channel = Channel::from_fd(readable.into_inner());
    match channel.receive::<Report>().map_err(failed)? {
        Some((Report::Started { keeper, vmm }, _)) => Ok((MachinePids { keeper, vmm }, channel)),
        Some((Report::Failed(why), _)) => Err(VmmError::Keeper(why)),
        None => Err(VmmError::Keeper(
            "it ended before it started anything".into(),
        )),
    }
}
