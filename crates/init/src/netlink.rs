//! The few rtnetlink requests that a guest needs (rtnetlink(7)), without a library: bytes
//! out, one acknowledgement back.

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::fmt;
use std::net::Ipv4Addr;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_GATEWAY: u16 = 5;
const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RTN_UNICAST: u8 = 1;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// A request that failed.
#[derive(Debug)]
pub struct NetlinkError {
    what: String,
    error: Errno,
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.what, self.error)
    }
}

/// A socket to the kernel's routing tables.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 of this family is NETLINK_ROUTE.
            None,
        )
        .map_err(|error| NetlinkError {
            what: "open a netlink socket".into(),
            error,
        })?;
        Ok(Netlink {
            socket,
            sequence: 0,
        })
    }

    /// Sets the interface up.
    pub fn link_up(&mut self, name: &str) -> Result<(), NetlinkError> {
        let body = |index| link_up_body(index);
        self.on_link(name, format!("set {name} up"), RTM_NEWLINK, 0, body)
    }

    /// Gives the interface an address, and with it the route to that network.
    pub fn add_address(
        &mut self,
        name: &str,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<(), NetlinkError> {
        let what = format!("give {name} the address {address}/{prefix}");
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        self.on_link(name, what, RTM_NEWADDR, flags, |index| {
            address_body(index, address, prefix)
        })
    }

    /// Sends everything without a closer route to `gateway`.
    pub fn add_default_route(&mut self, gateway: Ipv4Addr) -> Result<(), NetlinkError> {
        let what = format!("set the default route to {gateway}");
        let body = default_route_body(gateway);
        self.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body)
            .map_err(|error| NetlinkError { what, error })
    }

    fn on_link(
        &mut self,
        name: &str,
        what: String,
        kind: u16,
        flags: u16,
        body: impl FnOnce(u32) -> Vec<u8>,
    ) -> Result<(), NetlinkError> {
        rustix::net::netdevice::name_to_index(&self.socket, name)
            .and_then(|index| self.request(kind, flags, &body(index)))
            .map_err(|error| NetlinkError { what, error })
    }

    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
        self.sequence += 1;
        let message = message(kind, flags | NLM_F_REQUEST | NLM_F_ACK, self.sequence, body);
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.socket, &message, SendFlags::empty(), &kernel)?;
        let mut reply = [0u8; 4096];
        let (_, length) = rustix::net::recv(&self.socket, &mut reply[..], RecvFlags::empty())?;
        acknowledged(reply.get(..length).unwrap_or_default())
    }
}

/// A whole netlink message.
fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend(body);
    out
}

/// `struct ifinfomsg` that changes only the "up" flag.
fn link_up_body(index: u32) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 0];
    out.extend(index.to_ne_bytes());
    out.extend(IFF_UP.to_ne_bytes());
    out.extend(IFF_UP.to_ne_bytes());
    out
}

/// `struct ifaddrmsg` with the address as attribute.
fn address_body(index: u32, address: Ipv4Addr, prefix: u8) -> Vec<u8> {
    let mut out = vec![AF_INET, prefix, 0, RT_SCOPE_UNIVERSE];
    out.extend(index.to_ne_bytes());
    attribute(&mut out, IFA_LOCAL, address);
    attribute(&mut out, IFA_ADDRESS, address);
    out
}

/// `struct rtmsg` for 0.0.0.0/0 with the gateway as attribute.
fn default_route_body(gateway: Ipv4Addr) -> Vec<u8> {
    let mut out = vec![
        AF_INET,
        0,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_BOOT,
        RT_SCOPE_UNIVERSE,
        RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    attribute(&mut out, RTA_GATEWAY, gateway);
    out
}

fn attribute(out: &mut Vec<u8>, kind: u16, address: Ipv4Addr) {
    out.extend(8u16.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(address.octets());
}

/// Reads the kernel's answer to a request that asked for an acknowledgement.
fn acknowledged(reply: &[u8]) -> Result<(), Errno> {
    let kind = reply
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    let code = reply
        .get(HEADER..HEADER + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw_os_error(
            code.saturating_neg().clamp(1, 4095),
        )),
        _ => Err(Errno::BADMSG),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_states_its_own_length() {
        let body = address_body(2, Ipv4Addr::new(169, 254, 0, 21), 30);
        let sent = message(RTM_NEWADDR, NLM_F_REQUEST, 1, &body);
        assert_eq!(sent.len(), 16 + 8 + 8 + 8);
        assert_eq!(sent[..4], (sent.len() as u32).to_ne_bytes());
    }

    #[test]
    fn the_kernels_refusal_becomes_its_error_number() {
        let refusal = message(NLMSG_ERROR, 0, 1, &(-19i32).to_ne_bytes());
        assert_eq!(acknowledged(&refusal), Err(Errno::NODEV));
        assert_eq!(
            acknowledged(&message(NLMSG_ERROR, 0, 1, &0i32.to_ne_bytes())),
            Ok(())
        );
    }

    /// The real kernel reads our bytes: `lo` is up already wherever tests run, so setting it
    /// up changes nothing, and an interface that does not exist is refused.
    #[test]
    fn the_kernel_understands_the_requests() {
        let mut netlink = Netlink::open().unwrap();
        netlink.link_up("lo").unwrap();
        let told = netlink.link_up("nonesuch0").unwrap_err().to_string();
        assert!(told.starts_with("cannot set nonesuch0 up: "), "{told}");
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(reply in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = acknowledged(&reply);
        }
    }
}
