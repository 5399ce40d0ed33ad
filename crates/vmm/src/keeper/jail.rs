//! The root, devices and namespaces of a monitor.
//!
//! ```text
//! /              the machine's `jail` folder: nothing may be run from it, and it has no devices
//! /…             the program, and what else is bound: read-only
//! /dev           a file system in memory with the devices asked for, owned by the machine's user
//! /fd/N          the monitor's own descriptors (its `/proc/self/fd`; there is no other `/proc`)
//! ```
//!
//! All mounts are in a namespace of the monitor's own and go with it: nothing is left to
//! unmount, however it ends.

use std::fmt::Display;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive,
    mount_change, mount_remount, unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::orders::{Bind, Jail};
use crate::kernel;

/// Names under which a jail always has something.
const DEVICES: &str = "dev";
const DESCRIPTORS: &str = "fd";

/// Locks the calling process in, which needs root; it gives its rights up afterwards. Leaves
/// descriptors as they are.
pub(super) fn enter(
    jail: &Jail,
    uid: u32,
    gid: u32,
    network: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    // What is made here is for another user, whatever the agent's habit is.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let mut namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    match network {
        Some(namespace) => {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| failed("enter", "the tap's network namespace", error.into()))?;
        }
        None => namespaces |= UnshareFlags::NEWNET,
    }
    kernel::unshare(namespaces).map_err(|error| failed("make", "namespaces", error))?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(|error| failed("detach", "the mounts", error.into()))?;
    let root = &jail.root;
    mount_bind(root, root).map_err(|error| failed("mount", root.display(), error.into()))?;
    restrict(root, MountFlags::NODEV | MountFlags::NOEXEC)?;
    for bind in &jail.binds {
        show(root, bind)?;
    }
    make_devices(root, &jail.devices, uid, gid)?;
    let descriptors = root.join(DESCRIPTORS);
    new_folder(&descriptors)?;
    // As of this very process, which the monitor will be.
    mount_bind("/proc/self/fd", &descriptors)
        .map_err(|error| failed("mount", descriptors.display(), error.into()))?;
    std::env::set_current_dir(root).map_err(|error| failed("enter", root.display(), error))?;
    // Puts the old root on top of the new one, from where it is taken away.
    rustix::process::pivot_root(".", ".")
        .map_err(|error| failed("take as root", root.display(), error.into()))?;
    unmount(".", UnmountFlags::DETACH)
        .map_err(|error| failed("unmount", "the host's root", error.into()))?;
    std::env::set_current_dir("/").map_err(|error| failed("enter", "the new root", error))
}

fn failed(doing: &str, what: impl Display, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {doing} {what}: {error}"))
}

fn new_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("make", path.display(), error))
        }
        _ => Ok(()),
    }
}

/// Takes rights away from a mount.
fn restrict(path: &Path, flags: MountFlags) -> io::Result<()> {
    mount_remount(path, MountFlags::BIND | MountFlags::NOSUID | flags, "")
        .map_err(|error| failed("restrict", path.display(), error.into()))
}

fn show(root: &Path, bind: &Bind) -> io::Result<()> {
    // Told by the agent, yet cheap to be sure of.
    if !bind
        .to
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        let wrong = io::Error::from(io::ErrorKind::InvalidInput);
        return Err(failed("show something as", bind.to.display(), wrong));
    }
    let to = root.join(&bind.to);
    let unreachable = |error| failed("show", bind.from.display(), error);
    if fs::metadata(&bind.from).map_err(unreachable)?.is_dir() {
        fs::create_dir_all(&to).map_err(|error| failed("make", to.display(), error))?;
    } else {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(|error| failed("make", parent.display(), error))?;
        }
        File::create(&to).map_err(|error| failed("make", to.display(), error))?;
    }
    mount_bind_recursive(&bind.from, &to).map_err(|error| unreachable(error.into()))?;
    let mut flags = MountFlags::RDONLY | MountFlags::NODEV;
    if !bind.executable {
        flags |= MountFlags::NOEXEC;
    }
    restrict(&to, flags)
}

fn make_devices(root: &Path, devices: &[PathBuf], uid: u32, gid: u32) -> io::Result<()> {
    let folder = root.join(DEVICES);
    new_folder(&folder)?;
    mount(
        "none",
        &folder,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        Some(c"mode=0755,size=64k"),
    )
    .map_err(|error| failed("mount", folder.display(), error.into()))?;
    for device in devices {
        make_device(root, device, uid, gid)
            .map_err(|error| failed("make the device", device.display(), error))?;
    }
    Ok(())
}

/// A device of the host, under the same path, for this user alone.
fn make_device(root: &Path, device: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let found = fs::metadata(device)?;
    let kind = match found.file_type().is_block_device() {
        true => FileType::BlockDevice,
        false => FileType::CharacterDevice,
    };
    let inside = root.join(device.strip_prefix("/").map_err(io::Error::other)?);
    if let Some(parent) = inside.parent() {
        fs::create_dir_all(parent)?;
    }
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, &inside, kind, mode, found.rdev())?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(
        CWD,
        &inside,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    Ok(())
}
