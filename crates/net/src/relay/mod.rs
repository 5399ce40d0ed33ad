//! The guest's resolver: passes its DNS queries on to the resolvers of the host.
//!
//! It runs in the process that stays beside the machine, so that names resolve whether or not
//! the agent lives. Its two listening sockets are in the slot's namespace
//! ([`crate::Slot::dns_sockets`]); the sockets to the host's resolvers are its own and so in the
//! host's. It holds no state but the queries in flight, caches nothing and trusts neither side:
//! a query must be one plain question, an answer must repeat that question and a random number,
//! and both the queries in flight and the TCP connections are bounded.

mod message;
mod tcp;
mod udp;
mod upstreams;

use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

pub use upstreams::Upstreams;

/// Serves a slot's resolver until its sockets fail, which they do not in normal life: run it on
/// a thread of its own. Uses that thread, one for TCP and one per TCP connection.
///
/// # Errors
/// Returns only with an error: the sockets are not what they should be, or no thread can start.
pub fn serve(udp: OwnedFd, tcp: OwnedFd, upstreams: Upstreams) -> io::Error {
    let listener = TcpListener::from(tcp);
    let for_tcp = upstreams.clone();
    let started = std::thread::Builder::new()
        .name("dns-tcp".to_owned())
        .spawn(move || tcp::serve(&listener, for_tcp));
    match started {
        Ok(_) => udp::serve(&UdpSocket::from(udp), upstreams),
        Err(error) => error,
    }
}

/// Bytes from the kernel's random number generator.
fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // Small requests are never cut short (getrandom(2)).
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}
