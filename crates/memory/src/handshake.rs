//! The monitor's first and only message: its memory's descriptor and where that memory is.
//!
//! Firecracker connects to a Unix socket, sends one message with a userfaultfd (`SCM_RIGHTS`)
//! and a JSON array of regions, keeps the connection open and never looks at it again. From
//! then on it runs on memory that is only there if somebody serves it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::regions::{RegionError, Regions};

/// The longest message: a region takes some 100 bytes.
const MAX_BYTES: usize = 64 << 10;

/// Descriptors that one message has room for; one is right, more are looked at and refused.
const MAX_FDS: usize = 4;

/// Why a monitor's first message is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Nothing, or not all of it, came in time.
    #[error("after {seconds} s its message had {bytes} bytes and was not complete")]
    Slow {
        /// How long was waited.
        seconds: u64,
        /// What had come.
        bytes: usize,
    },
    /// It hung up first.
    #[error("it hung up after {bytes} bytes")]
    HungUp {
        /// What had come.
        bytes: usize,
    },
    /// A message that does not end.
    #[error("its message is longer than {MAX_BYTES} bytes")]
    Long,
    /// No descriptor, or several.
    #[error("its message brought {0} descriptors instead of one")]
    Descriptors(usize),
    /// Another kind of descriptor.
    #[error("the descriptor it sent cannot be used")]
    NotUserfaultfd(#[source] io::Error),
    /// A wrong description.
    #[error("its description of the memory is wrong")]
    Regions(#[from] RegionError),
    /// The operating system refused something.
    #[error("its message cannot be received")]
    System(#[source] io::Error),
}

/// Receives the message of a monitor whose memory has `pages` pages. All descriptors that
/// came are added to `fds`, also on errors: closing one before the monitor is dead would let
/// it run on zeros.
pub(crate) fn receive(
    connection: BorrowedFd<'_>,
    pages: u64,
    patience: Duration,
    fds: &mut Vec<OwnedFd>,
) -> Result<Regions, HandshakeError> {
    let began = Instant::now();
    let mut bytes = Vec::new();
    // A stream has no borders: the message is whole when its JSON is.
    while !message_is_whole(&bytes)? {
        if bytes.len() >= MAX_BYTES {
            return Err(HandshakeError::Long);
        }
        let left = patience.checked_sub(began.elapsed());
        if !readable(connection, left.unwrap_or_default()).map_err(HandshakeError::System)? {
            return Err(HandshakeError::Slow {
                seconds: patience.as_secs(),
                bytes: bytes.len(),
            });
        }
        if receive_some(connection, &mut bytes, fds).map_err(HandshakeError::System)? == 0 {
            return Err(HandshakeError::HungUp { bytes: bytes.len() });
        }
    }
    if fds.len() != 1 {
        return Err(HandshakeError::Descriptors(fds.len()));
    }
    Ok(Regions::parse(&bytes, pages)?)
}

/// Whether a list in JSON is there up to its last bracket. What is in it is not looked at: a
/// parser takes numbers for wrong that are only cut.
///
/// # Errors
/// [`RegionError::Json`] where it does not begin as a list.
pub fn message_is_whole(bytes: &[u8]) -> Result<bool, RegionError> {
    let text = bytes.trim_ascii_start();
    if text.first().is_some_and(|first| *first != b'[') {
        return Err(RegionError::Json("it does not begin with a bracket".into()));
    }
    let mut depth = 0_usize;
    let (mut quoted, mut escaped) = (false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' if depth == 1 => return Ok(true),
            // Begins with a bracket, and ends with its last: never below 1.
            b']' | b'}' => depth -= 1,
            _ => {}
        }
    }
    Ok(false)
}

/// Appends what has come; gives how many bytes.
fn receive_some(
    connection: BorrowedFd<'_>,
    bytes: &mut Vec<u8>,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let room = buffer.len().min(MAX_BYTES - bytes.len());
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        connection,
        &mut [io::IoSliceMut::new(&mut buffer[..room])],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    );
    let count = match received {
        Ok(message) => message.bytes,
        // Whoever hung up with unread bytes in its direction.
        Err(rustix::io::Errno::CONNRESET) => 0,
        Err(error) => return Err(error.into()),
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    bytes.extend_from_slice(&buffer[..count]);
    Ok(count)
}

/// Waits until there is something to read, or the end; `false` after `patience`.
pub(crate) fn readable(fd: impl AsFd, patience: Duration) -> io::Result<bool> {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(&fd, PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&timespec(left))) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

/// For the kernel.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        // Longer than any machine stands.
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_whole_with_its_last_bracket_wherever_it_is_cut() {
        let message = br#" [{"note":"]\"}","numbers":[-1,2.5,3e4]},true]"#;
        for length in 0..message.len() {
            assert_eq!(message_is_whole(&message[..length]), Ok(false), "{length}");
        }
        assert_eq!(message_is_whole(message), Ok(true));
        for other in [&b"{}"[..], b"-", b"]", b"\0["] {
            assert!(message_is_whole(other).is_err());
        }
    }
}
