//! A tap for the tests' guests. The library opens taps of slots only, and is what is tested.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;

use linux_raw_sys::if_tun::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use linux_raw_sys::ioctl::TUNSETIFF;
use rustix::ioctl::{Updater, ioctl};

/// Makes a tap in the calling thread's namespace that lives as long as its descriptor.
pub fn open(name: &str) -> OwnedFd {
    let mut ifreq = [0_u8; 40];
    ifreq[..name.len()].copy_from_slice(name.as_bytes());
    ifreq[16..18].copy_from_slice(&((IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as u16).to_ne_bytes());
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, 40 bytes, which the array has.
    unsafe {
        ioctl(
            &tap,
            Updater::<{ TUNSETIFF as _ }, [u8; 40]>::new(&mut ifreq),
        )
    }
    .unwrap();
    tap.into()
}
