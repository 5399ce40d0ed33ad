//! Links, addresses, routes and neighbours: the requests of rtnetlink(7) that a slot needs.
//! Numbers are those of `linux/rtnetlink.h`, `if_link.h`, `if_addr.h` and `neighbour.h`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::config::Ipv4Net;
use crate::netlink::{Attrs, CREATE, EXCLUSIVE, ROOT_MATCH_DUMP, Request, Socket, attributes};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;

const AF_INET: u8 = 2;
const AF_INET6: u16 = 10;
const IFF_UP: u32 = 1;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_NONE: u8 = 1;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_CARRIER: u16 = 33;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const TYPE_UNICAST: u8 = 1;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
/// `struct ifaddrmsg`.
const IFADDRMSG: usize = 8;
/// `struct rtmsg`.
const RTMSG: usize = 12;

fn ifinfomsg(index: u32, flags: u32, change: u32) -> [u8; IFINFOMSG] {
    let mut fixed = [0; IFINFOMSG];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&change.to_ne_bytes());
    fixed
}

/// A link: its name and index.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) index: u32,
}

/// An IPv4 route: where to, and through which link, 0 if through none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) to: Ipv4Net,
    pub(crate) link: u32,
}

/// Makes a veth pair, both ends down: `inside` in the socket's namespace, `outside` in `other`.
/// One queue each: the kernel's default is one per possible CPU, memory that idles.
pub(crate) fn make_veth(
    socket: &mut Socket,
    inside: &str,
    outside: &str,
    other: BorrowedFd<'_>,
) -> io::Result<()> {
    let single_queue = |attrs: &mut Attrs| {
        attrs
            .native(IFLA_NUM_TX_QUEUES, 1)
            .native(IFLA_NUM_RX_QUEUES, 1);
    };
    let request =
        Request::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &ifinfomsg(0, 0, 0)).attrs(|attrs| {
            attrs.text(IFLA_IFNAME, inside);
            single_queue(attrs);
            attrs.nest(IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_KIND, "veth")
                    .nest(IFLA_INFO_DATA, |data| {
                        data.nest(VETH_INFO_PEER, |peer| {
                            peer.raw(&ifinfomsg(0, 0, 0)).text(IFLA_IFNAME, outside);
                            single_queue(peer);
                            peer.bytes(IFLA_NET_NS_FD, &other.as_raw_fd().to_ne_bytes());
                        });
                    });
            });
        });
    socket.call(&request)
}

/// Gives a link a MAC address.
pub(crate) fn set_mac(socket: &mut Socket, link: u32, mac: [u8; 6]) -> io::Result<()> {
    let request = Request::new(RTM_SETLINK, 0, &ifinfomsg(link, 0, 0)).attrs(|attrs| {
        attrs.bytes(IFLA_ADDRESS, &mac);
    });
    socket.call(&request)
}

/// Keeps the kernel from giving a link an IPv6 address of its own when it comes up.
pub(crate) fn no_ipv6_address(socket: &mut Socket, link: u32) -> io::Result<()> {
    let request = Request::new(RTM_SETLINK, 0, &ifinfomsg(link, 0, 0)).attrs(|attrs| {
        attrs.nest(IFLA_AF_SPEC, |families| {
            families.nest(AF_INET6, |inet6| {
                inet6.bytes(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_NONE]);
            });
        });
    });
    match socket.call(&request) {
        // A host without IPv6 has nothing to keep.
        Err(error)
            if error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error()) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Brings a link up.
pub(crate) fn bring_up(socket: &mut Socket, link: u32) -> io::Result<()> {
    socket.call(&Request::new(
        RTM_SETLINK,
        0,
        &ifinfomsg(link, IFF_UP, IFF_UP),
    ))
}

/// Deletes a link, and with it its peer.
pub(crate) fn delete(socket: &mut Socket, link: u32) -> io::Result<()> {
    socket.call(&Request::new(RTM_DELLINK, 0, &ifinfomsg(link, 0, 0)))
}

/// Adds an address to a link.
pub(crate) fn add_addr(
    socket: &mut Socket,
    link: u32,
    addr: Ipv4Addr,
    prefix_len: u8,
) -> io::Result<()> {
    let mut ifaddrmsg = [0; IFADDRMSG];
    ifaddrmsg[0] = AF_INET;
    ifaddrmsg[1] = prefix_len;
    ifaddrmsg[4..8].copy_from_slice(&link.to_ne_bytes());
    let request = Request::new(RTM_NEWADDR, CREATE | EXCLUSIVE, &ifaddrmsg).attrs(|attrs| {
        attrs
            .bytes(IFA_LOCAL, &addr.octets())
            .bytes(IFA_ADDRESS, &addr.octets());
    });
    socket.call(&request)
}

/// Sends everything without a better route to `gateway` on `link`.
pub(crate) fn add_default_route(
    socket: &mut Socket,
    link: u32,
    gateway: Ipv4Addr,
) -> io::Result<()> {
    let mut rtmsg = [0; RTMSG];
    rtmsg[0] = AF_INET;
    rtmsg[4] = TABLE_MAIN;
    rtmsg[5] = PROTOCOL_STATIC;
    rtmsg[7] = TYPE_UNICAST;
    let request = Request::new(RTM_NEWROUTE, CREATE | EXCLUSIVE, &rtmsg).attrs(|attrs| {
        attrs
            .native(RTA_OIF, link)
            .bytes(RTA_GATEWAY, &gateway.octets());
    });
    socket.call(&request)
}

/// Fixes the MAC address of a neighbour, so that nobody can claim its address by ARP.
pub(crate) fn add_neighbour(
    socket: &mut Socket,
    link: u32,
    addr: Ipv4Addr,
    mac: [u8; 6],
) -> io::Result<()> {
    let mut ndmsg = [0; 12];
    ndmsg[0] = AF_INET;
    ndmsg[4..8].copy_from_slice(&link.to_ne_bytes());
    ndmsg[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    let request = Request::new(RTM_NEWNEIGH, CREATE | EXCLUSIVE, &ndmsg).attrs(|attrs| {
        attrs.bytes(NDA_DST, &addr.octets()).bytes(NDA_LLADDR, &mac);
    });
    socket.call(&request)
}

/// All links of the socket's namespace.
pub(crate) fn links(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let mut found = Vec::new();
    let request = Request::new(RTM_GETLINK, ROOT_MATCH_DUMP, &ifinfomsg(0, 0, 0));
    socket.query(&request, |answer| {
        if let (RTM_NEWLINK, Some(index)) = (answer.kind, number_at(answer.body, 4))
            && let Some(name) = text_attr(answer.body, IFLA_IFNAME)
        {
            found.push(Link { name, index });
        }
    })?;
    Ok(found)
}

/// The index of a link by its name.
pub(crate) fn link_index(socket: &Socket, name: &str) -> io::Result<u32> {
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

/// Whether a tap has an open queue; the kernel shows that as carrier.
pub(crate) fn has_carrier(socket: &mut Socket, link: u32) -> io::Result<bool> {
    let mut carrier = false;
    socket.query(
        &Request::new(RTM_GETLINK, 0, &ifinfomsg(link, 0, 0)),
        |answer| {
            carrier = attributes(answer.body, IFINFOMSG)
                .any(|(kind, data)| kind == IFLA_CARRIER && data == [1]);
        },
    )?;
    Ok(carrier)
}

/// All IPv4 addresses of the socket's namespace.
pub(crate) fn addrs(socket: &mut Socket) -> io::Result<Vec<Ipv4Addr>> {
    let mut ifaddrmsg = [0; IFADDRMSG];
    ifaddrmsg[0] = AF_INET;
    let mut found = Vec::new();
    let request = Request::new(RTM_GETADDR, ROOT_MATCH_DUMP, &ifaddrmsg);
    socket.query(&request, |answer| {
        let own = attributes(answer.body, IFADDRMSG).find(|(kind, _)| *kind == IFA_LOCAL);
        if let (RTM_NEWADDR, Some((_, data))) = (answer.kind, own)
            && let Ok(octets) = <[u8; 4]>::try_from(data)
        {
            found.push(Ipv4Addr::from(octets));
        }
    })?;
    Ok(found)
}

/// All IPv4 routes of the socket's namespace, of all tables.
pub(crate) fn routes(socket: &mut Socket) -> io::Result<Vec<Route>> {
    let mut rtmsg = [0; RTMSG];
    rtmsg[0] = AF_INET;
    let mut found = Vec::new();
    socket.query(
        &Request::new(RTM_GETROUTE, ROOT_MATCH_DUMP, &rtmsg),
        |answer| {
            let len = answer.body.get(1).copied().unwrap_or_default();
            let mut to = Ipv4Addr::UNSPECIFIED;
            let mut link = 0;
            for (kind, data) in attributes(answer.body, RTMSG) {
                match (kind, <[u8; 4]>::try_from(data)) {
                    (RTA_DST, Ok(octets)) => to = Ipv4Addr::from(octets),
                    (RTA_OIF, Ok(number)) => link = u32::from_ne_bytes(number),
                    _ => {}
                }
            }
            if let (RTM_NEWROUTE, Some(to)) = (answer.kind, Ipv4Net::new(to, len)) {
                found.push(Route { to, link });
            }
        },
    )?;
    Ok(found)
}

fn number_at(body: &[u8], at: usize) -> Option<u32> {
    body.get(at..)?
        .first_chunk::<4>()
        .map(|bytes| u32::from_ne_bytes(*bytes))
}

fn text_attr(body: &[u8], wanted: u16) -> Option<String> {
    let (_, data) = attributes(body, IFINFOMSG).find(|(kind, _)| *kind == wanted)?;
    let text = data.strip_suffix(&[0]).unwrap_or(data);
    String::from_utf8(text.to_vec()).ok()
}
