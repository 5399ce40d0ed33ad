//! From a specification to a running QEMU that is recorded and answers.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::fs::OFlags;
use tokio::net::{UnixListener, UnixStream};

use super::QemuVmm;
use super::args::{Descriptors, Format, Image, Plan, Start};
use super::jail;
use super::machine::{QemuMachine, TopLayer};
use crate::keeper::{self, Console};
use crate::machine::{DiskChain, MachineSpec};
use crate::memfd::{copy_of_path, sealed_memfd};
use crate::record::Monitor;
use crate::{MemoryFile, SealedMemory, VmmError};

/// What kernels are called among QEMU's descriptors.
const BOOT: &str = "wrenn-boot";

/// The control socket in the machine's folder.
const CONTROL: &str = "qmp.sock";

/// What a kernel is loaded from.
pub(super) struct Kernel {
    pub(super) image: OwnedFd,
    pub(super) initramfs: Option<OwnedFd>,
}

impl QemuVmm {
    /// Boots a machine in memory that becomes a template's.
    pub(super) async fn start_cold(
        &self,
        spec: MachineSpec,
        memory: &MemoryFile,
    ) -> Result<QemuMachine, VmmError> {
        spec.check_memory(memory.bytes())?;
        let memory = memory.as_fd().try_clone_to_owned();
        self.start_boot(spec, Start::Cold, memory).await
    }

    /// Prepares the boot of a machine over memory that it does not change.
    pub(super) async fn start_private(
        &self,
        spec: MachineSpec,
        memory: &SealedMemory,
    ) -> Result<QemuMachine, VmmError> {
        spec.check_memory(memory.bytes())?;
        let memory = memory.share();
        self.start_boot(spec, Start::Private, memory).await
    }

    async fn start_boot(
        &self,
        spec: MachineSpec,
        start: Start,
        memory: io::Result<OwnedFd>,
    ) -> Result<QemuMachine, VmmError> {
        let memory =
            memory.map_err(|source| own_file("cannot share the memory of", &spec.dir, source))?;
        let boot = spec.boot.clone();
        let kernel = tokio::task::spawn_blocking(move || -> Result<Kernel, VmmError> {
            Ok(Kernel {
                image: copy_of_path(BOOT, &boot.kernel)?,
                initramfs: Some(copy_of_path(BOOT, &boot.initramfs)?),
            })
        })
        .await
        .map_err(|error| VmmError::Spec(format!("the kernel was not read: {error}")))??;
        self.start(spec, start, memory, kernel).await
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
            disk_limits,
            tap,
            mac,
            identity,
            companions,
        } = spec;
        let began = Instant::now();
        let listener = listen(&dir)?;
        let jail = jail::make(&dir, &self.info.path, self.info.accelerator)
            .map_err(|source| own_file("cannot make the jail in", &dir, source))?;
        let mut fds = Descriptors::default();
        let (images, top) = open_disk(&disk, &mut fds)?;
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
        let start = keeper::Start {
            monitor: Monitor::Qemu,
            program: self.info.path.clone(),
            args: plan.args(),
            uid,
            gid,
            console: Console::Descriptor,
            jail,
            network: None,
            guard: None,
            fds: fds.into_fds(),
            companions,
        };
        let patience = self.info.deadline(keeper::PATIENCE);
        let pids = start.run(&self.launcher, &dir, patience).await?;
        let started = began.elapsed();
        // QEMU's copy must be the last one, or its end would not close our connection.
        drop(listener);
        let machine = QemuMachine::connect(dir, pids, top, self.patience()).await?;
        tracing::debug!(?started, connected = ?began.elapsed(), "QEMU answers");
        if !disk_limits.is_none() {
            machine.limit_disk(disk_limits).await?;
        }
        Ok(machine)
    }
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

fn open_disk(disk: &DiskChain, fds: &mut Descriptors) -> Result<(Vec<Image>, TopLayer), VmmError> {
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
            fd: fds.add(open(&layer.path, false)?),
            format: Format::Qcow2,
            spare: None,
        });
    }
    let fd = fds.add(open(&disk.top, true)?);
    let top = TopLayer {
        level: images.len(),
        // A descriptor's number.
        set: fd.0.unsigned_abs().into(),
    };
    images.push(Image {
        fd,
        format: Format::Qcow2,
        spare: Some(fds.add(open(&disk.top, false)?)),
    });
    Ok((images, top))
}
