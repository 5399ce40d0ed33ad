//! A rule, read left to right: conditions, then what to do.

use std::net::Ipv4Addr;

use super::{DATA_VALUE, DATA_VERDICT, FAMILY_IPV4, Field, LIST_ELEM, REG_1, REG_VERDICT};
use crate::config::Ipv4Net;
use crate::netlink::Attrs;

/// The 4-byte registers, by which a key of several fields is put together. The first is the
/// beginning of register 1.
const REG_WORDS: u32 = 8;

/// A rule under construction, read left to right: conditions, then what to do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rule {
    pub(super) expressions: Attrs,
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

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
/// The address a connection was opened to, whichever way its packets go.
const CT_DESTINATION: u32 = 20;
const CT_ORIGINAL: u8 = 0;
/// Turns "up to so much" into "over so much", for limits and counts of connections.
const OVER: u32 = 1;
const PACKETS: u32 = 0;
const BYTES: u32 = 1;
const DYNSET_UPDATE: u32 = 1;

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
        self.meta_into(REG_1, key)
    }

    fn meta_into(self, register: u32, key: u32) -> Self {
        self.expr("meta", |e| {
            e.network(1, register).network(2, key);
        })
    }

    fn payload(self, base: u32, offset: u32, len: u32) -> Self {
        self.payload_into(REG_1, base, offset, len)
    }

    fn payload_into(self, register: u32, base: u32, offset: u32, len: u32) -> Self {
        self.expr("payload", |e| {
            e.network(1, register)
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
    pub(crate) fn protocol(self, must: Must, protocol: u8) -> Self {
        self.meta(META_L4PROTO).compare(must, &[protocol])
    }

    /// The port of that side, of TCP or UDP.
    pub(crate) fn port(self, side: Side, protocol: u8, port: u16) -> Self {
        self.protocol(Must::Be, protocol)
            .payload(BASE_TRANSPORT, if side == Side::From { 0 } else { 2 }, 2)
            .compare(Must::Be, &port.to_be_bytes())
    }

    /// Four bytes of a datagram, counted from the beginning of its UDP header.
    pub(crate) fn datagram_has(self, offset: u32, value: u32) -> Self {
        self.payload(BASE_TRANSPORT, offset, 4)
            .compare(Must::Be, &value.to_be_bytes())
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
        self.ipv4(Must::Be).load_addr(side).lookup(must, set)
    }

    /// What the packet says in those fields is in a set of this table.
    pub(crate) fn in_set(self, set: &str, fields: &[Field]) -> Self {
        self.key(fields).lookup(Must::Be, set)
    }

    fn lookup(self, must: Must, set: &str) -> Self {
        self.expr("lookup", |e| {
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

    /// There are more than `most` connections that came as far as this rule.
    pub(crate) fn more_connections_than(self, most: u32) -> Self {
        self.expr("connlimit", |e| {
            e.network(1, most).network(2, OVER);
        })
    }

    /// Packets come faster than `per_second`, with `burst` at once allowed for.
    pub(crate) fn packets_faster_than(self, per_second: u64, burst: u32) -> Self {
        self.faster_than(PACKETS, per_second, burst)
    }

    /// Bytes come faster than `per_second`, with `burst` at once allowed for.
    pub(crate) fn bytes_faster_than(self, per_second: u64, burst: u32) -> Self {
        self.faster_than(BYTES, per_second, burst)
    }

    fn faster_than(self, of: u32, per_second: u64, burst: u32) -> Self {
        self.expr("limit", |e| {
            e.bytes(1, &per_second.to_be_bytes())
                .bytes(2, &1_u64.to_be_bytes())
                .network(3, burst)
                .network(4, of)
                .network(5, OVER);
        })
    }

    /// Marks the packet, for a later rule.
    pub(crate) fn mark(self, mark: u32) -> Self {
        self.expr("immediate", |e| {
            e.network(1, REG_1).nest(2, |data| {
                data.bytes(DATA_VALUE, &mark.to_ne_bytes());
            });
        })
        .expr("meta", |e| {
            e.network(2, META_MARK).network(3, REG_1);
        })
    }

    /// Puts what the packet says in those fields into a set, or renews it there, and counts.
    /// The rule goes on only if that worked: a set may be full.
    pub(crate) fn note(self, set: &str, fields: &[Field]) -> Self {
        self.ipv4(Must::Be).key(fields).update(set, true)
    }

    /// As [`Self::note`], without counting.
    pub(crate) fn renew(self, set: &str, fields: &[Field]) -> Self {
        self.key(fields).update(set, false)
    }

    /// Loads the fields of a set's key.
    fn key(self, fields: &[Field]) -> Self {
        let mut rule = self;
        for (register, field) in (REG_WORDS..).zip(fields) {
            // A key starts in the register with the one name that `nft` reads back.
            let register = if register == REG_WORDS {
                REG_1
            } else {
                register
            };
            rule = match *field {
                Field::From => rule.payload_into(register, BASE_NETWORK, 12, 4),
                Field::To => rule.payload_into(register, BASE_NETWORK, 16, 4),
                Field::Protocol => rule.meta_into(register, META_L4PROTO),
                Field::Port => rule.payload_into(register, BASE_TRANSPORT, 2, 2),
                Field::Mark => rule.meta_into(register, META_MARK),
                Field::OpenedTo => rule.expr("ct", |e| {
                    e.network(1, register)
                        .network(2, CT_DESTINATION)
                        .bytes(3, &[CT_ORIGINAL]);
                }),
                Field::Carried(offset) => rule.payload_into(register, BASE_TRANSPORT, offset, 4),
            };
        }
        rule
    }

    fn update(self, set: &str, counts: bool) -> Self {
        self.expr("dynset", |e| {
            e.text(1, set).network(3, DYNSET_UPDATE).network(4, REG_1);
            if counts {
                e.nest(7, |counter| {
                    counter.text(1, "counter").nest(2, |_| {});
                });
            }
        })
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
