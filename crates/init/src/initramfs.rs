//! First role: from the kernel's hand to the real root.
//!
//! Debian's cloud kernel has ext4 inside and virtio outside, so the modules come first.

use crate::console::{self, log};
use crate::modules;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Block device with the root file system: the first virtio disk.
const ROOT_DEVICE: &str = "/dev/vda";
/// Where the root is mounted before it becomes `/`.
const NEW_ROOT: &str = "/newroot";
/// The program that goes on as PID 1 in the root.
const ROOT_INIT: &str = "/sbin/wrenn-init";
/// How long the disk may take to appear after its driver was loaded. Under emulation a
/// probe takes tens of milliseconds.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// A step that failed, in words.
pub type Failure = String;

/// Runs the role; returns only on failure.
pub fn run() -> Failure {
    match prepare() {
        Ok(()) => {
            let error = Command::new(ROOT_INIT).exec();
            format!("cannot run {ROOT_INIT}: {error}")
        }
        Err(failure) => failure,
    }
}

fn prepare() -> Result<(), Failure> {
    let strict = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    for (kind, target, flags) in [
        ("devtmpfs", "/dev", MountFlags::NOSUID),
        ("proc", "/proc", strict),
        ("sysfs", "/sys", strict),
    ] {
        make_directory(target)?;
        match rustix::mount::mount(kind, target, kind, flags, None) {
            // The kernel may have mounted devtmpfs by itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(format!("cannot mount {kind} on {target}: {error}")),
        }
    }
    console::attach();
    load_modules()?;
    wait_for_device()?;
    make_directory(NEW_ROOT)?;
    rustix::mount::mount(ROOT_DEVICE, NEW_ROOT, "ext4", MountFlags::NOATIME, None)
        .map_err(|error| format!("cannot mount {ROOT_DEVICE} as ext4: {error}"))?;
    free_initramfs();
    switch_root()
}

fn make_directory(path: &str) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(format!("cannot make {path}: {error}")),
    }
}

fn load_modules() -> Result<(), Failure> {
    let list = std::fs::read_to_string(modules::LIST)
        .map_err(|error| format!("cannot read {}: {error}", modules::LIST))?;
    for module in modules::parse(&list) {
        let path = format!("/mods/{}", module.file);
        let loaded = rustix::fs::open(
            path.as_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|file| rustix::system::finit_module(file, &CString::default(), 0));
        match loaded {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(_) if module.optional => {}
            Err(error) => return Err(format!("cannot load the module {path}: {error}")),
        }
    }
    Ok(())
}

fn wait_for_device() -> Result<(), Failure> {
    let start = Instant::now();
    while !Path::new(ROOT_DEVICE).exists() {
        if start.elapsed() > DEVICE_PATIENCE {
            return Err(format!(
                "no disk: {ROOT_DEVICE} did not appear within {} s; was the machine started with a virtio disk?",
                DEVICE_PATIENCE.as_secs()
            ));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The initramfs lives in memory that every clone would carry: its files go before the root
/// covers them. Our own file stays alive until the exec.
fn free_initramfs() {
    let files = std::fs::read_dir("/mods")
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_else(|_| Vec::new());
    for path in files
        .iter()
        .map(|path| path.as_path())
        .chain([Path::new("/init")])
    {
        if let Err(error) = std::fs::remove_file(path) {
            log(format_args!("cannot free {}: {error}", path.display()));
        }
    }
}

fn switch_root() -> Result<(), Failure> {
    for name in ["dev", "proc", "sys"] {
        rustix::mount::mount_move(format!("/{name}"), format!("{NEW_ROOT}/{name}"))
            .map_err(|error| format!("cannot move /{name} into the root: {error}"))?;
    }
    rustix::process::chdir(NEW_ROOT)
        .map_err(|error| format!("cannot enter {NEW_ROOT}: {error}"))?;
    rustix::mount::mount_move(".", "/")
        .map_err(|error| format!("cannot move the root to /: {error}"))?;
    rustix::process::chroot(".")
        .map_err(|error| format!("cannot chroot into the root: {error}"))?;
    rustix::process::chdir("/").map_err(|error| format!("cannot enter the new /: {error}"))
}
