//! Settings, and what follows from them: the name and the addresses of each slot.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::NetError;

/// The address of every guest.
pub const GUEST_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
/// The gateway and resolver of every guest: the tap in its slot's namespace.
pub const GATEWAY_ADDR: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
/// The length of the network prefix both share.
pub const GUEST_PREFIX_LEN: u8 = 30;
/// The MAC address of every guest's `eth0`.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 0x05];
/// The MAC address of every slot's tap. It is the same everywhere because a restored guest
/// still has the gateway of the slot its template was made in in its neighbour table.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xfc, 0, 0, 0, 0x06];

/// The longest interface name the kernel takes, in bytes (`IFNAMSIZ` less the final NUL).
const LONGEST_LINK_NAME: usize = 15;
/// The longest name prefix: with a dash and five digits it is a whole interface name.
const LONGEST_PREFIX: usize = LONGEST_LINK_NAME - 6;

/// An IPv4 network in CIDR form; host bits are always zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ipv4Net {
    base: u32,
    len: u8,
}

impl Ipv4Net {
    /// The network of `len` bits that `addr` is in. `None` if `len` is more than 32.
    pub const fn new(addr: Ipv4Addr, len: u8) -> Option<Self> {
        if len > 32 {
            return None;
        }
        Some(Self {
            base: addr.to_bits() & mask(len),
            len,
        })
    }

    /// For constants in this crate: `len` is at most 32.
    pub(crate) const fn fixed(a: u8, b: u8, c: u8, d: u8, len: u8) -> Self {
        Self {
            base: Ipv4Addr::new(a, b, c, d).to_bits() & mask(len),
            len,
        }
    }

    /// The first address.
    pub fn network(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base)
    }

    /// The length of the prefix in bits.
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// The netmask.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask(self.len))
    }

    /// Whether `addr` is in this network.
    pub fn contains(self, addr: Ipv4Addr) -> bool {
        addr.to_bits() & mask(self.len) == self.base
    }

    /// Whether the two networks have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        let shorter = mask(self.len.min(other.len));
        self.base & shorter == other.base & shorter
    }

    /// First and last address as numbers.
    pub(crate) fn range(self) -> (u32, u32) {
        (self.base, self.base | !mask(self.len))
    }
}

const fn mask(len: u8) -> u32 {
    if len == 0 {
        0
    } else {
        u32::MAX << (32 - len as u32)
    }
}

impl fmt::Display for Ipv4Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.len)
    }
}

impl FromStr for Ipv4Net {
    type Err = NetError;

    /// Reads `10.212.0.0/16`; a bare address is a network of one address.
    fn from_str(text: &str) -> Result<Self, NetError> {
        let bad = |reason: &str| NetError::BadSetting {
            setting: "subnet",
            reason: format!("`{text}` is not an IPv4 network such as 10.212.0.0/16: {reason}"),
        };
        let (addr, len) = text.split_once('/').unwrap_or((text, "32"));
        let addr: Ipv4Addr = addr
            .parse()
            .map_err(|_| bad("the address cannot be read"))?;
        let len: u8 = len
            .parse()
            .map_err(|_| bad("the prefix length cannot be read"))?;
        let net = Self::new(addr, len).ok_or_else(|| bad("a prefix has at most 32 bits"))?;
        if net.network() != addr {
            return Err(bad(&format!(
                "bits are set outside of the prefix; {net} would do"
            )));
        }
        Ok(net)
    }
}

/// What one guest may use of the network outside. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at the same time, and what UDP has instead: pairs of ports that have spoken.
    pub connections: Option<u32>,
    /// New connections per second; twice as many at once.
    pub connections_per_sec: Option<u32>,
    /// Bytes per second in each direction. What comes faster is dropped, and TCP adapts.
    pub bytes_per_sec: Option<u64>,
}

impl Default for Limits {
    /// Far above what programs use, far below what hurts the host; no limit of bandwidth.
    fn default() -> Self {
        Self {
            connections: Some(4096),
            connections_per_sec: Some(1000),
            bytes_per_sec: None,
        }
    }
}

/// Settings of the slot pool.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Where the pool notes what it changed on the host (`net/ip_forward.before`).
    pub state_dir: PathBuf,
    /// All objects of the pool carry this name: namespaces and host links `{prefix}-{index}`,
    /// nftables tables `{prefix}`. One to nine lower-case letters and digits.
    pub name_prefix: String,
    /// Addresses of the links between host and slots, two per slot. Only this host sees them,
    /// for everything that leaves it is masqueraded, but they must not hide a network that the
    /// host itself needs. The default, 10.212.0.0/16, keeps clear of what is commonly taken:
    /// 172.16/12 and 192.168/16 (container engines, home and office routers), 10.0/16 and
    /// 10.96/12 (clouds' default networks, Kubernetes services), 10.244/16 (pods).
    pub subnet: Ipv4Net,
    /// How many unused slots are kept ready.
    pub ready: usize,
    /// How many slots there may be, used ones included.
    pub max_slots: usize,
    /// Whether a fresh slot may reach the public internet.
    pub internet: bool,
    /// What one guest may use of the network.
    pub limits: Limits,
    /// Networks that guests may reach although they are in a range that is denied to them, for
    /// example a package mirror at 10.1.2.3/32. The host's own addresses stay closed.
    pub open: Vec<Ipv4Net>,
}

impl NetConfig {
    /// The defaults, with notes kept under `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            name_prefix: "wrenn".to_owned(),
            subnet: Ipv4Net::fixed(10, 212, 0, 0, 16),
            ready: 4,
            max_slots: 1024,
            internet: true,
            limits: Limits::default(),
            open: Vec::new(),
        }
    }

    /// Checks that the settings can work together.
    pub(crate) fn check(&self) -> Result<(), NetError> {
        let bad = |setting, reason| Err(NetError::BadSetting { setting, reason });
        let prefix = &self.name_prefix;
        let letters = prefix
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if prefix.is_empty() || prefix.len() > LONGEST_PREFIX || !letters {
            return bad(
                "name_prefix",
                format!(
                    "`{prefix}` must be 1 to {LONGEST_PREFIX} lower-case letters and digits, for \
                     it becomes part of interface names"
                ),
            );
        }
        let (first, last) = self.subnet.range();
        // The first and the last pair would contain the network and broadcast address.
        let room = u64::from(last - first).div_ceil(2).saturating_sub(2);
        if self.max_slots == 0 || self.max_slots as u64 > room.min(99_999) {
            return bad(
                "max_slots",
                format!(
                    "{} slots do not fit: {} has room for {} (two addresses each)",
                    self.max_slots,
                    self.subnet,
                    room.min(99_999)
                ),
            );
        }
        let Limits {
            connections,
            connections_per_sec,
            bytes_per_sec,
        } = self.limits;
        if connections == Some(0) || connections_per_sec == Some(0) || bytes_per_sec == Some(0) {
            return bad(
                "limits",
                "a limit of 0 would close the network: turn the internet off instead".to_owned(),
            );
        }
        if self.ready > self.max_slots {
            return bad(
                "ready",
                format!(
                    "{} ready slots are more than the {} allowed",
                    self.ready, self.max_slots
                ),
            );
        }
        let guests = Ipv4Net::fixed(169, 254, 0, 20, GUEST_PREFIX_LEN);
        if self.subnet.overlaps(guests) {
            return bad(
                "subnet",
                format!("{} contains the guests' own {guests}", self.subnet),
            );
        }
        Ok(())
    }

    /// The name of a slot: of its namespace, and of its link on the host.
    pub(crate) fn slot_name(&self, index: u32) -> String {
        format!("{}-{index}", self.name_prefix)
    }

    /// The index in a slot's name; `None` if the name is not one of ours.
    pub(crate) fn index_in(&self, name: &str) -> Option<u32> {
        let digits = name.strip_prefix(&self.name_prefix)?.strip_prefix('-')?;
        let index: u32 = digits.parse().ok()?;
        // "07" and "+7" parse, but we never write them.
        (index.to_string() == digits).then_some(index)
    }

    /// The addresses of a slot's veth pair: host's end, slot's end.
    pub(crate) fn slot_addrs(&self, index: u32) -> (Ipv4Addr, Ipv4Addr) {
        let host = self.subnet.range().0.wrapping_add(index.wrapping_mul(2));
        (
            Ipv4Addr::from_bits(host),
            Ipv4Addr::from_bits(host.wrapping_add(1)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_strictly() {
        let net: Ipv4Net = "10.212.0.0/16".parse().unwrap();
        assert_eq!(net.to_string(), "10.212.0.0/16");
        assert!(net.contains(Ipv4Addr::new(10, 212, 255, 255)));
        assert!(!net.contains(Ipv4Addr::new(10, 213, 0, 0)));
        assert!(
            "10.212.0.1/16"
                .parse::<Ipv4Net>()
                .unwrap_err()
                .to_string()
                .contains("10.212.0.0/16")
        );
        for text in ["", "10.0.0.0/33", "10.0.0/8", "fe80::/10", "10.0.0.0/"] {
            assert!(text.parse::<Ipv4Net>().is_err(), "{text}");
        }
        assert!("0.0.0.0/0".parse::<Ipv4Net>().unwrap().overlaps(net));
        assert!(!net.overlaps("10.213.0.0/16".parse().unwrap()));
    }

    #[test]
    fn names_and_addresses_of_slots() {
        let config = NetConfig::new("/nowhere");
        config.check().unwrap();
        assert_eq!(config.slot_name(7), "wrenn-7");
        assert_eq!(config.index_in("wrenn-7"), Some(7));
        for name in [
            "wrenn-07", "wrenn-+7", "wrenn7", "wrennx-7", "wrenn-", "eth0",
        ] {
            assert_eq!(config.index_in(name), None, "{name}");
        }
        assert_eq!(
            config.slot_addrs(200),
            (
                Ipv4Addr::new(10, 212, 1, 144),
                Ipv4Addr::new(10, 212, 1, 145)
            )
        );
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let with = |change: fn(&mut NetConfig)| {
            let mut config = NetConfig::new("/nowhere");
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(with(|c| c.name_prefix = "Wrenn".into()).contains("name_prefix"));
        assert!(with(|c| c.name_prefix = "tenletters".into()).contains("name_prefix"));
        assert!(with(|c| c.max_slots = 40_000).contains("32766"));
        assert!(with(|c| c.ready = 2_000).contains("ready"));
        assert!(with(|c| c.limits.connections = Some(0)).contains("limits"));
        assert!(with(|c| c.subnet = Ipv4Net::fixed(169, 254, 0, 0, 16)).contains("subnet"));
    }
}
