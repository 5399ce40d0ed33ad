//! nftables by netlink: tables, chains, sets and rules as one transaction.
//!
//! A rule is a list of expressions that work on registers: *load* something into register 1,
//! *compare* it (which ends the rule when it does not match), *do* something. What a rule
//! means here is shown best by `nft --debug=netlink add rule …`, which prints the same
//! expressions. Numbers are those of `linux/netfilter/nf_tables.h`; the tests have `nft`
//! read back what was loaded.

mod rule;
mod table;

use std::io;
use std::time::Duration;

use crate::config::Ipv4Net;
use crate::netlink::{APPEND, Attrs, CREATE, Request, Socket};

pub(crate) use rule::{Must, Rule, Side, TCP, UDP};
pub(crate) use table::{Element, elements, remove_elements};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DEL_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const DEL_RULE: u16 = SUBSYSTEM << 8 | 8;
const NEW_SET: u16 = SUBSYSTEM << 8 | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
const DEL_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;

/// NFPROTO_INET: a table that sees IPv4 and IPv6.
const FAMILY_INET: u8 = 1;
const FAMILY_IPV4: u8 = 2;
const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
const SET_CONSTANT: u32 = 2;
const SET_INTERVAL: u32 = 4;
const SET_TIMEOUT: u32 = 16;
/// Rules add elements.
const SET_DYNAMIC: u32 = 32;
const ELEM_INTERVAL_END: u32 = 1;
/// Networks per message: the list is one attribute, whose length has 16 bits.
const MOST_PER_MESSAGE: usize = 500;

/// Bits of a packet's connection tracking state.
pub(crate) const CT_INVALID: u32 = 1;
/// A packet of, or about, a connection that was let through before.
pub(crate) const CT_KNOWN: u32 = CT_ESTABLISHED | 4;
/// A packet of a connection that was let through before.
pub(crate) const CT_ESTABLISHED: u32 = 2;
/// The first packet of a connection.
pub(crate) const CT_NEW: u32 = 8;

/// Where a base chain sits in a packet's way.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// What a chain is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Chain {
    /// Only reached by a jump.
    Plain,
    /// Sees packets at a hook, in the order of priorities; drops what it does not accept, or
    /// accepts what it does not drop.
    Filter {
        hook: Hook,
        priority: i32,
        drops: bool,
    },
    /// Translates addresses.
    Nat { hook: Hook, priority: i32 },
}

/// A part of the key of a set that rules fill: what they read from a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    /// The source address.
    From,
    /// The destination address.
    To,
    /// The transport protocol.
    Protocol,
    /// The destination port of TCP or UDP.
    Port,
    /// What [`Rule::mark`] gave it.
    Mark,
    /// The address that the packet's connection was opened to, whichever way its packets go, and
    /// errors about it from whomever.
    OpenedTo,
    /// Four bytes of a datagram that are an address, counted as in [`Rule::datagram_has`].
    Carried(u32),
}

impl Field {
    /// The type number by which `nft` prints it.
    fn kind(self) -> u32 {
        match self {
            Self::From | Self::To | Self::OpenedTo | Self::Carried(_) => 7,
            Self::Protocol => 12,
            Self::Port => 13,
            Self::Mark => 19,
        }
    }
}

/// A duration as nftables has it.
fn milliseconds(duration: Duration) -> [u8; 8] {
    u64::try_from(duration.as_millis())
        .unwrap_or(u64::MAX)
        .to_be_bytes()
}

/// A table under construction; [`Batch::commit`] puts it in force, whole or not at all.
pub(crate) struct Batch {
    table: String,
    requests: Vec<Request>,
}

/// `struct nfgenmsg`.
fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

impl Batch {
    pub(crate) fn new(table: &str) -> Self {
        let begin = Request::new(BATCH_BEGIN, 0, &nfgenmsg(0, SUBSYSTEM));
        Self {
            table: table.to_owned(),
            requests: vec![begin],
        }
    }

    fn push(&mut self, kind: u16, flags: u16, fill: impl FnOnce(&mut Attrs)) {
        self.requests.push(
            Request::new(kind, flags, &nfgenmsg(FAMILY_INET, 0)).attrs(|attrs| {
                // In all kinds of message used here attribute 1 is the table's name.
                attrs.text(1, &self.table);
                fill(attrs);
            }),
        );
    }

    /// Makes the table; what was in it before is gone.
    pub(crate) fn fresh_table(&mut self) {
        // Deleting what is not there would fail the transaction, so it is made first.
        self.push(NEW_TABLE, CREATE, |_| {});
        self.push(DEL_TABLE, 0, |_| {});
        self.push(NEW_TABLE, CREATE, |_| {});
    }

    /// Removes the table.
    pub(crate) fn delete_table(&mut self) {
        self.push(NEW_TABLE, CREATE, |_| {});
        self.push(DEL_TABLE, 0, |_| {});
    }

    /// Adds a chain.
    pub(crate) fn chain(&mut self, name: &str, chain: Chain) {
        self.push(NEW_CHAIN, CREATE, |attrs| {
            attrs.text(3, name);
            let (hook, priority, kind) = match chain {
                Chain::Plain => return,
                Chain::Filter { hook, priority, .. } => (hook, priority, "filter"),
                Chain::Nat { hook, priority } => (hook, priority, "nat"),
            };
            attrs.nest(4, |base| {
                base.network(1, hook as u32)
                    .bytes(2, &priority.to_be_bytes());
            });
            if let Chain::Filter { drops, .. } = chain {
                attrs.network(5, if drops { 0 } else { 1 });
            }
            attrs.text(7, kind);
        });
    }

    /// Removes all rules of a chain.
    pub(crate) fn flush_chain(&mut self, chain: &str) {
        self.push(DEL_RULE, 0, |attrs| {
            attrs.text(2, chain);
        });
    }

    /// Adds a set of networks that stays as it is.
    pub(crate) fn networks(&mut self, name: &str, networks: &[Ipv4Net]) {
        self.network_set(name, SET_INTERVAL | SET_CONSTANT);
        self.fill(name, networks);
    }

    /// Adds a set of networks that [`Self::replace_networks`] may change.
    pub(crate) fn changing_networks(&mut self, name: &str, networks: &[Ipv4Net]) {
        self.network_set(name, SET_INTERVAL);
        self.fill(name, networks);
    }

    /// Gives a set other networks.
    pub(crate) fn replace_networks(&mut self, name: &str, networks: &[Ipv4Net]) {
        self.empty_set(name);
        self.fill(name, networks);
    }

    fn network_set(&mut self, name: &str, flags: u32) {
        let id = self.next_id();
        self.push(NEW_SET, CREATE, |attrs| {
            attrs
                .text(2, name)
                .network(3, flags)
                .network(4, Field::To.kind())
                .network(5, 4)
                .network(10, id);
        });
    }

    /// Adds a set that rules fill, of up to `size` elements, which go when nothing has renewed
    /// them for `keep`.
    pub(crate) fn noted(&mut self, name: &str, fields: &[Field], size: u32, keep: Duration) {
        let id = self.next_id();
        // A key of several fields has their types in six bits each, and pads them to a word.
        let kind = fields
            .iter()
            .fold(0, |kind, field| kind << 6 | field.kind());
        let len = u32::try_from(fields.len() * 4).unwrap_or(u32::MAX);
        self.push(NEW_SET, CREATE, |attrs| {
            attrs
                .text(2, name)
                .network(3, SET_TIMEOUT | SET_DYNAMIC)
                .network(4, kind)
                .network(5, len)
                .nest(9, |about| {
                    about.network(1, size);
                })
                .network(10, id)
                .bytes(11, &milliseconds(keep));
        });
    }

    /// Removes all elements of a set. What rules fill in meanwhile may stay; see [`crate::policy`].
    pub(crate) fn empty_set(&mut self, name: &str) {
        self.push(DEL_ELEMENTS, 0, |attrs| {
            attrs.text(2, name);
        });
    }

    /// The number by which messages of one transaction refer to a new set.
    fn next_id(&self) -> u32 {
        u32::try_from(self.requests.len()).unwrap_or(u32::MAX)
    }

    fn fill(&mut self, name: &str, networks: &[Ipv4Net]) {
        for ranges in merge(networks).chunks(MOST_PER_MESSAGE) {
            self.push(NEW_ELEMENTS, CREATE, |attrs| {
                attrs.text(2, name).nest(3, |list| {
                    for (first, last) in ranges {
                        element(list, *first, false);
                        // A range up to the last address there is has no end.
                        if let Some(behind) = last.checked_add(1) {
                            element(list, behind, true);
                        }
                    }
                });
            });
        }
    }

    /// Appends a rule to a chain.
    pub(crate) fn rule(&mut self, chain: &str, rule: Rule) {
        self.push(NEW_RULE, CREATE | APPEND, |attrs| {
            attrs.text(2, chain).nest(4, |list| {
                list.raw(&rule.expressions.into_bytes());
            });
        });
    }

    /// Puts everything in force at once.
    pub(crate) fn commit(mut self, socket: &mut Socket) -> io::Result<()> {
        let last = self.requests.len() - 1;
        self.requests
            .push(Request::new(BATCH_END, 0, &nfgenmsg(0, SUBSYSTEM)));
        socket.call_all(&self.requests, last)
    }
}

/// Sorted, non-overlapping, non-adjacent ranges of the same addresses.
pub(crate) fn merge(networks: &[Ipv4Net]) -> Vec<(u32, u32)> {
    let mut ranges: Vec<_> = networks.iter().map(|net| net.range()).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn element(list: &mut Attrs, addr: u32, is_end: bool) {
    list.nest(LIST_ELEM, |elem| {
        if is_end {
            elem.network(3, ELEM_INTERVAL_END);
        }
        elem.nest(1, |key| {
            key.network(DATA_VALUE, addr);
        });
    });
}

/// Forgets all connections of the socket's namespace (IPCTNL_MSG_CT_DELETE without a filter).
pub(crate) fn flush_connections(socket: &mut Socket) -> io::Result<()> {
    const CONNTRACK_DELETE: u16 = 1 << 8 | 2;
    socket.call(&Request::new(CONNTRACK_DELETE, 0, &nfgenmsg(0, 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_become_disjoint_ranges() {
        let nets: Vec<Ipv4Net> = [
            "10.0.0.0/8",
            "240.0.0.0/4",
            "10.1.0.0/16",
            "224.0.0.0/4",
            "11.0.0.0/8",
        ]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect();
        assert_eq!(
            merge(&nets),
            [(0x0a00_0000, 0x0bff_ffff), (0xe000_0000, 0xffff_ffff)]
        );
        assert_eq!(merge(&["0.0.0.0/0".parse().unwrap()]), [(0, u32::MAX)]);
    }
}
