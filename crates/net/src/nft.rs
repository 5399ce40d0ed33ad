//! nftables by netlink: tables, chains, sets and rules as one transaction.
//!
//! A rule is a list of expressions that work on registers: *load* something into register 1,
//! *compare* it (which ends the rule when it does not match), *do* something. What a rule
//! means here is shown best by `nft --debug=netlink add rule …`, which prints the same
//! expressions. Numbers are those of `linux/netfilter/nf_tables.h`; the tests have `nft`
//! read back what was loaded.

use std::io;
use std::net::Ipv4Addr;

use crate::config::Ipv4Net;
use crate::netlink::{APPEND, Attrs, CREATE, Request, Socket};

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

/// NFPROTO_INET: a table that sees IPv4 and IPv6.
const FAMILY_INET: u8 = 1;
const FAMILY_IPV4: u8 = 2;
const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
/// The type number by which `nft` prints a set's keys as IPv4 addresses.
const TYPE_IPV4_ADDR: u32 = 7;
const SET_CONSTANT: u32 = 2;
const SET_INTERVAL: u32 = 4;
const ELEM_INTERVAL_END: u32 = 1;

/// Bits of a packet's connection tracking state.
pub(crate) const CT_INVALID: u32 = 1;
/// A packet of, or about, a connection that was let through before.
pub(crate) const CT_KNOWN: u32 = 2 | 4;

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

    /// Adds a set of networks.
    pub(crate) fn networks(&mut self, name: &str, networks: &[Ipv4Net]) {
        // The number by which messages of one transaction refer to a new set.
        let id = u32::try_from(self.requests.len()).unwrap_or(u32::MAX);
        self.push(NEW_SET, CREATE, |attrs| {
            attrs
                .text(2, name)
                .network(3, SET_INTERVAL | SET_CONSTANT)
                .network(4, TYPE_IPV4_ADDR)
                .network(5, 4)
                .network(10, id);
        });
        let ranges = merge(networks);
        if ranges.is_empty() {
            return;
        }
        self.push(NEW_ELEMENTS, CREATE, |attrs| {
            attrs.text(2, name).network(4, id).nest(3, |list| {
                for (first, last) in ranges {
                    element(list, first, false);
                    // A range up to the last address there is has no end.
                    if let Some(behind) = last.checked_add(1) {
                        element(list, behind, true);
                    }
                }
            });
        });
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
fn merge(networks: &[Ipv4Net]) -> Vec<(u32, u32)> {
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

/// A rule under construction, read left to right: conditions, then what to do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rule {
    expressions: Attrs,
}

/// Which end of a packet's way, or of its header, is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    From,
    To,
}

/// Whether a condition must hold or must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Must {
    Be,
    NotBe,
}

const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

impl Rule {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn expr(mut self, name: &str, fill: impl FnOnce(&mut Attrs)) -> Self {
        self.expressions.nest(LIST_ELEM, |expr| {
            expr.text(1, name).nest(2, fill);
        });
        self
    }

    fn meta(self, key: u32) -> Self {
        self.expr("meta", |e| {
            e.network(1, REG_1).network(2, key);
        })
    }

    fn payload(self, base: u32, offset: u32, len: u32) -> Self {
        self.expr("payload", |e| {
            e.network(1, REG_1)
                .network(2, base)
                .network(3, offset)
                .network(4, len);
        })
    }

    fn compare(self, must: Must, value: &[u8]) -> Self {
        self.expr("cmp", |e| {
            e.network(1, REG_1)
                .network(2, u32::from(must == Must::NotBe))
                .nest(3, |data| {
                    data.bytes(DATA_VALUE, value);
                });
        })
    }

    fn mask(self, mask: &[u8]) -> Self {
        let len = u32::try_from(mask.len()).unwrap_or(u32::MAX);
        self.expr("bitwise", |e| {
            e.network(1, REG_1).network(2, REG_1).network(3, len);
            e.nest(4, |data| {
                data.bytes(DATA_VALUE, mask);
            });
            e.nest(5, |data| {
                data.bytes(DATA_VALUE, &vec![0; mask.len()]);
            });
        })
    }

    /// The link a packet came `From` or goes `To` has this name.
    pub(crate) fn link(self, side: Side, must: Must, name: &str) -> Self {
        // The whole 16 bytes are compared, or "tap0" would match "tap01".
        let mut padded = name.as_bytes().to_vec();
        padded.resize(16, 0);
        self.meta(if side == Side::From {
            META_IIFNAME
        } else {
            META_OIFNAME
        })
        .compare(must, &padded)
    }

    /// The link's name starts so.
    pub(crate) fn link_starts(self, side: Side, must: Must, start: &str) -> Self {
        self.meta(if side == Side::From {
            META_IIFNAME
        } else {
            META_OIFNAME
        })
        .compare(must, start.as_bytes())
    }

    /// The packet is IPv4.
    pub(crate) fn ipv4(self, must: Must) -> Self {
        self.meta(META_NFPROTO).compare(must, &[FAMILY_IPV4])
    }

    /// The transport protocol.
    pub(crate) fn protocol(self, protocol: u8) -> Self {
        self.meta(META_L4PROTO).compare(Must::Be, &[protocol])
    }

    /// The destination port, of TCP or UDP.
    pub(crate) fn port(self, protocol: u8, port: u16) -> Self {
        self.protocol(protocol)
            .payload(BASE_TRANSPORT, 2, 2)
            .compare(Must::Be, &port.to_be_bytes())
    }

    fn load_addr(self, side: Side) -> Self {
        self.payload(BASE_NETWORK, if side == Side::From { 12 } else { 16 }, 4)
    }

    /// The IPv4 address of that side.
    pub(crate) fn addr(self, side: Side, must: Must, addr: Ipv4Addr) -> Self {
        self.ipv4(Must::Be)
            .load_addr(side)
            .compare(must, &addr.octets())
    }

    /// The IPv4 address of that side is in a network.
    pub(crate) fn addr_in(self, side: Side, must: Must, net: Ipv4Net) -> Self {
        self.ipv4(Must::Be)
            .load_addr(side)
            .mask(&net.mask().octets())
            .compare(must, &net.network().octets())
    }

    /// The IPv4 address of that side is in a set of this table.
    pub(crate) fn addr_in_set(self, side: Side, must: Must, set: &str) -> Self {
        self.ipv4(Must::Be).load_addr(side).expr("lookup", |e| {
            e.text(1, set).network(2, REG_1);
            if must == Must::NotBe {
                e.network(5, 1);
            }
        })
    }

    /// The state of the packet's connection is one of these bits.
    pub(crate) fn state(self, bits: u32) -> Self {
        self.expr("ct", |e| {
            e.network(1, REG_1).network(2, 0);
        })
        .mask(&bits.to_ne_bytes())
        .compare(Must::NotBe, &[0; 4])
    }

    /// Counts the packets that come this far.
    pub(crate) fn count(self) -> Self {
        self.expr("counter", |_| {})
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        self.expr("immediate", |e| {
            e.network(1, REG_VERDICT).nest(2, |data| {
                data.nest(DATA_VERDICT, |verdict| {
                    verdict.bytes(1, &code.to_be_bytes());
                    if let Some(chain) = chain {
                        verdict.text(2, chain);
                    }
                });
            });
        })
    }

    pub(crate) fn accept(self) -> Self {
        self.verdict(1, None)
    }

    pub(crate) fn drop(self) -> Self {
        self.verdict(0, None)
    }

    pub(crate) fn jump(self, chain: &str) -> Self {
        self.verdict(-3, Some(chain))
    }

    /// Answers with a TCP reset.
    pub(crate) fn reset(self) -> Self {
        self.expr("reject", |e| {
            e.network(1, 1).bytes(2, &[0]);
        })
    }

    /// Answers with ICMP "administratively prohibited".
    pub(crate) fn prohibit(self) -> Self {
        self.expr("reject", |e| {
            e.network(1, 2).bytes(2, &[3]);
        })
    }

    /// Replaces the source address by that of the outgoing link.
    pub(crate) fn masquerade(self) -> Self {
        self.expr("masq", |_| {})
    }
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
