//! Queries by UDP: one loop over the guest's socket and one socket per query in flight.
//!
//! Each attempt has a socket of its own, connected to the resolver: the kernel then drops what
//! comes from elsewhere, chooses a random port, and reports a closed one at once.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::guard::Guard;
use super::message::Query;
use super::upstreams::Upstreams;

/// Queries in flight; a guest with more gets failures until some are answered.
const MOST_IN_FLIGHT: usize = 128;
/// How long one resolver is waited for before the next is asked.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Attempts in all: with the patience above they end before the guest's own 5 s do.
const ATTEMPTS: usize = 3;
const LARGEST_DATAGRAM: usize = 65_535;
/// An answer of this length every guest takes (RFC 1035, section 2.3.4).
const ALWAYS_FITS: usize = 512;

struct InFlight {
    query: Query,
    guest: SocketAddr,
    socket: UdpSocket,
    id: [u8; 2],
    attempts: usize,
    deadline: Instant,
}

pub(super) fn serve(guest: &UdpSocket, mut guard: Guard, mut upstreams: Upstreams) -> io::Error {
    let mut flights: Vec<InFlight> = Vec::new();
    let mut buffer = vec![0; LARGEST_DATAGRAM];
    if let Err(error) = guest.set_nonblocking(true) {
        return error;
    }
    loop {
        let ready = match wait(guest, &flights) {
            Ok(ready) => ready,
            Err(error) => return error,
        };
        // From the back, so that removing one leaves the places of the others as they were.
        for at in (0..flights.len()).rev() {
            if !ready.contains(&(at + 1)) {
                continue;
            }
            match receive(&flights[at], &mut buffer) {
                Received::Answer(answer) => {
                    let flight = &flights[at];
                    reply(guest, flight.guest, &admit(&mut guard, flight, answer));
                    flights.swap_remove(at);
                }
                Received::Refusal => flights[at].deadline = Instant::now(),
                Received::Noise => {}
            }
        }
        let now = Instant::now();
        for at in (0..flights.len()).rev() {
            if flights[at].deadline <= now && !try_again(&mut flights[at], &mut upstreams) {
                let failed = flights.swap_remove(at);
                reply(guest, failed.guest, &failed.query.failure());
            }
        }
        if ready.contains(&0)
            && let Err(error) = accept(guest, &mut guard, &mut flights, &mut upstreams, &mut buffer)
        {
            return error;
        }
    }
}

/// Waits for the guest, an answer or a deadline. Places: 0 is the guest, then the flights.
fn wait(guest: &UdpSocket, flights: &[InFlight]) -> io::Result<Vec<usize>> {
    let mut fds: Vec<PollFd<'_>> = std::iter::once(guest)
        .chain(flights.iter().map(|flight| &flight.socket))
        .map(|socket| PollFd::new(socket, PollFlags::IN))
        .collect();
    let timeout = flights
        .iter()
        .map(|flight| flight.deadline)
        .min()
        .map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            // Rounded up: waking just before a deadline would spin.
            let left = left + Duration::from_millis(1);
            Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(fds
        .iter()
        .enumerate()
        .filter(|(_, fd)| !fd.revents().is_empty())
        .map(|(at, _)| at)
        .collect())
}

/// Takes what the guest has sent.
fn accept(
    guest: &UdpSocket,
    guard: &mut Guard,
    flights: &mut Vec<InFlight>,
    upstreams: &mut Upstreams,
    buffer: &mut [u8],
) -> io::Result<()> {
    // Bounded, so that a guest that floods does not keep answers waiting.
    for _ in 0..MOST_IN_FLIGHT {
        let (len, from) = match guest.recv_from(buffer) {
            Ok(received) => received,
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(()),
                // An earlier answer did not arrive, because the guest closed its port.
                io::ErrorKind::ConnectionRefused | io::ErrorKind::Interrupted => continue,
                _ => return Err(error),
            },
        };
        let Some(query) = Query::read(&buffer[..len]) else {
            continue;
        };
        if let Some(answer) = guard.judge(&query) {
            reply(guest, from, &answer);
            continue;
        }
        let flight = if flights.len() < MOST_IN_FLIGHT {
            launch(query.clone(), from, upstreams)
        } else {
            None
        };
        match flight {
            Some(flight) => flights.push(flight),
            None => reply(guest, from, &query.failure()),
        }
    }
    Ok(())
}

fn launch(query: Query, guest: SocketAddr, upstreams: &mut Upstreams) -> Option<InFlight> {
    let addrs = upstreams.current();
    if addrs.is_empty() {
        return None;
    }
    (0..ATTEMPTS).find_map(|attempt| {
        let (socket, id) = ask(&query, addrs[attempt % addrs.len()]).ok()?;
        let deadline = Instant::now() + PATIENCE;
        Some(InFlight {
            query: query.clone(),
            guest,
            socket,
            id,
            attempts: attempt + 1,
            deadline,
        })
    })
}

/// Asks the next resolver; false if there were enough attempts.
fn try_again(flight: &mut InFlight, upstreams: &mut Upstreams) -> bool {
    let addrs = upstreams.current();
    while flight.attempts < ATTEMPTS && !addrs.is_empty() {
        let upstream = addrs[flight.attempts % addrs.len()];
        flight.attempts += 1;
        if let Ok((socket, id)) = ask(&flight.query, upstream) {
            flight.socket = socket;
            flight.id = id;
            flight.deadline = Instant::now() + PATIENCE;
            return true;
        }
    }
    false
}

fn ask(query: &Query, upstream: SocketAddr) -> io::Result<(UdpSocket, [u8; 2])> {
    let any: SocketAddr = match upstream {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(upstream)?;
    let id = crate::sys::random()?;
    socket.send(&query.numbered(id))?;
    Ok((socket, id))
}

/// What the guest gets. Written out, an answer may be longer than it came.
fn admit(guard: &mut Guard, flight: &InFlight, answer: Vec<u8>) -> Vec<u8> {
    let room = answer.len().max(ALWAYS_FITS);
    let admitted = guard.admit(&flight.query, answer);
    if admitted.len() > room {
        return flight.query.truncated();
    }
    admitted
}

enum Received {
    Answer(Vec<u8>),
    /// Nobody listens there: no need to wait for the deadline.
    Refusal,
    /// Something that answers another question, or nothing.
    Noise,
}

fn receive(flight: &InFlight, buffer: &mut [u8]) -> Received {
    match flight.socket.recv(buffer) {
        Ok(len) => flight
            .query
            .answer(&buffer[..len], flight.id)
            .map_or(Received::Noise, Received::Answer),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Noise,
        Err(_) => Received::Refusal,
    }
}

/// Answers the guest. A datagram that cannot be sent is a datagram lost: the guest asks again.
fn reply(guest: &UdpSocket, to: SocketAddr, answer: &[u8]) {
    if let Err(error) = guest.send_to(answer, to) {
        tracing::debug!(%error, "an answer to the guest was lost");
    }
}
