//! The few system calls without a safe wrapper: a new network namespace, and the tap ioctls.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::if_tun::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use linux_raw_sys::ioctl::{TUNSETIFF, TUNSETPERSIST};
use rustix::ioctl::{IntegerSetter, Updater, ioctl};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves the calling thread into a network namespace of its own, new and empty.
pub(crate) fn new_net_namespace() -> io::Result<()> {
    // SAFETY: unshare is unsafe because of CLONE_FILES, which would give this thread another
    // descriptor table than the rest of the process has. Only NEWNET is asked for.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// `struct ifreq` of `linux/if.h` as TUNSETIFF uses it: the name and, of the union, the flags.
#[repr(C)]
struct TapRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<TapRequest>() == 40, "struct ifreq has 40 bytes");

/// Opens the tap `name` of the calling thread's network namespace, made if it is not there yet.
/// A tap has one queue: while another descriptor of it is open this fails with EBUSY.
pub(crate) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let mut request = TapRequest {
        name: [0; 16],
        flags: (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as u16,
        rest: [0; 22],
    };
    let bytes = name.as_bytes();
    // The last byte stays NUL.
    if bytes.len() >= request.name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    request.name[..bytes.len()].copy_from_slice(bytes);
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: TUNSETIFF reads a `struct ifreq` from the pointer and writes one back to it;
    // `TapRequest` has its layout and size (asserted above) and lives until the call returns.
    unsafe {
        ioctl(
            &tap,
            Updater::<{ TUNSETIFF as _ }, TapRequest>::new(&mut request),
        )
    }?;
    Ok(tap.into())
}

/// Makes a tap outlive its descriptors.
pub(crate) fn keep_tap(tap: &OwnedFd) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes a number and no pointer, which is what this pattern passes.
    unsafe { ioctl(tap, IntegerSetter::<{ TUNSETPERSIST as _ }>::new_usize(1)) }?;
    Ok(())
}

/// Bytes from the kernel's random number generator.
pub(crate) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // Small requests are never cut short (getrandom(2)).
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}
