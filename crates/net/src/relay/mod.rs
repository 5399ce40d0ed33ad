//! The guest's resolver: passes its DNS queries on to the resolvers of the host.
//!
//! It runs in the process that stays beside the machine, so that names resolve whether or not
//! the agent lives. Its two listening sockets are in the slot's namespace
//! ([`crate::Slot::dns_sockets`]); the sockets to the host's resolvers are its own and so in the
//! host's. It holds no state but the queries in flight, caches nothing and trusts neither side:
//! a query must be one plain question, an answer must repeat that question and a random number,
//! and both the queries in flight and the TCP connections are bounded.
//!
//! It resolves no more than the sandbox's policy allows ([`guard`]): only names on the allow list
//! where nothing else is open, never an address that no guest may reach. What it refuses it notes
//! for the agent ([`crate::refused`]).

mod answer;
mod guard;
mod message;
mod tcp;
mod udp;
mod upstreams;

use std::fs::File;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

pub use upstreams::Upstreams;

use guard::Guard;

/// What the relay of a slot works with ([`crate::Slot::relay`]). It is made by the agent and
/// handed to the relay's process as descriptors.
#[derive(Debug)]
pub struct RelayFiles {
    pub(crate) udp: UdpSocket,
    pub(crate) tcp: TcpListener,
    /// From where the relay tells the slot's firewall which addresses a name stands for.
    pub(crate) openings: UdpSocket,
    /// What is in force, for reading.
    pub(crate) notice: File,
    /// Where names that are refused are noted, for writing.
    pub(crate) refused: File,
}

impl RelayFiles {
    /// The descriptors, in the order [`Self::from_descriptors`] takes them.
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        vec![
            self.udp.into(),
            self.tcp.into(),
            self.openings.into(),
            self.notice.into(),
            self.refused.into(),
        ]
    }

    /// Takes the descriptors back. `None` if they are not as many.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let [udp, tcp, openings, notice, refused] = <[OwnedFd; 5]>::try_from(descriptors).ok()?;
        Some(Self {
            udp: udp.into(),
            tcp: tcp.into(),
            openings: openings.into(),
            notice: notice.into(),
            refused: refused.into(),
        })
    }
}

/// Serves a slot's resolver until its sockets fail, which they do not in normal life: run it on
/// a thread of its own. Uses that thread, one for TCP and one per TCP connection.
///
/// # Errors
/// Returns only with an error: the sockets are not what they should be, or no thread can start.
pub fn serve(files: RelayFiles, upstreams: Upstreams) -> io::Error {
    let RelayFiles {
        udp,
        tcp,
        openings,
        notice,
        refused,
    } = files;
    let guard = Guard::new(notice, openings, refused);
    let for_tcp = match guard.try_clone() {
        Ok(guard) => (guard, upstreams.clone()),
        Err(error) => return error,
    };
    let started = std::thread::Builder::new()
        .name("dns-tcp".to_owned())
        .spawn(move || tcp::serve(&tcp, &for_tcp.0, for_tcp.1));
    match started {
        Ok(_) => udp::serve(&udp, guard, upstreams),
        Err(error) => error,
    }
}
