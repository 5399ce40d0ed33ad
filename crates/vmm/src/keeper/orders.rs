//! What agent and keeper say to each other, over a pair of `SOCK_SEQPACKET` sockets: each
//! message is one packet of JSON, and the first one carries the descriptors.

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::machine::ProcessId;

/// The monitor's console is the writing end of a pipe to the keeper, at this number.
pub(crate) const SERIAL_FD: i32 = 3;

/// The monitor's descriptors of [`Orders`] get the numbers from here on.
pub(crate) const FIRST_FD: i32 = 4;

/// The longest packet: a command line of a monitor has 2 to 4 KiB.
const MAX_PACKET: usize = 64 << 10;

/// Linux passes 253 descriptors at most in one message (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// What the keeper shall do. With it come the descriptors, in this order: console log, exit
/// file, the jail's network namespace, the guard, the monitor's, the companions'.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Orders {
    /// The monitor.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) args: Vec<OsString>,
    /// User and group of keeper and monitor.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// How many descriptors the monitor gets.
    pub(crate) monitor_fds: usize,
    /// How many the companions get.
    pub(crate) companion_fds: usize,
    /// Whether the monitor is ended when another process, which comes as a descriptor, does.
    pub(crate) guarded: bool,
    /// Where the monitor writes what the guest prints.
    pub(crate) console: Console,
    /// Where the monitor is locked in.
    pub(crate) jail: Jail,
}

/// Where a monitor writes what its guest prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Console {
    /// To descriptor [`SERIAL_FD`], and it waits where the keeper is slow.
    Descriptor,
    /// To its standard output.
    Stdout,
}

/// What a monitor sees of the host: a root of its own with what is named here, `/dev`, and its descriptors as `/fd/N`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Jail {
    /// The folder that becomes its root.
    pub(crate) root: PathBuf,
    /// Files and folders of the host that it sees.
    pub(crate) binds: Vec<Bind>,
    /// Devices of the host, such as `/dev/kvm`, that are its own under the same path.
    pub(crate) devices: Vec<PathBuf>,
    /// Whether a network namespace comes as a descriptor; else it gets an empty one.
    pub(crate) network: bool,
}

/// A file or folder of the host as a jail shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Bind {
    /// On the host.
    pub(crate) from: PathBuf,
    /// In the jail, without the leading slash.
    pub(crate) to: PathBuf,
    /// Whether it holds programs.
    pub(crate) executable: bool,
}

/// What the keeper answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) enum Report {
    /// The monitor runs.
    Started {
        /// The keeper.
        keeper: ProcessId,
        /// The monitor.
        vmm: ProcessId,
    },
    /// It could not be started.
    Failed(String),
}

/// The agent has recorded the machine.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Commit;

/// One end of the channel.
pub(crate) struct Channel(OwnedFd);

impl Channel {
    pub(crate) fn pair() -> io::Result<(Channel, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel(ours), theirs))
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Channel {
        Channel(fd)
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends one message. Does not block in practice: the packets fit the socket's buffer.
    pub(crate) fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} bytes with {} descriptors are too much for one packet",
                    bytes.len(),
                    fds.len()
                ),
            ));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            // The space is for as many as were just checked.
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        rustix::net::sendmsg(
            &self.0,
            &[io::IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Receives one message with its descriptors; `None` when the other end is closed.
    /// Blocks unless the descriptor does not.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.0,
            &mut [io::IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        Ok(Some((
            serde_json::from_slice(&bytes[..received.bytes])?,
            fds,
        )))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_arrive_whole_with_their_descriptors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel::from_fd(theirs);
        let orders = Orders {
            program: "/usr/bin/true".into(),
            args: vec!["-a".into(), "b \n\"c".into()],
            uid: 1,
            gid: 2,
            monitor_fds: 1,
            companion_fds: 0,
            guarded: false,
            console: Console::Stdout,
            jail: Jail {
                root: "/m".into(),
                binds: Vec::new(),
                devices: vec!["/dev/kvm".into()],
                network: true,
            },
        };
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        ours.send(&orders, &[file.as_fd(), file.as_fd()]).unwrap();
        ours.send(&Commit, &[]).unwrap();
        let (read, fds) = theirs.receive::<Orders>().unwrap().unwrap();
        assert_eq!((read.args, fds.len()), (orders.args, 2));
        assert_eq!(read.jail, orders.jail);
        assert!(theirs.receive::<Commit>().unwrap().is_some());
        drop(ours);
        assert!(theirs.receive::<Commit>().unwrap().is_none());
    }
}
