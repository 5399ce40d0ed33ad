//! Making, recycling and removing the kernel objects of one slot.
//!
//! All functions block, for 10 to 50 ms when links come and go; they run on threads of their
//! own. Nothing about a slot is written down elsewhere: its name and index are in the kernel.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::config::{
    GATEWAY_ADDR, GATEWAY_MAC, GUEST_ADDR, GUEST_MAC, GUEST_PREFIX_LEN, NetConfig,
};
use crate::denials::{self, Denial};
use crate::egress::NetworkPolicy;
use crate::error::{FLUSH_CONNTRACK, LOAD_RULES, MAKE_VETH, NetError, OPEN_TAP};
use crate::netlink::Socket;
use crate::netns::{self, Namespace};
use crate::notice::{self, Notice};
use crate::policy::{self, DNS_PORT, OPENINGS_PORT, OUT, REFUSAL_KEPT, TAP};
use crate::{nft, refused, route, sys};

/// How long a tap may stay open after its slot was given back: the time a killed QEMU needs
/// to be gone.
const TAP_CLOSES_WITHIN: Duration = Duration::from_secs(2);

/// The kernel objects of one slot.
#[derive(Debug)]
pub(crate) struct Plumbing {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) outside: Ipv4Addr,
    pub(crate) namespace: Arc<Namespace>,
    /// Sockets of the slot's namespace; through them it is changed without entering it.
    sockets: Mutex<Sockets>,
    /// Where the relay reads what is in force.
    notice: PathBuf,
    /// Where the relay notes the names that it refuses.
    refused: PathBuf,
}

#[derive(Debug)]
struct Sockets {
    netfilter: Socket,
    route: Socket,
    tap: u32,
    /// `None` if nobody knows: an agent died while it changed the policy.
    in_force: Option<Notice>,
}

/// Settings of a slot's namespace: file under `/proc/sys/net`, value.
const SETTINGS: [(&str, &str); 14] = [
    ("ipv4/ip_forward", "1"),
    // Refusals are the product's own answers, and few enough: no limit per peer.
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    // Answer ARP only for the address of the link that was asked.
    ("ipv4/conf/all/arp_ignore", "1"),
    ("ipv6/conf/all/disable_ipv6", "1"),
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("ipv6/conf/all/forwarding", "0"),
    // Packets in the middle of an unknown connection are invalid, not new: that tells a
    // recycled slot's old flows from the next tenant's.
    ("netfilter/nf_conntrack_tcp_loose", "0"),
    // But sequence numbers out of window are no reason to refuse.
    ("netfilter/nf_conntrack_tcp_be_liberal", "1"),
    // A guest that pauses for long comes back in another slot anyway.
    ("netfilter/nf_conntrack_tcp_timeout_established", "86400"),
];

fn apply_settings() -> Result<(), NetError> {
    for (file, value) in SETTINGS {
        let path = format!("/proc/sys/net/{file}");
        match fs::write(&path, value) {
            // A kernel without IPv6 has nothing to turn off.
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.starts_with("ipv6/") => {}
            Err(error) => {
                return Err(NetError::step(
                    "set the namespace's kernel setting",
                    path,
                    error,
                ));
            }
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Makes a slot. To be called on a thread of its own: afterwards it is in the slot's namespace.
pub(crate) fn make(config: &NetConfig, index: u32) -> Result<Plumbing, NetError> {
    let name = config.slot_name(index);
    let step = |step, error| NetError::step(step, name.clone(), error);
    let host = netns::of_this_thread().map_err(|e| step("open the host's namespace", e))?;
    let mut host_route = Socket::route().map_err(|e| step("open a netlink socket", e))?;
    let namespace =
        Namespace::create_and_enter(&name).map_err(|e| step("make the network namespace", e))?;
    let made = fill(config, index, &name, &host, &mut host_route);
    match made {
        Ok(sockets) => Ok(Plumbing {
            index,
            outside: config.slot_addrs(index).1,
            namespace: Arc::new(namespace),
            sockets: Mutex::new(sockets),
            notice: notice::path_of(config, &name),
            refused: refused::path_of(config, &name),
            name,
        }),
        Err(error) => {
            if let Err(undo) = unmake(config, &mut host_route, &name) {
                tracing::warn!(slot = name, error = %undo, "a half-made slot stays until the next sweep");
            }
            Err(error)
        }
    }
}

fn fill(
    config: &NetConfig,
    index: u32,
    name: &str,
    host: &OwnedFd,
    host_route: &mut Socket,
) -> Result<Sockets, NetError> {
    let step = |step, error| NetError::step(step, name.to_owned(), error);
    let (host_addr, slot_addr) = config.slot_addrs(index);
    let mut route = Socket::route().map_err(|e| step("open a netlink socket", e))?;
    let mut netfilter =
        Socket::netfilter().map_err(|e| step("open a netfilter socket (CONFIG_NF_TABLES)", e))?;

    // Rules first: at no moment is there a link without them. They also load connection
    // tracking, whose settings would not be there otherwise.
    let policy = NetworkPolicy::of_fresh_slot(config);
    let generation = new_generation().map_err(|e| step("number the policy", e))?;
    policy::slot_table(config, &policy, generation)
        .commit(&mut netfilter)
        .map_err(|e| step(LOAD_RULES, e))?;
    let notice = Notice::new(config, policy, generation);
    notice::write(&notice::path_of(config, name), &notice).map_err(|e| step(WRITE_NOTICE, e))?;
    apply_settings()?;

    let tap = sys::open_tap(TAP).map_err(|e| step(OPEN_TAP, e))?;
    sys::keep_tap(&tap).map_err(|e| step("keep the tap device", e))?;
    drop(tap);
    let tap = route::link_index(&route, TAP).map_err(|e| step("find the tap device", e))?;
    route::set_mac(&mut route, tap, GATEWAY_MAC).map_err(|e| step("set the tap's MAC", e))?;
    route::add_addr(&mut route, tap, GATEWAY_ADDR, GUEST_PREFIX_LEN)
        .map_err(|e| step("set the tap's address", e))?;
    route::bring_up(&mut route, tap).map_err(|e| step("bring the tap up", e))?;
    route::add_neighbour(&mut route, tap, GUEST_ADDR, GUEST_MAC)
        .map_err(|e| step("fix the guest's MAC address", e))?;

    route::make_veth(&mut route, OUT, name, host.as_fd()).map_err(|e| step(MAKE_VETH, e))?;
    let outside = route::link_index(host_route, name).map_err(|e| step("find the veth link", e))?;
    route::no_ipv6_address(host_route, outside).map_err(|e| step("turn IPv6 addresses off", e))?;
    route::add_addr(host_route, outside, host_addr, 31)
        .map_err(|e| step("set the address of the slot's link on the host", e))?;
    route::bring_up(host_route, outside).map_err(|e| step("bring the host's link up", e))?;
    let inside = route::link_index(&route, OUT).map_err(|e| step("find the veth link", e))?;
    route::add_addr(&mut route, inside, slot_addr, 31)
        .map_err(|e| step("set the slot's address", e))?;
    route::bring_up(&mut route, inside).map_err(|e| step("bring the slot's link up", e))?;
    route::add_default_route(&mut route, inside, host_addr)
        .map_err(|e| step("set the slot's default route", e))?;
    Ok(Sockets {
        netfilter,
        route,
        tap,
        in_force: Some(notice),
    })
}

/// Opens the slot of a living machine that an earlier agent made. To be called on a thread of
/// its own: afterwards it is in the slot's namespace.
pub(crate) fn open(config: &NetConfig, index: u32) -> Result<Plumbing, NetError> {
    let name = config.slot_name(index);
    let step = |step, error| NetError::step(step, name.clone(), error);
    let namespace = Namespace::open(&name).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NetError::NoSuchSlot {
            index,
            namespace: netns::path_of(&name).display().to_string(),
        },
        _ => step("open the slot's namespace", error),
    })?;
    rustix::thread::move_into_link_name_space(
        namespace.as_fd(),
        Some(rustix::thread::LinkNameSpaceType::Network),
    )
    .map_err(|e| step("enter the slot's namespace", e.into()))?;
    let route = Socket::route().map_err(|e| step("open a netlink socket", e))?;
    let netfilter = Socket::netfilter().map_err(|e| step("open a netfilter socket", e))?;
    let tap = route::link_index(&route, TAP).map_err(|e| step("find the slot's tap device", e))?;
    let notice = notice::path_of(config, &name);
    Ok(Plumbing {
        index,
        outside: config.slot_addrs(index).1,
        namespace: Arc::new(namespace),
        sockets: Mutex::new(Sockets {
            netfilter,
            route,
            tap,
            in_force: notice::read(&notice),
        }),
        notice,
        refused: refused::path_of(config, &name),
        name,
    })
}

const FORGET_REFUSALS: &str = "forget what was refused to the last guest";
const WRITE_NOTICE: &str = "note the slot's policy for its resolver relay";

/// What a policy is known by in the firewall and to the relay, and those after it that close no
/// name: random, so that it is no other agent's either.
fn new_generation() -> io::Result<u32> {
    Ok(u32::from_ne_bytes(sys::random()?))
}

/// Binds the resolver's sockets in the calling thread's namespace: UDP, TCP, and the one from
/// which addresses are opened.
pub(crate) fn bind_dns() -> io::Result<(UdpSocket, TcpListener, UdpSocket)> {
    let addr = IpAddr::V4(GATEWAY_ADDR);
    Ok((
        UdpSocket::bind((addr, DNS_PORT))?,
        TcpListener::bind((addr, DNS_PORT))?,
        UdpSocket::bind((addr, OPENINGS_PORT))?,
    ))
}

impl NetworkPolicy {
    /// That of a slot nobody has taken yet.
    pub(crate) fn of_fresh_slot(config: &NetConfig) -> Self {
        Self {
            internet: config.internet,
            ..Self::default()
        }
    }
}

impl Plumbing {
    /// The notice, opened for the relay.
    pub(crate) fn open_notice(&self) -> io::Result<fs::File> {
        fs::File::open(&self.notice)
    }

    /// A new file for the names that a new relay refuses.
    pub(crate) fn make_refused(&self) -> io::Result<fs::File> {
        refused::make(&self.refused)
    }

    /// Puts a policy in force.
    pub(crate) fn set_policy(
        &self,
        config: &NetConfig,
        policy: &NetworkPolicy,
    ) -> Result<(), NetError> {
        let step = |step, error| NetError::step(step, self.name.clone(), error);
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        // What was opened by a name stays open if that name may still be reached.
        let stays_open = |before: &&Notice| {
            let now = &policy.allow_names;
            let mut names = before.policy.allow_names.iter();
            names.all(|name| now.contains(name))
        };
        let before = sockets.in_force.as_ref();
        if before.is_some_and(|before| before.policy == *policy) {
            return Ok(());
        }
        let kept = before.filter(stays_open).map(|before| before.generation);
        let generation = match kept {
            Some(generation) => generation,
            None => new_generation().map_err(|e| step("number the policy", e))?,
        };
        let changed = policy::slot_change(config, policy, generation, kept.is_none())
            .commit(&mut sockets.netfilter);
        match changed {
            // A table of an earlier version of this program, without the sets.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                policy::slot_table(config, policy, generation)
                    .commit(&mut sockets.netfilter)
                    .map_err(|e| step(LOAD_RULES, e))?;
            }
            changed => {
                changed.map_err(|e| step("change the slot's firewall rules", e))?;
            }
        }
        // Until the notice is written too nobody can say what is in force.
        sockets.in_force = None;
        let notice = Notice::new(config, policy.clone(), generation);
        notice::write(&self.notice, &notice).map_err(|e| step(WRITE_NOTICE, e))?;
        sockets.in_force = Some(notice);
        Ok(())
    }

    /// What was refused to the guest, by the slot's table, the host's, and its resolver. To be
    /// called in the host's namespace.
    pub(crate) fn denials(&self, config: &NetConfig) -> Result<Vec<Denial>, NetError> {
        let step = |error| NetError::step("list what was refused", self.name.clone(), error);
        let table = &config.name_prefix;
        let mut found = {
            let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
            denials::of_slot(&mut sockets.netfilter, table).map_err(step)?
        };
        let mut host = Socket::netfilter().map_err(step)?;
        found.extend(denials::of_host(&mut host, table, self.outside).map_err(step)?);
        found.extend(refused::read(&self.refused, REFUSAL_KEPT).map_err(step)?);
        Ok(found)
    }

    /// Makes the slot as good as new: nobody on its tap, the policy as configured, every
    /// connection forgotten. An error means that it must not be used again.
    pub(crate) fn recycle(&self, config: &NetConfig) -> Result<(), NetError> {
        let step = |step, error| NetError::step(step, self.name.clone(), error);
        let deadline = Instant::now() + TAP_CLOSES_WITHIN;
        loop {
            let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
            let tap = sockets.tap;
            if !route::has_carrier(&mut sockets.route, tap)
                .map_err(|e| step("look at the tap", e))?
            {
                break;
            }
            drop(sockets);
            if Instant::now() >= deadline {
                return Err(step("wait until the tap is closed", Errno::BUSY.into()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.set_policy(config, &NetworkPolicy::of_fresh_slot(config))?;
        refused::remove(&self.refused).map_err(|e| step(FORGET_REFUSALS, e))?;
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        nft::flush_connections(&mut sockets.netfilter).map_err(|e| step(FLUSH_CONNTRACK, e))?;
        // After that nothing of the last tenant can be refused any more.
        policy::forget_refusals(config)
            .commit(&mut sockets.netfilter)
            .map_err(|e| step(FORGET_REFUSALS, e))?;
        Socket::netfilter()
            .and_then(|mut host| {
                denials::forget_of_host(&mut host, &config.name_prefix, self.outside)
            })
            .map_err(|e| step(FORGET_REFUSALS, e))
    }
}

/// Removes the kernel objects of the slot `name`, as far as they exist. The namespace itself
/// goes when its last descriptor is closed.
pub(crate) fn unmake(
    config: &NetConfig,
    host_route: &mut Socket,
    name: &str,
) -> Result<(), NetError> {
    let step = |step, error| NetError::step(step, name.to_owned(), error);
    let gone = |error: &io::Error| error.raw_os_error() == Some(Errno::NODEV.raw_os_error());
    match route::link_index(host_route, name) {
        Ok(link) => match route::delete(host_route, link) {
            Err(error) if !gone(&error) => return Err(step("delete the slot's link", error)),
            _ => {}
        },
        Err(error) if gone(&error) => {}
        Err(error) => return Err(step("find the slot's link", error)),
    }
    notice::remove(&notice::path_of(config, name))
        .map_err(|e| step("remove the note of the slot's policy", e))?;
    refused::remove(&refused::path_of(config, name)).map_err(|e| step(FORGET_REFUSALS, e))?;
    netns::remove(name).map_err(|e| step("remove the network namespace", e))
}

/// [`unmake`] with a socket of its own, from a thread in the host's namespace.
pub(crate) fn remove(config: &NetConfig, name: &str) -> Result<(), NetError> {
    let mut host_route =
        Socket::route().map_err(|e| NetError::step("open a netlink socket", name.to_owned(), e))?;
    unmake(config, &mut host_route, name)
}
