//! A tap in a namespace of its own, for a machine with a network card.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Opens a new tap. Its namespace lives as long as the descriptor.
pub fn open(name: &str) -> OwnedFd {
    let name = name.to_owned();
    let opening = std::thread::spawn(move || {
        // SAFETY: changes the namespace of this thread only, which ends right after.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        attach(&name)
    });
    opening.join().unwrap()
}

/// Opens a tap in the namespace of the calling thread, a new one if there is none.
pub fn attach(name: &str) -> OwnedFd {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // `struct ifreq`: 16 bytes of name, the flags, padding to 40 bytes.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    request[16..18].copy_from_slice(&flags.to_le_bytes());
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, which `request` holds.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    OwnedFd::from(tap)
}
