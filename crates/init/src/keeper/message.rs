//! Messages between init and the guest agent over one `SOCK_SEQPACKET` pair: a head of
//! fixed size, a body that only the agent reads, and descriptors beside it.
//!
//! ```text
//!   0     1     2      3    4          8          16           20     24
//!   kind  fds   flags  0    pid (u32)  key (u64)  value (i32)  0      body …
//! ```
//!
//! Both ends are of one build and one machine, but the bytes are little-endian all the same.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

const HEAD: usize = 24;
/// A longer body goes into a memory file: a message must fit the socket's buffer.
const INLINE: usize = 32 * 1024;
/// The body is in the first descriptor.
const IN_FILE: u8 = 1;
/// The most descriptors of one message, the body's included.
const MAX_FDS: usize = 8;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Agent to init: keep this under this key, in place of what was there. Init to a new
    /// agent: this was kept.
    Keep = 1,
    /// Agent to init: forget this key.
    Forget,
    /// Init to agent: the process of this key ended by itself, with `value` as its status.
    Exited,
    /// … was ended by signal `value`.
    Killed,
    /// … was ended by signal `value`, and a core file was written.
    Dumped,
    /// … ended, and whoever knew how has ended too.
    Gone,
    /// Init to a new agent: that was all.
    Done,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Keep,
        Kind::Forget,
        Kind::Exited,
        Kind::Killed,
        Kind::Dumped,
        Kind::Gone,
        Kind::Done,
    ];

    fn of(byte: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// What a message is about and whom it concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What.
    pub kind: Kind,
    /// The agent's name for it; never used again for another process.
    pub key: u64,
    /// The process, or 0 for what is none.
    pub pid: u32,
    /// A status or a signal.
    pub value: i32,
}

impl Head {
    /// A message that concerns a key alone.
    pub fn new(kind: Kind, key: u64, pid: u32) -> Head {
        Head {
            kind,
            key,
            pid,
            value: 0,
        }
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Whom it concerns.
    pub head: Head,
    flags: u8,
    /// How many descriptors were sent; fewer may have arrived.
    sent: u8,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    /// Body and descriptors.
    ///
    /// # Errors
    /// The receiver had no room for the descriptors, or the body cannot be read.
    pub fn into_parts(self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        if self.fds.len() != usize::from(self.sent) {
            return Err(io::Error::other(format!(
                "{} of {} descriptors were lost for lack of room",
                usize::from(self.sent) - self.fds.len(),
                self.sent
            )));
        }
        if self.flags & IN_FILE == 0 {
            return Ok((self.body, self.fds));
        }
        let mut fds = self.fds.into_iter();
        let file = fds.next().ok_or(io::ErrorKind::UnexpectedEof)?;
        let file = std::fs::File::from(file);
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut body = vec![0; length];
        file.read_exact_at(&mut body, 0)?;
        Ok((body, fds.collect()))
    }

    /// The descriptor that stands for the process: the first that is not the body's.
    pub fn process(&self) -> Option<BorrowedFd<'_>> {
        let index = usize::from(self.flags & IN_FILE);
        self.fds.get(index).map(AsFd::as_fd)
    }

    /// Sends it on as it came.
    ///
    /// # Errors
    /// What the kernel says; `EAGAIN` when the other end does not read.
    pub fn forward(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        write(socket, self.head, (self.flags, self.sent), &self.body, &fds)
    }
}

/// Sends a message.
///
/// # Errors
/// What the kernel says; `EAGAIN` when the other end does not read in time.
pub fn send(
    socket: BorrowedFd<'_>,
    head: Head,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let count = |fds: &[BorrowedFd<'_>]| u8::try_from(fds.len()).map_err(io::Error::other);
    if body.len() <= INLINE {
        return write(socket, head, (0, count(fds)?), body, fds);
    }
    let file = rustix::fs::memfd_create(c"handover", MemfdFlags::CLOEXEC)?;
    let file = std::fs::File::from(file);
    file.write_all_at(body, 0)?;
    let mut all = vec![file.as_fd()];
    all.extend_from_slice(fds);
    write(socket, head, (IN_FILE, count(&all)?), &[], &all)
}

fn write(
    socket: BorrowedFd<'_>,
    head: Head,
    (flags, sent): (u8, u8),
    body: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut bytes = [0; HEAD];
    bytes[..3].copy_from_slice(&[head.kind as u8, sent, flags]);
    bytes[4..8].copy_from_slice(&head.pid.to_le_bytes());
    bytes[8..16].copy_from_slice(&head.key.to_le_bytes());
    bytes[16..20].copy_from_slice(&head.value.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    let parts = [IoSlice::new(&bytes), IoSlice::new(body)];
    loop {
        match rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives a message; `None` when the other end is closed. With `wait` off, `EAGAIN` when
/// there is none.
///
/// # Errors
/// What the kernel says, or a message that is none of ours.
pub fn receive(socket: BorrowedFd<'_>, wait: bool) -> io::Result<Option<Message>> {
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    if !wait {
        flags |= RecvFlags::DONTWAIT;
    }
    let mut head = [0; HEAD];
    let mut body = vec![0; INLINE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut head), IoSliceMut::new(&mut body)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let unknown = || io::Error::new(io::ErrorKind::InvalidData, "not a message of the handover");
    if received.bytes < HEAD || received.flags.contains(ReturnFlags::TRUNC) {
        return Err(unknown());
    }
    body.truncate(received.bytes - HEAD);
    body.shrink_to_fit();
    let [kind, sent, flags, _, rest @ ..] = head;
    let (pid, rest) = rest.split_first_chunk().ok_or_else(unknown)?;
    let (key, rest) = rest.split_first_chunk().ok_or_else(unknown)?;
    let value = rest.first_chunk().ok_or_else(unknown)?;
    Ok(Some(Message {
        head: Head {
            kind: Kind::of(kind).ok_or_else(unknown)?,
            key: u64::from_le_bytes(*key),
            pid: u32::from_le_bytes(*pid),
            value: i32::from_le_bytes(*value),
        },
        flags,
        sent,
        body,
        fds,
    }))
}
