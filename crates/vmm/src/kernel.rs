//! The few calls of this crate that the compiler cannot check.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, getpid, pidfd_open, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Closes every descriptor but the standard three. For a process that has just started and
/// owns no other.
pub(crate) fn close_inherited() -> io::Result<()> {
    // SAFETY: close_range(2) touches no memory. That no live object owns one of these
    // descriptors is the caller's duty: the only caller is the first statement of
    // `keeper::main`, which documents it.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the child of `command` die by SIGKILL when the thread that spawns it ends.
pub(crate) fn die_with_parent(command: &mut Command) -> io::Result<()> {
    // Its number would not tell: in a process namespace of its own the child sees no parent.
    let parent = pidfd_open(getpid(), PidfdFlags::empty())?;
    let hook = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above.
        let mut watched = [PollFd::new(&parent, PollFlags::IN)];
        if poll(&mut watched, Some(&Timespec::default()))? > 0 {
            return Err(io::Error::from(io::ErrorKind::BrokenPipe));
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; the hook makes
    // two system calls and neither allocates nor locks.
    unsafe { command.pre_exec(hook) };
    Ok(())
}

/// Runs `hook` in the child of `command` before the program; an error there fails the spawn.
/// Only for a process that has one thread: the child is a copy in which no lock is held by a
/// thread that is not there.
pub(crate) fn before_program(
    command: &mut Command,
    hook: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: what is forbidden between fork and exec, allocation above all, is so because
    // another thread of the parent may have held a lock. The only caller is the keeper, whose
    // second thread starts after its monitor.
    unsafe { command.pre_exec(hook) };
}

/// Gives the calling process, which has one thread, namespaces of its own.
pub(crate) fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    debug_assert!(!namespaces.contains(UnshareFlags::FILES));
    // SAFETY: unshare is unsafe because of CLONE_FILES, which would give this thread another
    // descriptor table than the rest of the process has. Callers ask for namespaces only.
    unsafe { unshare_unsafe(namespaces) }?;
    Ok(())
}

/// Lets this user open a tap by its name, and nobody else without rights over its network.
pub(crate) fn give_tap(tap: &OwnedFd, uid: u32) -> io::Result<()> {
    /// `_IOW('T', 204, int)`.
    const TUNSETOWNER: libc::c_ulong = 0x4004_54CC;
    // SAFETY: the request takes a number, not a pointer.
    let given = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOWNER, libc::c_ulong::from(uid)) };
    match given {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where a tap comes from.
pub(crate) struct TapOrigin {
    pub(crate) name: String,
    /// Its network namespace.
    pub(crate) namespace: OwnedFd,
    /// Whether it outlives its descriptors.
    pub(crate) stays: bool,
}

/// Asks a tap where it comes from.
pub(crate) fn tap_origin(tap: &OwnedFd) -> io::Result<TapOrigin> {
    use std::os::fd::FromRawFd;
    const IFF_PERSIST: u16 = 0x0800;
    /// `_IOR('T', 210, unsigned int)`, though the kernel writes a `struct ifreq`.
    const TUNGETIFF: libc::c_ulong = 0x8004_54D2;
    const SIOCGSKNS: libc::c_ulong = 0x894C;
    /// `struct ifreq`: 16 bytes of name, 24 of union.
    const IFREQ: usize = 40;
    let mut request = [0u8; IFREQ];
    // SAFETY: the kernel writes one `struct ifreq`, which is as long as `request`.
    let told = unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, request.as_mut_ptr()) };
    if told < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes no argument.
    let namespace = unsafe { libc::ioctl(tap.as_raw_fd(), SIOCGSKNS) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGSKNS returned a new descriptor that nothing else owns.
    let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
    let name = request[..16].split(|byte| *byte == 0).next();
    let name = String::from_utf8(name.unwrap_or_default().to_vec()).map_err(io::Error::other)?;
    Ok(TapOrigin {
        name,
        namespace,
        stays: u16::from_le_bytes([request[16], request[17]]) & IFF_PERSIST != 0,
    })
}

/// Length of `struct loop_config`, linux/loop.h.
pub(crate) const LOOP_CONFIG: usize = 304;

/// The number of a loop device that nobody uses.
pub(crate) fn free_loop(control: &impl AsFd) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
    // SAFETY: the request takes no argument.
    let number = unsafe { libc::ioctl(control.as_fd().as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Gives a loop device its file and flags (Linux 5.8).
pub(crate) fn configure_loop(device: &impl AsFd, config: &[u8; LOOP_CONFIG]) -> io::Result<()> {
    const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
    // SAFETY: the kernel reads one `struct loop_config`, which is as long as `config`.
    let done = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Length of `struct dm_ioctl`, linux/dm-ioctl.h.
pub(crate) const DM_IOCTL: usize = 312;

/// Asks the device mapper for something. `request` begins with a `struct dm_ioctl` in which is
/// told how long all of it is; the answer takes its place.
pub(crate) fn device_mapper(
    control: &impl AsFd,
    command: u8,
    request: &mut [u8],
) -> io::Result<()> {
    /// Where `data_size` is.
    const DATA_SIZE: usize = 12;
    let told = request.get(DATA_SIZE..DATA_SIZE + 4);
    let told = told.and_then(|told| Some(u32::from_le_bytes(told.try_into().ok()?)));
    if request.len() < DM_IOCTL || told != u32::try_from(request.len()).ok() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    /// `_IOWR(0xfd, 0, struct dm_ioctl)`.
    const COMMANDS: libc::c_ulong = (3 << 30) | ((DM_IOCTL as libc::c_ulong) << 16) | (0xFD << 8);
    // SAFETY: the kernel reads and writes at most `data_size` bytes, which was just found to be
    // the length of `request`.
    let done = unsafe {
        libc::ioctl(
            control.as_fd().as_raw_fd(),
            COMMANDS | libc::c_ulong::from(command),
            request.as_mut_ptr(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The processor's time stamp counter.
pub(crate) fn time_stamp_counter() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// What KVM said when it was asked to make a machine with one processor.
pub(crate) fn kvm_create_machine(kvm: &OwnedFd) -> io::Result<()> {
    use std::os::fd::FromRawFd;
    const KVM_GET_API_VERSION: libc::c_ulong = 0xAE00;
    const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
    const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;
    let call = |fd: libc::c_int, request| {
        // SAFETY: these three requests take an integer, not a pointer.
        match unsafe { libc::ioctl(fd, request, 0) } {
            -1 => Err(io::Error::last_os_error()),
            value => Ok(value),
        }
    };
    let version = call(kvm.as_raw_fd(), KVM_GET_API_VERSION)?;
    if version != 12 {
        return Err(io::Error::other(format!(
            "its interface has version {version}, not 12"
        )));
    }
    let machine = call(kvm.as_raw_fd(), KVM_CREATE_VM)?;
    // SAFETY: KVM_CREATE_VM returned a new descriptor that nothing else owns.
    let machine = unsafe { OwnedFd::from_raw_fd(machine) };
    let processor = call(machine.as_raw_fd(), KVM_CREATE_VCPU)?;
    // SAFETY: KVM_CREATE_VCPU returned a new descriptor that nothing else owns.
    drop(unsafe { OwnedFd::from_raw_fd(processor) });
    Ok(())
}

/// Whether userfaultfd(2) is there, for the kernel's accesses too.
pub(crate) fn userfaultfd() -> io::Result<()> {
    // SAFETY: the call only makes a descriptor, which is dropped; no range is registered.
    unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC) }?;
    Ok(())
}

/// `_IOWR('f', 16, struct pm_scan_arg)`, whose size is 96 bytes.
const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;

/// Whether the kernel knows the `PAGEMAP_SCAN` request (Linux 6.7): an argument of no
/// length is `EINVAL` there and an unknown request `ENOTTY` before.
pub(crate) fn knows_pagemap_scan(pagemap: &impl AsFd) -> bool {
    let mut argument = [0u64; 12];
    // SAFETY: the kernel reads and writes at most the 96 bytes of `argument`.
    let result = unsafe {
        libc::ioctl(
            pagemap.as_fd().as_raw_fd(),
            PAGEMAP_SCAN,
            argument.as_mut_ptr(),
        )
    };
    result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// Consecutive addresses whose pages are alike; `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PagemapRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    categories: u64,
}

/// Finds pages in a private file mapping that are present or swapped out and no longer the
/// file's, and tells how many regions of them it found and up to which address it looked:
/// less than the whole when `regions` is full.
pub(crate) fn scan_written(
    pagemap: &impl AsFd,
    addresses: Range<u64>,
    regions: &mut [PagemapRegion],
) -> io::Result<(usize, u64)> {
    const FILE: u64 = 1 << 2;
    const PRESENT: u64 = 1 << 3;
    const SWAPPED: u64 = 1 << 4;
    /// Index of `walk_end`.
    const WALK_END: usize = 4;
    // `struct pm_scan_arg`: size, flags, start, end, walk_end, vec, vec_len, max_pages,
    // category_inverted, category_mask, category_anyof_mask, return_mask.
    let mut argument: [u64; 12] = [
        96,
        0,
        addresses.start,
        addresses.end,
        0,
        regions.as_mut_ptr() as u64,
        regions.len() as u64,
        0,
        FILE,
        FILE,
        PRESENT | SWAPPED,
        PRESENT | SWAPPED,
    ];
    // SAFETY: the kernel reads and writes the 96 bytes of `argument`, and writes at most
    // `regions.len()` regions, of the layout it documents, to `regions`, which is borrowed
    // for the call.
    let found = unsafe {
        libc::ioctl(
            pagemap.as_fd().as_raw_fd(),
            PAGEMAP_SCAN,
            argument.as_mut_ptr(),
        )
    };
    let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
    // What the kernel says of where it ended cannot be relied on: it collects 512 regions at a
    // time, and after several times and a last one without a full buffer it names the place where
    // the last began (seen with 6.18). As long as there was room, it has seen all.
    let walked = match regions.get(..found).and_then(<[_]>::last) {
        Some(last) if found == regions.len() => last.end.max(argument[WALK_END]),
        _ => addresses.end,
    };
    Ok((found.min(regions.len()), walked))
}

/// Maps a file privately, for good.
#[cfg(test)]
pub(crate) fn map_privately(file: &OwnedFd, bytes: usize) -> io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; nobody gets a pointer.
    unsafe {
        mmap(
            std::ptr::null_mut(),
            bytes,
            access,
            MapFlags::PRIVATE,
            file,
            0,
        )
    }?;
    Ok(())
}

/// A descriptor whose readability can be awaited.
pub(crate) fn await_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open for as long as it lives, and neither of the callers
    // (a pidfd, a channel) replaces what it refers to.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}
