//! Netlink: requests as bytes, and a blocking socket that sends them.
//!
//! One encoder serves links and routes (rtnetlink), nftables and connection tracking
//! (nfnetlink). It is synchronous on purpose: a request is a handful of microseconds in the
//! kernel, and the callers are threads that sit inside a network namespace, where no async
//! runtime may run. Formats: netlink(7), rtnetlink(7), `linux/netlink.h`,
//! `linux/netfilter/nfnetlink.h`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Flags of a request.
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const APPEND: u16 = 0x800;
pub(crate) const ROOT_MATCH_DUMP: u16 = 0x300;
const IS_REQUEST: u16 = 0x1;
const WANTS_ACK: u16 = 0x4;

const ANSWER_ERROR: u16 = 2;
const ANSWER_DONE: u16 = 3;
const HEADER_LEN: usize = 16;
/// Marks an attribute that contains attributes.
const NESTED: u16 = 0x8000;
/// The kernel never sends more than 32 KiB in one datagram of a dump.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// The kernel answers before `sendto` returns; this only keeps a broken assumption from
/// becoming a hang.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A list of attributes under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attrs(Vec<u8>);

impl Attrs {
    pub(crate) fn bytes(&mut self, kind: u16, data: &[u8]) -> &mut Self {
        let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(data);
        self.pad();
        self
    }

    /// A string with its NUL.
    pub(crate) fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        let mut data = text.as_bytes().to_vec();
        data.push(0);
        self.bytes(kind, &data)
    }

    /// A number as rtnetlink has it, in the machine's byte order.
    pub(crate) fn native(&mut self, kind: u16, number: u32) -> &mut Self {
        self.bytes(kind, &number.to_ne_bytes())
    }

    /// A number as nfnetlink has it, in network byte order.
    pub(crate) fn network(&mut self, kind: u16, number: u32) -> &mut Self {
        self.bytes(kind, &number.to_be_bytes())
    }

    /// Bytes without a header of their own, as at the start of some nested attributes.
    pub(crate) fn raw(&mut self, data: &[u8]) -> &mut Self {
        self.0.extend_from_slice(data);
        self.pad();
        self
    }

    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Attrs)) -> &mut Self {
        let mut inner = Attrs::default();
        fill(&mut inner);
        self.bytes(kind | NESTED, &inner.0)
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// One request: its kind, its fixed header, its attributes.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    kind: u16,
    flags: u16,
    body: Attrs,
}

impl Request {
    /// `fixed` is the structure the message kind starts with (`ifinfomsg`, `nfgenmsg` …).
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut body = Attrs::default();
        body.raw(fixed);
        Self { kind, flags, body }
    }

    pub(crate) fn attrs(mut self, fill: impl FnOnce(&mut Attrs)) -> Self {
        fill(&mut self.body);
        self
    }

    fn encode(&self, seq: u32, extra_flags: u16, out: &mut Vec<u8>) {
        let len = u32::try_from(HEADER_LEN + self.body.0.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&len.to_ne_bytes());
        out.extend_from_slice(&self.kind.to_ne_bytes());
        out.extend_from_slice(&(self.flags | IS_REQUEST | extra_flags).to_ne_bytes());
        out.extend_from_slice(&seq.to_ne_bytes());
        out.extend_from_slice(&0_u32.to_ne_bytes());
        out.extend_from_slice(&self.body.0);
    }
}

/// An answer that carries data: its kind and what follows the header.
pub(crate) struct Answer<'a> {
    pub(crate) kind: u16,
    pub(crate) body: &'a [u8],
}

/// The attributes of an answer behind a fixed structure of `fixed` bytes.
pub(crate) fn attributes(body: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
        let kind = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]) & 0x3fff;
        let data = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, data))
    })
}

/// A netlink socket. It belongs to the network namespace it was opened in, for good.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    seq: u32,
    buffer: Vec<u8>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    /// For links, addresses, routes and neighbours of the calling thread's namespace.
    pub(crate) fn route() -> io::Result<Self> {
        // NETLINK_ROUTE is protocol 0, which rustix writes as None.
        Self::open(None)
    }

    /// For nftables and connection tracking of the calling thread's namespace.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(Some(netlink::NETFILTER))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        set_socket_timeout(&fd, Timeout::Recv, Some(ANSWER_DEADLINE))?;
        Ok(Self {
            fd,
            seq: 0,
            buffer: Vec::new(),
        })
    }

    /// Sends one request and waits for the kernel's yes or no.
    pub(crate) fn call(&mut self, request: &Request) -> io::Result<()> {
        self.call_all(std::slice::from_ref(request), 0)
    }

    /// Sends several requests in one datagram. With an acknowledgement asked of the one at
    /// `acked` only, for in an nfnetlink transaction the end marker gives none; failures are
    /// reported for each. The first failure is the result.
    pub(crate) fn call_all(&mut self, requests: &[Request], acked: usize) -> io::Result<()> {
        let first = self.seq.wrapping_add(1);
        let mut out = Vec::with_capacity(4096);
        for (at, request) in requests.iter().enumerate() {
            self.seq = self.seq.wrapping_add(1);
            request.encode(self.seq, if at == acked { WANTS_ACK } else { 0 }, &mut out);
        }
        self.send(&out)?;
        let mut failure = None;
        loop {
            let mut last_seen = false;
            self.receive(|seq, kind, body| {
                if kind != ANSWER_ERROR || seq.wrapping_sub(first) as usize >= requests.len() {
                    return;
                }
                let code = error_code(body);
                let at = seq.wrapping_sub(first) as usize;
                if code != 0 && failure.is_none() {
                    failure = Some(code);
                }
                // A transaction whose begin marker is refused is not looked at any further.
                last_seen |= at == acked || (at == 0 && code != 0);
            })?;
            if last_seen {
                return match failure {
                    Some(code) => Err(io::Error::from_raw_os_error(code)),
                    None => Ok(()),
                };
            }
        }
    }

    /// Sends a request whose answer is data, one message or many.
    pub(crate) fn query(
        &mut self,
        request: &Request,
        mut each: impl FnMut(Answer<'_>),
    ) -> io::Result<()> {
        self.seq = self.seq.wrapping_add(1);
        let ours = self.seq;
        let dump = request.flags & ROOT_MATCH_DUMP == ROOT_MATCH_DUMP;
        let mut out = Vec::new();
        request.encode(ours, if dump { 0 } else { WANTS_ACK }, &mut out);
        self.send(&out)?;
        loop {
            let mut end = None;
            self.receive(|seq, kind, body| {
                if seq != ours {
                    return;
                }
                match kind {
                    ANSWER_ERROR => end = Some(error_code(body)),
                    ANSWER_DONE => end = Some(0),
                    kind => each(Answer { kind, body }),
                }
            })?;
            match end {
                Some(0) => return Ok(()),
                Some(code) => return Err(io::Error::from_raw_os_error(code)),
                None => {}
            }
        }
    }

    fn send(&self, out: &[u8]) -> io::Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        let sent = rustix::net::sendto(&self.fd, out, SendFlags::empty(), &kernel)?;
        if sent != out.len() {
            return Err(io::Error::from(io::ErrorKind::WriteZero));
        }
        Ok(())
    }

    /// Receives one datagram and hands over each message in it: sequence number, kind, body.
    fn receive(&mut self, mut each: impl FnMut(u32, u16, &[u8])) -> io::Result<()> {
        self.buffer.resize(RECEIVE_BUFFER, 0);
        let len = loop {
            match rustix::net::recv(&self.fd, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((len, _)) => break len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(io::Error::from(io::ErrorKind::TimedOut)),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut rest = &self.buffer[..len];
        while let Some(header) = rest.first_chunk::<HEADER_LEN>() {
            let [a, b, c, d, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
            let len = u32::from_ne_bytes([a, b, c, d]) as usize;
            let kind = u16::from_ne_bytes([k0, k1]);
            let seq = u32::from_ne_bytes([s0, s1, s2, s3]);
            let Some(body) = rest.get(HEADER_LEN..len) else {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            };
            each(seq, kind, body);
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        // 64 KiB per slot would be most of what a slot costs.
        self.buffer = Vec::new();
        Ok(())
    }
}

/// The positive error number in an NLMSG_ERROR; 0 is an acknowledgement.
fn error_code(body: &[u8]) -> i32 {
    body.first_chunk::<4>()
        .map_or(0, |bytes| i32::from_ne_bytes(*bytes).wrapping_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let mut attrs = Attrs::default();
        attrs.text(1, "ab").nest(2, |inner| {
            inner.network(3, 0x0102_0304);
        });
        assert_eq!(
            attrs.0,
            [
                7, 0, 1, 0, b'a', b'b', 0, 0, 12, 0, 2, 0x80, 8, 0, 3, 0, 1, 2, 3, 4
            ]
        );
        let read: Vec<_> = attributes(&attrs.0, 0).collect();
        assert_eq!(read[0], (1, &b"ab\0"[..]));
        assert_eq!(read[1].0, 2);
    }

    #[test]
    fn damaged_attributes_end_the_list() {
        assert_eq!(attributes(&[200, 0, 1, 0, 1], 0).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0], 0).count(), 0);
        assert_eq!(attributes(&[], 16).count(), 0);
    }

    #[test]
    fn the_kernel_answers() {
        let mut socket = Socket::route().unwrap();
        // RTM_GETLINK, everything: at least the loopback device.
        let mut links = 0;
        socket
            .query(&Request::new(18, ROOT_MATCH_DUMP, &[0; 16]), |_| links += 1)
            .unwrap();
        assert!(links >= 1);
        // RTM_DELLINK of an interface that cannot exist.
        let mut fixed = [0_u8; 16];
        fixed[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let error = socket.call(&Request::new(17, 0, &fixed)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NODEV.raw_os_error()));
    }
}
