//! What the pool sets up once on the host: forwarding, the nftables table, and the claim that
//! nobody else manages slots of the same name.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::config::{Ipv4Net, NetConfig};
use crate::error::{LOAD_RULES, NetError};
use crate::netlink::Socket;
use crate::{policy, route};

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// The host's part of the pool.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) forwarded_before: bool,
    /// An abstract socket that only one process can be bound to: gone with the process,
    /// however that ends.
    claim: Mutex<Option<OwnedFd>>,
}

impl Host {
    pub(crate) fn set_up(config: &NetConfig) -> Result<Self, NetError> {
        let uid = rustix::process::geteuid();
        if !uid.is_root() {
            return Err(NetError::NotRoot { uid: uid.as_raw() });
        }
        let claim = claim(&config.name_prefix)?;
        check_subnet(config)?;
        let forwarded_before = forward(config)?;
        let step = |error| {
            NetError::step(
                LOAD_RULES,
                format!("table inet {}", config.name_prefix),
                error,
            )
        };
        let mut netfilter = Socket::netfilter().map_err(step)?;
        policy::host_table(config)
            .commit(&mut netfilter)
            .map_err(step)?;
        Ok(Self {
            forwarded_before,
            claim: Mutex::new(Some(claim)),
        })
    }

    /// Lets another process manage slots of this name.
    pub(crate) fn release(&self) {
        self.claim
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Removes the nftables table. Forwarding stays on: by now others may count on it.
    pub(crate) fn tear_down(&self, config: &NetConfig) -> Result<(), NetError> {
        let mut netfilter = Socket::netfilter()
            .map_err(|e| NetError::step("open a netfilter socket", "host", e))?;
        let mut batch = crate::nft::Batch::new(&config.name_prefix);
        batch.delete_table();
        batch.commit(&mut netfilter).map_err(|e| {
            NetError::step(
                "delete the host's nftables table",
                config.name_prefix.clone(),
                e,
            )
        })
    }
}

fn claim(prefix: &str) -> Result<OwnedFd, NetError> {
    let name = format!("wrenn-net/{prefix}");
    let bound =
        SocketAddr::from_abstract_name(&name).and_then(|addr| UnixListener::bind_addr(&addr));
    match bound {
        Ok(listener) => Ok(listener.into()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(NetError::InUse {
            prefix: prefix.to_owned(),
        }),
        Err(error) => Err(NetError::step("claim the name of the slots", name, error)),
    }
}

/// A route of the host into the slots' subnet would be hidden by them, or hide them.
fn check_subnet(config: &NetConfig) -> Result<(), NetError> {
    let step = |error| NetError::step("list the host's routes", "rtnetlink", error);
    let mut socket = Socket::route().map_err(step)?;
    let links = route::links(&mut socket).map_err(step)?;
    let name_of = |index: u32| {
        links
            .iter()
            .find(|link| link.index == index)
            .map(|link| link.name.as_str())
    };
    let foreign: Vec<_> = route::routes(&mut socket)
        .map_err(step)?
        .into_iter()
        // The default route is for what has no better one.
        .filter(|route| route.to.prefix_len() > 0)
        .filter(|route| name_of(route.link).is_none_or(|name| config.index_in(name).is_none()))
        .collect();
    let clash_of = |subnet: Ipv4Net| foreign.iter().find(move |route| route.to.overlaps(subnet));
    let Some(clash) = clash_of(config.subnet) else {
        return Ok(());
    };
    Err(NetError::SubnetClash {
        subnet: config.subnet,
        route: clash.to,
        device: name_of(clash.link).unwrap_or("none").to_owned(),
        suggestion: policy::subnet_candidates()
            .find(|candidate| clash_of(*candidate).is_none())
            .unwrap_or(Ipv4Net::fixed(198, 18, 0, 0, 15)),
    })
}

fn forwarding_note(config: &NetConfig) -> PathBuf {
    config.state_dir.join("net").join("ip_forward.before")
}

/// Turns IPv4 forwarding on. Returns, and notes on disk, how it was before the pool first did.
fn forward(config: &NetConfig) -> Result<bool, NetError> {
    let note = forwarding_note(config);
    let now = fs::read_to_string(IP_FORWARD)
        .map_err(|e| NetError::step("read the host's forwarding setting", IP_FORWARD, e))?;
    let before = match fs::read_to_string(&note) {
        Ok(before) => before,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(folder) = note.parent() {
                fs::create_dir_all(folder).map_err(|e| {
                    NetError::step("make the folder", folder.display().to_string(), e)
                })?;
            }
            fs::write(&note, &now).map_err(|e| {
                NetError::step("note the forwarding setting", note.display().to_string(), e)
            })?;
            now.clone()
        }
        Err(error) => {
            return Err(NetError::step(
                "read the note",
                note.display().to_string(),
                error,
            ));
        }
    };
    if now.trim() != "1" {
        fs::write(IP_FORWARD, "1")
            .map_err(|e| NetError::step("turn the host's IPv4 forwarding on", IP_FORWARD, e))?;
        tracing::info!(
            "IPv4 forwarding was off on this host and is on now: guests' packets need it"
        );
    }
    Ok(before.trim() == "1")
}
