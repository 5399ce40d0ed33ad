//! The simplest page server: answers each fault with the page of a memory.
#![allow(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;
use wrenn_vmm::SealedMemory;

const PAGE: u64 = 4096;

/// A part of the guest's memory, as Firecracker tells it.
#[derive(Debug, Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

/// A page server for one machine; ends with it.
pub struct PageServer {
    thread: JoinHandle<()>,
    served: Arc<AtomicU64>,
}

impl PageServer {
    /// Listens on a socket at `path`, to which all may connect.
    pub fn start(path: &Path, memory: Arc<SealedMemory>) -> PageServer {
        let listener = UnixListener::bind(path).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let served = Arc::new(AtomicU64::new(0));
        let count = served.clone();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (regions, uffd) = handshake(&stream);
            assert!(regions.iter().all(|region| region.page_size == PAGE));
            while let Some(address) = next_fault(&stream, &uffd) {
                let region = regions
                    .iter()
                    .find(|region| {
                        (region.base_host_virt_addr..region.base_host_virt_addr + region.size)
                            .contains(&address)
                    })
                    .unwrap();
                let at = address - region.base_host_virt_addr + region.offset;
                let mut page = [0; PAGE as usize];
                memory.read_at(at, &mut page).unwrap();
                if copy(&uffd, address, &page) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        PageServer { thread, served }
    }

    /// Pages served so far.
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Waits until it has ended.
    pub fn ended(self) {
        self.thread.join().unwrap();
    }
}

/// What Firecracker sends first.
fn handshake(stream: &impl AsFd) -> (Vec<Region>, OwnedFd) {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let uffd = control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .unwrap();
    let regions = serde_json::from_slice(&bytes[..received.bytes]).unwrap();
    (regions, uffd)
}

/// The page of the next fault; `None` once Firecracker has gone.
fn next_fault(stream: &impl AsFd, uffd: &OwnedFd) -> Option<u64> {
    /// `UFFD_EVENT_PAGEFAULT` of `linux/userfaultfd.h`; its message has 32 bytes, of which
    /// those from 16 on are the address.
    const PAGE_FAULT: u8 = 0x12;
    loop {
        let mut polled = [
            PollFd::new(uffd, PollFlags::IN),
            PollFd::new(stream, PollFlags::IN),
        ];
        poll(&mut polled, None).unwrap();
        if !polled[1].revents().is_empty() {
            return None;
        }
        let mut message = [0; 32];
        match rustix::io::read(uffd, &mut message) {
            Ok(32) if message[0] == PAGE_FAULT => {
                let address = u64::from_le_bytes(message[16..24].try_into().unwrap());
                return Some(address & !(PAGE - 1));
            }
            Ok(_) => panic!("{message:?} is no fault"),
            Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Brings a page in; `false` if it is there already.
fn copy(uffd: &OwnedFd, address: u64, page: &[u8; PAGE as usize]) -> bool {
    /// `_IOWR(0xAA, 3, struct uffdio_copy)`.
    const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
    // `struct uffdio_copy`: destination, source, length, mode, and what was copied.
    let mut request = [address, page.as_ptr() as u64, PAGE, 0, 0];
    // SAFETY: the kernel reads the page, which is borrowed for the call, and writes the last
    // field of the request. The destination is in another process.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, request.as_mut_ptr()) };
    match done {
        0 => true,
        _ => {
            let error = io::Error::last_os_error();
            // The second of two processors that asked, or a machine that has just ended.
            let known = [Some(libc::EEXIST), Some(libc::ESRCH)];
            assert!(known.contains(&error.raw_os_error()), "{error}");
            false
        }
    }
}
