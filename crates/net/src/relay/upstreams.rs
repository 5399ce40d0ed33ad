//! Which resolvers the host uses.

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use crate::policy::DNS_PORT;

/// How long a list is used before the file is looked at again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// More are never asked, as in glibc (resolv.conf(5), MAXNS).
const MOST: usize = 3;

/// The resolvers to pass queries on to.
#[derive(Debug, Clone)]
pub struct Upstreams {
    file: Option<PathBuf>,
    addrs: Vec<SocketAddr>,
    seen: Option<(SystemTime, u64)>,
    looked: Option<Instant>,
}

impl Upstreams {
    /// Those of `/etc/resolv.conf`, read again when it changes.
    pub fn from_resolv_conf() -> Self {
        Self::from_file("/etc/resolv.conf")
    }

    /// Those of a file in the format of resolv.conf(5), read again when it changes.
    pub fn from_file(path: impl Into<PathBuf>) -> Self {
        Self {
            file: Some(path.into()),
            addrs: Vec::new(),
            seen: None,
            looked: None,
        }
    }

    /// These and no others.
    pub fn fixed(addrs: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            file: None,
            addrs: addrs.into_iter().collect(),
            seen: None,
            looked: None,
        }
    }

    /// The resolvers as of now, in order of preference.
    pub(super) fn current(&mut self) -> &[SocketAddr] {
        let Some(file) = &self.file else {
            return &self.addrs;
        };
        if self
            .looked
            .is_some_and(|at| at.elapsed() < LOOK_AGAIN_AFTER)
        {
            return &self.addrs;
        }
        self.looked = Some(Instant::now());
        let seen = fs::metadata(file)
            .and_then(|meta| Ok((meta.modified()?, meta.len())))
            .ok();
        if seen.is_none() || seen != self.seen {
            // A host without the file, or with one nobody can read, has no resolver.
            self.addrs = fs::read_to_string(file)
                .map(|text| parse(&text))
                .unwrap_or_default();
            self.seen = seen;
        }
        &self.addrs
    }
}

/// The `nameserver` lines.
fn parse(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next()? == "nameserver")
                .then(|| words.next())
                .flatten()
        })
        .filter_map(address)
        .take(MOST)
        .collect()
}

/// An address, with `%link` behind it if it is link-local IPv6.
fn address(text: &str) -> Option<SocketAddr> {
    let Some((addr, link)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse::<IpAddr>().ok()?, DNS_PORT));
    };
    let addr: Ipv6Addr = addr.parse().ok()?;
    let scope = link.parse().ok().or_else(|| {
        fs::read_to_string(format!("/sys/class/net/{link}/ifindex"))
            .ok()?
            .trim()
            .parse()
            .ok()
    })?;
    Some(SocketAddrV6::new(addr, DNS_PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_are_read() {
        let text = "# nameserver 9.9.9.9\nsearch a b\nnameserver 127.0.0.53\n nameserver\tfd00::1 # x\n\
                    nameserver\nnameserver nonsense\nnameserver fe80::1%lo\nnameserver 1.2.3.4\n";
        let read: Vec<String> = parse(text).iter().map(SocketAddr::to_string).collect();
        assert_eq!(read, ["127.0.0.53:53", "[fd00::1]:53", "[fe80::1%1]:53"]);
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        let mut upstreams = Upstreams::from_file(&file);
        assert!(upstreams.current().is_empty());
        fs::write(&file, "nameserver 127.0.0.1\n").unwrap();
        upstreams.looked = None;
        assert_eq!(upstreams.current().len(), 1);
        fs::write(&file, "").unwrap();
        assert_eq!(upstreams.current().len(), 1, "not looked at again yet");
        upstreams.looked = None;
        assert!(upstreams.current().is_empty());
    }
}
