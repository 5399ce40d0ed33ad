//! userfaultfd, pidfd and one mapping: the few calls that the compiler cannot check.
//!
//! No call here can harm this process's memory: the kernel reads a slice that is borrowed for
//! the call, or writes to the argument of the call. What is written is another process's.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP, uffdio_copy, uffdio_range, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_COPY, UFFDIO_WAKE, UFFDIO_ZEROPAGE};
use rustix::fs::{OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use wrenn_snapshot::PAGE;

/// Bytes of a `struct uffd_msg`.
const MESSAGE: usize = 32;
/// Messages read at once.
const MESSAGES: usize = 64;

/// What a monitor's memory tells.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread waits for the page at this address.
    Missing(u64),
    /// This part of the memory is about to be emptied. The thread that does it goes on when
    /// this has been read.
    Removed { start: u64, end: u64 },
    /// Something that was never asked for.
    Other(&'static str),
}

/// What became of an attempt to fill some pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placed {
    /// So many bytes from the first on are in place, at least a page; who waited goes on.
    Bytes(usize),
    /// The first page is there already.
    Exists,
    /// Nothing was done: an event waits to be read, or the thread that caused the last one
    /// has not gone on yet.
    Busy,
    /// The range is not one mapping with missing pages.
    Unmapped,
    /// The process is gone.
    Gone,
}

/// Room for what one read gives.
pub(crate) struct Messages(Box<[u8; MESSAGE * MESSAGES]>);

impl Messages {
    pub(crate) fn new() -> Messages {
        Messages(Box::new([0; MESSAGE * MESSAGES]))
    }
}

/// The memory of another process, by the descriptor it gave away.
#[derive(Debug)]
pub(crate) struct Uffd(OwnedFd);

impl Uffd {
    /// Takes a descriptor that must be a userfaultfd; gives it back if it is none.
    pub(crate) fn new(fd: OwnedFd) -> Result<Uffd, (OwnedFd, io::Error)> {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let checked = std::fs::read_link(link).and_then(|target| {
            if target.as_os_str() != "anon_inode:[userfaultfd]" {
                let problem = format!("it is {}, not a userfaultfd", target.display());
                return Err(io::Error::other(problem));
            }
            // A blocking one cannot be polled.
            let flags = rustix::fs::fcntl_getfl(&fd)?;
            Ok(rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
        });
        match checked {
            Ok(()) => Ok(Uffd(fd)),
            Err(error) => Err((fd, error)),
        }
    }

    /// Reads what there is to tell, without waiting, and calls `each`; tells whether there
    /// may be more. The kernel gives faults before other events.
    pub(crate) fn read(
        &self,
        messages: &mut Messages,
        mut each: impl FnMut(Event),
    ) -> io::Result<bool> {
        let bytes = match rustix::io::read(&self.0, &mut messages.0[..]) {
            Ok(bytes) => bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        for message in messages.0[..bytes].chunks_exact(MESSAGE) {
            each(parse(message));
        }
        Ok(bytes == messages.0.len())
    }

    /// Copies whole pages to `address`.
    pub(crate) fn copy(&self, address: u64, pages: &[u8]) -> io::Result<Placed> {
        let mut argument = uffdio_copy {
            dst: address,
            src: pages.as_ptr() as u64,
            len: pages.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads `pages.len()` bytes of `pages`, which is borrowed for the
        // call, and writes the field `copy` of `argument`.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request(UFFDIO_COPY), &mut argument) };
        placed(result, argument.copy)
    }

    /// Makes pages zero: `bytes`, whole pages, from `address` on.
    pub(crate) fn zero(&self, address: u64, bytes: usize) -> io::Result<Placed> {
        let mut argument = uffdio_zeropage {
            range: uffdio_range {
                start: address,
                len: bytes as u64,
            },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: the kernel writes the field `zeropage` of `argument`, nothing else of ours.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request(UFFDIO_ZEROPAGE), &mut argument) };
        placed(result, argument.zeropage)
    }

    /// Lets who waits for the page at `address` try again.
    pub(crate) fn wake(&self, address: u64) -> io::Result<()> {
        let mut argument = uffdio_range {
            start: address,
            len: PAGE as u64,
        };
        // SAFETY: the kernel only reads `argument`.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request(UFFDIO_WAKE), &mut argument) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn request(number: u32) -> libc::Ioctl {
    libc::Ioctl::from(number)
}

/// What a call's result and the count that it wrote mean together.
fn placed(result: libc::c_int, count: i64) -> io::Result<Placed> {
    let error = io::Error::last_os_error();
    match usize::try_from(count) {
        // The count is a number of bytes even if the call failed behind them.
        Ok(bytes) if bytes > 0 => return Ok(Placed::Bytes(bytes)),
        _ if result == 0 => return Err(io::Error::other("the kernel placed nothing")),
        _ => {}
    }
    match error.raw_os_error() {
        Some(libc::EEXIST) => Ok(Placed::Exists),
        Some(libc::EAGAIN | libc::EINTR) => Ok(Placed::Busy),
        Some(libc::ENOENT) => Ok(Placed::Unmapped),
        Some(libc::ESRCH) => Ok(Placed::Gone),
        _ => Err(error),
    }
}

/// One `struct uffd_msg`, of [`MESSAGE`] bytes.
fn parse(message: &[u8]) -> Event {
    let number = |at: usize| {
        let bytes = message.get(at..at + 8).unwrap_or_default();
        bytes
            .iter()
            .rev()
            .fold(0, |all, byte| all << 8 | u64::from(*byte))
    };
    let (first, second) = (number(8), number(16));
    match u32::from(message[0]) {
        UFFD_EVENT_PAGEFAULT => {
            let other = u64::from(UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_MINOR);
            match first & other {
                0 => Event::Missing(second),
                _ => Event::Other("had writes to its memory or its page cache watched"),
            }
        }
        UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP => Event::Removed {
            start: first,
            end: second,
        },
        UFFD_EVENT_REMAP => Event::Other("moved its memory"),
        UFFD_EVENT_FORK => {
            // The event brings a descriptor of the child's memory.
            if let Ok(fd) = i32::try_from(first & u64::from(u32::MAX)) {
                // SAFETY: the kernel has just made this descriptor for this read, and nothing
                // else knows its number.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Event::Other("forked")
        }
        _ => Event::Other("did something that this program does not know"),
    }
}

/// A pidfd of the process at the other end of a Unix socket, from the kernel itself
/// (Linux 6.5; `ENOPROTOOPT` before).
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut fd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, an int, to `fd`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file that nobody can change any more, mapped for reading.
#[derive(Debug)]
pub(crate) struct Mapped {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is read only, and its content does not change.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `bytes` bytes, of at least 1, of a file; refuses it unless it is sealed
    /// against writing and shrinking.
    pub(crate) fn new(file: &std::fs::File, bytes: usize) -> io::Result<Mapped> {
        let seals = rustix::fs::fcntl_get_seals(file)?;
        let fixed = SealFlags::WRITE | SealFlags::SHRINK;
        if !seals.contains(fixed) || file.metadata()?.len() < bytes as u64 {
            return Err(io::Error::other("it is not sealed, or shorter"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice. The seals, which cannot
        // be undone, keep it from changing and from ending before `bytes`.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ,
                MapFlags::PRIVATE,
                file,
                0,
            )
        }?;
        Ok(Mapped {
            start: start.cast(),
            bytes,
        })
    }

    /// Makes the kernel enter a part of it, in whole pages, in this process's page table, so
    /// that its first use costs nothing. It may refuse (before Linux 5.14); no harm is done.
    pub(crate) fn populate(&self, from: usize, bytes: usize) {
        if let Some(part) = self.bytes().get(from..from + bytes) {
            let start = part.as_ptr().cast_mut().cast();
            // SAFETY: the part lies in the mapping, which stays what it is.
            let _ =
                unsafe { rustix::mm::madvise(start, bytes, rustix::mm::Advice::LinuxPopulateRead) };
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has so many bytes, is not changed, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.start.cast(), self.bytes) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "cannot unmap a base");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_errors_are_told_apart() {
        assert_eq!(placed(0, 8192).unwrap(), Placed::Bytes(8192));
        // Half done before the error.
        assert_eq!(placed(-1, 4096).unwrap(), Placed::Bytes(4096));
        assert!(placed(0, 0).is_err());
    }

    #[test]
    fn only_a_userfaultfd_is_taken() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let (_, error) = Uffd::new(file.into()).unwrap_err();
        assert!(error.to_string().contains("/dev/null"), "{error}");
    }

    #[test]
    fn messages_are_read_as_the_kernel_lays_them_out() {
        let mut message = [0u8; MESSAGE];
        message[0] = UFFD_EVENT_PAGEFAULT as u8;
        message[16..24].copy_from_slice(&0x7000_1000u64.to_le_bytes());
        assert!(matches!(parse(&message), Event::Missing(0x7000_1000)));
        message[8] = UFFD_PAGEFAULT_FLAG_WP as u8;
        assert!(matches!(parse(&message), Event::Other(_)));
        message[0] = UFFD_EVENT_REMOVE as u8;
        let removed = parse(&message);
        assert!(matches!(
            removed,
            Event::Removed {
                start: 2,
                end: 0x7000_1000
            }
        ));
        message[0] = 99;
        assert!(matches!(parse(&message), Event::Other(_)));
    }
}
