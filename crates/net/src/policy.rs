//! What a guest may reach, as nftables tables: one in each slot's namespace, one on the host.
//!
//! Both enforce the same denials, so that a mistake in one of them opens nothing. The slot's
//! table knows the guest (its address, its resolver, whether it has internet); the host's
//! knows the host (its own addresses, and what it translates to others, such as a published
//! container port that looks public before routing).
//!
//! ```text
//!  guest ──▶ tap0 │ slot: prerouting ─ forward ─ egress ─ masquerade │ out0 ──▶ wrenn-7 │ host
//!                 │        └ input: resolver only                    │   forward, input, masquerade
//! ```

use std::net::Ipv4Addr;

use crate::config::{GATEWAY_ADDR, GUEST_ADDR, Ipv4Net, NetConfig};
use crate::nft::{Batch, CT_INVALID, CT_KNOWN, Chain, Hook, Must, Rule, Side, TCP, UDP};

/// The guest's end of a slot.
pub(crate) const TAP: &str = "tap0";
/// The host's end of a slot, seen from inside.
pub(crate) const OUT: &str = "out0";
/// The port of the resolver.
pub(crate) const DNS_PORT: u16 = 53;

/// Networks no guest may reach: everything that is not public unicast (IANA IPv4 special-purpose
/// registry, RFC 6890), and the one public address clouds use for their own services.
const DENIED: [Ipv4Net; 16] = [
    Ipv4Net::fixed(0, 0, 0, 0, 8),        // this network
    Ipv4Net::fixed(10, 0, 0, 0, 8),       // private
    Ipv4Net::fixed(100, 64, 0, 0, 10),    // carriers' shared space; 100.100.100.200 is metadata
    Ipv4Net::fixed(127, 0, 0, 0, 8),      // loopback
    Ipv4Net::fixed(168, 63, 129, 16, 32), // Azure's wire server
    Ipv4Net::fixed(169, 254, 0, 0, 16),   // link-local; 169.254.169.254 is metadata
    Ipv4Net::fixed(172, 16, 0, 0, 12),    // private
    Ipv4Net::fixed(192, 0, 0, 0, 24),     // protocol assignments; 192.0.0.192 is metadata
    Ipv4Net::fixed(192, 0, 2, 0, 24),     // documentation
    Ipv4Net::fixed(192, 88, 99, 0, 24),   // 6to4 relays, deprecated
    Ipv4Net::fixed(192, 168, 0, 0, 16),   // private
    Ipv4Net::fixed(198, 18, 0, 0, 15),    // benchmarks
    Ipv4Net::fixed(198, 51, 100, 0, 24),  // documentation
    Ipv4Net::fixed(203, 0, 113, 0, 24),   // documentation
    Ipv4Net::fixed(224, 0, 0, 0, 4),      // multicast
    Ipv4Net::fixed(240, 0, 0, 0, 4),      // reserved, broadcast
];

/// Priorities of nftables' own names: before connection tracking, filter, source NAT.
const RAW: i32 = -300;
const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;

fn filter(hook: Hook, priority: i32, drops: bool) -> Chain {
    Chain::Filter {
        hook,
        priority,
        drops,
    }
}

/// The sets and the chain `refuse`, which both tables have.
fn common(batch: &mut Batch, config: &NetConfig) {
    let mut denied = DENIED.to_vec();
    // Other slots; if the operator chose a subnet outside of the private ranges, too.
    denied.push(config.subnet);
    batch.networks("denied", &denied);
    batch.networks("open", &config.open);
    // An answer at once: a program that waits for a time-out does not know it was policy.
    batch.chain("refuse", Chain::Plain);
    batch.rule("refuse", Rule::new().protocol(TCP).count().reset());
    batch.rule("refuse", Rule::new().count().prohibit());
}

fn refuse_denied(rule: Rule) -> Rule {
    rule.addr_in_set(Side::To, Must::Be, "denied")
        .addr_in_set(Side::To, Must::NotBe, "open")
        .jump("refuse")
}

/// The table in a slot's namespace.
pub(crate) fn slot_table(config: &NetConfig) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    batch.fresh_table();
    common(&mut batch, config);

    // Nothing but IPv4 from the guest's own address comes out of the tap.
    batch.chain("prerouting", filter(Hook::Prerouting, RAW, false));
    let from_guest = || Rule::new().link(Side::From, Must::Be, TAP);
    batch.rule("prerouting", from_guest().ipv4(Must::NotBe).count().drop());
    batch.rule(
        "prerouting",
        from_guest()
            .addr(Side::From, Must::NotBe, GUEST_ADDR)
            .count()
            .drop(),
    );

    // The egress and resolver chains are what `internet` rewrites. They look at every packet,
    // not only at a connection's first, so that a change cuts what is open.
    batch.chain("egress", Chain::Plain);
    batch.chain("resolver", Chain::Plain);
    batch.chain("forward", filter(Hook::Forward, FILTER, true));
    batch.rule(
        "forward",
        from_guest().link(Side::To, Must::Be, OUT).jump("egress"),
    );
    batch.rule("forward", from_guest().jump("refuse"));
    batch.rule(
        "forward",
        Rule::new()
            .link(Side::To, Must::Be, TAP)
            .state(CT_KNOWN)
            .accept(),
    );

    batch.chain("input", filter(Hook::Input, FILTER, true));
    // Answers to the agent's connections into the guest, whose sockets are in this namespace.
    batch.rule("input", from_guest().state(CT_KNOWN).accept());
    batch.rule(
        "input",
        from_guest()
            .addr(Side::To, Must::Be, GATEWAY_ADDR)
            .jump("resolver"),
    );
    batch.rule("input", from_guest().jump("refuse"));

    // Sockets of this namespace talk to the guest and to nobody else. What is left of an
    // earlier tenant's connection is invalid since they were forgotten, and must not reach
    // the next guest as a retransmission.
    batch.chain("output", filter(Hook::Output, FILTER, true));
    batch.rule(
        "output",
        Rule::new()
            .link(Side::To, Must::Be, TAP)
            .state(CT_INVALID)
            .drop(),
    );
    batch.rule("output", Rule::new().link(Side::To, Must::Be, TAP).accept());

    batch.chain(
        "postrouting",
        Chain::Nat {
            hook: Hook::Postrouting,
            priority: SOURCE_NAT,
        },
    );
    batch.rule(
        "postrouting",
        Rule::new().link(Side::To, Must::Be, OUT).masquerade(),
    );

    fill_internet(&mut batch, config.internet);
    batch
}

/// A change of [`slot_table`]: the public internet on or off. Off closes the resolver too,
/// for names can carry data out as well as packets can.
pub(crate) fn slot_internet(config: &NetConfig, on: bool) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    batch.flush_chain("egress");
    batch.flush_chain("resolver");
    fill_internet(&mut batch, on);
    batch
}

fn fill_internet(batch: &mut Batch, on: bool) {
    if !on {
        batch.rule("egress", Rule::new().jump("refuse"));
        batch.rule("resolver", Rule::new().jump("refuse"));
        return;
    }
    batch.rule("egress", refuse_denied(Rule::new()));
    // An untracked packet would leave untranslated. Most often it belongs to a connection from
    // before a pause: the reset tells the program to connect anew.
    batch.rule("egress", Rule::new().state(CT_INVALID).jump("refuse"));
    batch.rule("egress", Rule::new().accept());
    for protocol in [UDP, TCP] {
        batch.rule("resolver", Rule::new().port(protocol, DNS_PORT).accept());
    }
}

/// The table on the host.
pub(crate) fn host_table(config: &NetConfig) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    let ours = format!("{}-", config.name_prefix);
    let from_slot = || Rule::new().link_starts(Side::From, Must::Be, &ours);
    let to_slot = || Rule::new().link_starts(Side::To, Must::Be, &ours);

    batch.fresh_table();
    common(&mut batch, config);

    batch.chain("prerouting", filter(Hook::Prerouting, RAW, false));
    batch.rule("prerouting", from_slot().ipv4(Must::NotBe).count().drop());
    batch.rule(
        "prerouting",
        from_slot()
            .addr_in(Side::From, Must::NotBe, config.subnet)
            .count()
            .drop(),
    );

    // Every address of the host, public ones included, arrives here and not in `forward`.
    batch.chain("input", filter(Hook::Input, FILTER, false));
    batch.rule("input", from_slot().state(CT_KNOWN).accept());
    batch.rule("input", from_slot().jump("refuse"));

    batch.chain("forward", filter(Hook::Forward, FILTER, false));
    batch.rule(
        "forward",
        from_slot()
            .link_starts(Side::To, Must::Be, &ours)
            .jump("refuse"),
    );
    batch.rule("forward", refuse_denied(from_slot()));
    batch.rule("forward", to_slot().state(CT_KNOWN).accept());
    batch.rule("forward", to_slot().count().drop());

    batch.chain(
        "postrouting",
        Chain::Nat {
            hook: Hook::Postrouting,
            priority: SOURCE_NAT,
        },
    );
    batch.rule(
        "postrouting",
        Rule::new()
            .addr_in(Side::From, Must::Be, config.subnet)
            .link_starts(Side::To, Must::NotBe, &ours)
            .masquerade(),
    );
    batch
}

/// Private subnets to suggest when the configured one is taken.
pub(crate) fn subnet_candidates() -> impl Iterator<Item = Ipv4Net> {
    (200..=250)
        .rev()
        .filter_map(|second| Ipv4Net::new(Ipv4Addr::new(10, second, 0, 0), 16))
}
