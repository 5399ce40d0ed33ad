//! What was refused to a guest. The kernel keeps the list, in sets that the firewall fills
//! ([`crate::policy`]); here it is read. Names are noted by the resolver relay ([`crate::refused`]).

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, SystemTime};

use crate::netlink::Socket;
use crate::nft::{self, Element, Field, TCP, UDP};
use crate::policy::{HOST_FIELDS, REFUSAL_KEPT, REFUSED, REFUSED_OTHER, SLOT_FIELDS};

/// Why something was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No guest of this host may go there: a private, link-local or metadata address, the host
    /// itself, another sandbox.
    Forbidden,
    /// The sandbox's deny list has it, and its allow list has not.
    Denied,
    /// The internet is off for the sandbox, and its allow list has no such address.
    InternetOff,
    /// The sandbox has as many connections as it may have.
    ConnectionLimit,
    /// The sandbox opens connections faster than it may.
    ConnectionRate,
}

const REASONS: [Reason; 5] = [
    Reason::Forbidden,
    Reason::Denied,
    Reason::InternetOff,
    Reason::ConnectionLimit,
    Reason::ConnectionRate,
];

impl Reason {
    /// The packet's mark that says so to the chain that notes it.
    pub(crate) fn mark(self) -> u32 {
        match self {
            Self::Forbidden => 1,
            Self::Denied => 2,
            Self::InternetOff => 3,
            Self::ConnectionLimit => 4,
            Self::ConnectionRate => 5,
        }
    }

    /// The word for it in answers of the API.
    pub fn word(self) -> &'static str {
        match self {
            Self::Forbidden => "forbidden",
            Self::Denied => "denied",
            Self::InternetOff => "internet_off",
            Self::ConnectionLimit => "connection_limit",
            Self::ConnectionRate => "connection_rate",
        }
    }

    pub(crate) fn of_mark(mark: u32) -> Self {
        // Nothing else sets marks there; whatever it were, the host has refused it.
        let known = REASONS.into_iter().find(|reason| reason.mark() == mark);
        known.unwrap_or(Self::Forbidden)
    }
}

/// Where a guest wanted to go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Destination {
    /// An address that it sent packets to.
    Address(Ipv4Addr),
    /// A name that it asked its resolver for.
    Name(String),
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// A destination that was refused, and how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// When it was refused last.
    pub at: SystemTime,
    /// The number of the protocol: 6 is TCP, 17 UDP, 1 ICMP. `None` of a name.
    pub protocol: Option<u8>,
    /// Where the guest wanted to go.
    pub destination: Destination,
    /// The port, if the protocol has them.
    pub port: Option<u16>,
    /// Packets refused: with TCP one for each attempt to connect. Of a name the questions.
    pub count: u64,
    /// Why, by the last refusal.
    pub reason: Reason,
}

impl Denial {
    /// The protocol's name, or its number; `dns` of a name.
    pub fn protocol_name(&self) -> String {
        match self.protocol {
            None => "dns".to_owned(),
            Some(TCP) => "tcp".to_owned(),
            Some(UDP) => "udp".to_owned(),
            Some(1) => "icmp".to_owned(),
            Some(number) => number.to_string(),
        }
    }
}

/// What the slot's own table has refused.
pub(crate) fn of_slot(socket: &mut Socket, table: &str) -> io::Result<Vec<Denial>> {
    Ok(noted(socket, table)?
        .iter()
        .map(|element| denial(element, &SLOT_FIELDS))
        .collect())
}

/// What the host's table has refused to the slot with this address.
pub(crate) fn of_host(socket: &mut Socket, table: &str, slot: Ipv4Addr) -> io::Result<Vec<Denial>> {
    Ok(noted(socket, table)?
        .iter()
        .filter(|element| element.field(0) == slot.octets())
        .map(|element| denial(element, &HOST_FIELDS))
        .collect())
}

/// Makes the host's table forget what it has refused to the slot with this address.
pub(crate) fn forget_of_host(socket: &mut Socket, table: &str, slot: Ipv4Addr) -> io::Result<()> {
    for set in [REFUSED, REFUSED_OTHER] {
        let mut theirs = nft::elements(socket, table, set)?;
        theirs.retain(|element| element.field(0) == slot.octets());
        nft::remove_elements(socket, table, set, &theirs)?;
    }
    Ok(())
}

fn noted(socket: &mut Socket, table: &str) -> io::Result<Vec<Element>> {
    let mut noted = nft::elements(socket, table, REFUSED)?;
    noted.extend(nft::elements(socket, table, REFUSED_OTHER)?);
    Ok(noted)
}

fn denial(element: &Element, fields: &[Field; 4]) -> Denial {
    let since = REFUSAL_KEPT.saturating_sub(element.goes_in);
    let now = SystemTime::now();
    let mut denial = Denial {
        at: now.checked_sub(since).unwrap_or(now),
        protocol: Some(0),
        destination: Destination::Address(Ipv4Addr::UNSPECIFIED),
        port: None,
        count: element.packets,
        reason: Reason::Forbidden,
    };
    let present = element.key.len().div_ceil(4);
    for (at, field) in fields.iter().enumerate().take(present) {
        let [a, b, ..] = element.field(at);
        match field {
            Field::From | Field::OpenedTo | Field::Carried(_) => {}
            Field::To => {
                denial.destination = Destination::Address(element.field(at).into());
            }
            Field::Protocol => denial.protocol = Some(a),
            Field::Port => denial.port = Some(u16::from_be_bytes([a, b])),
            Field::Mark => {
                denial.reason = Reason::of_mark(u32::from_ne_bytes(element.field(at)));
            }
        }
    }
    denial
}

/// The last first, at most `most` of them; the same destination once for each reason.
pub(crate) fn sorted(mut denials: Vec<Denial>, most: usize) -> Vec<Denial> {
    denials.sort_by(|a, b| b.at.cmp(&a.at).then(a.destination.cmp(&b.destination)));
    denials.truncate(most);
    denials
}

/// How exactly [`Denial::at`] is known: the kernel counts lifetimes in its own ticks.
pub const AT_WITHIN: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_says_why() {
        for reason in REASONS {
            assert_eq!(Reason::of_mark(reason.mark()), reason);
        }
        assert_eq!(Reason::of_mark(77), Reason::Forbidden);
    }

    #[test]
    fn an_element_is_read_by_its_fields() {
        let key = [
            [9, 9, 9, 9],
            [6, 0, 0, 0],
            2_u32.to_ne_bytes(),
            [1, 187, 0, 0],
        ]
        .concat();
        let element = Element {
            key,
            goes_in: REFUSAL_KEPT,
            packets: 3,
        };
        let read = denial(&element, &SLOT_FIELDS);
        assert_eq!(
            (read.protocol_name().as_str(), read.port, read.count),
            ("tcp", Some(443), 3)
        );
        assert_eq!(read.reason, Reason::Denied);
        assert_eq!(read.destination.to_string(), "9.9.9.9");
    }
}
