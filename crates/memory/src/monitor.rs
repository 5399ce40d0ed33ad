//! The process whose memory is served: held, so that it can be watched and ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::handshake::readable;
use crate::kernel::peer_pidfd;

/// How long the end of a killed process is waited for. It may have gigabytes to free; nothing
/// is lost when it takes longer, since a killed process runs no instruction of its own.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// A monitor. Dropped while it lives, it is killed, whatever the reason (a panic included):
/// a machine whose memory is no longer served reads zeros where it had data, or waits for
/// ever. So this must be dropped before the descriptor of its memory.
#[derive(Debug)]
pub(crate) struct Monitor {
    pid: u32,
    pidfd: OwnedFd,
    ended: bool,
}

impl Monitor {
    /// The process at the other end of `connection`, if its user is `uid`.
    pub(crate) fn of_peer(connection: BorrowedFd<'_>, uid: u32) -> io::Result<Monitor> {
        let peer = rustix::net::sockopt::socket_peercred(connection)?;
        if peer.uid.as_raw() != uid {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "process {} of user {} connected, and the monitor's user is {uid}",
                    peer.pid.as_raw_nonzero(),
                    peer.uid.as_raw()
                ),
            ));
        }
        let pidfd = match peer_pidfd(connection) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                of_number(peer.pid, connection)?
            }
            Err(error) => return Err(error),
        };
        Ok(Monitor {
            pid: peer.pid.as_raw_nonzero().get().unsigned_abs(),
            pidfd,
            ended: false,
        })
    }

    /// Its number; another process may have it once this one has ended.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Notes that it has ended by itself.
    pub(crate) fn set_ended(&mut self) {
        self.ended = true;
    }

    /// Waits for its end.
    pub(crate) fn ends_within(&mut self, patience: Duration) -> io::Result<bool> {
        if !self.ended {
            self.ended = readable(&self.pidfd, patience)?;
        }
        Ok(self.ended)
    }

    /// Kills it and waits for its end.
    fn kill(&mut self) {
        let killed = match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) => self.ends_within(END_PATIENCE),
            Err(rustix::io::Errno::SRCH) => Ok(true),
            Err(error) => Err(error.into()),
        };
        match killed {
            Ok(true) => self.ended = true,
            Ok(false) => tracing::warn!(pid = self.pid, "the killed monitor takes long to end"),
            Err(error) => {
                tracing::error!(pid = self.pid, %error, "the monitor cannot be killed");
            }
        }
    }
}

impl AsFd for Monitor {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
        }
    }
}

/// Before Linux 6.5: by number, which may have been given to another process meanwhile.
fn of_number(pid: Pid, connection: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    // While the peer lives and its end is open nothing can be read but data; had it ended,
    // its end would be closed.
    let mut polled = [rustix::event::PollFd::new(
        &connection,
        rustix::event::PollFlags::RDHUP,
    )];
    let none = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut polled, Some(&none))? {
        0 => Ok(pidfd),
        _ => Err(io::Error::other(format!(
            "process {} hung up as soon as it had connected",
            pid.as_raw_nonzero()
        ))),
    }
}
