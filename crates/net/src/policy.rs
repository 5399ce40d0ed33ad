//! What a guest may reach, as nftables tables: one in each slot's namespace, one on the host.
//!
//! Both enforce the same denials, so that a mistake in one of them opens nothing. The slot's
//! table knows the guest (its address, its resolver, whether it has internet); the host's
//! knows the host (its own addresses, and what it translates to others, such as a published
//! container port that looks public before routing).
//!
//! The slot's table also knows what the sandbox's owner wishes ([`NetworkPolicy`]). Its chains
//! `egress`, `ingress`, `resolver` and `openings` and its sets `allow` and `deny` are what a
//! change rewrites, in one transaction. They look at every packet, not only at a connection's
//! first, so that a change cuts what is open.
//!
//! Whatever is refused is noted in sets, by destination, port and reason, with a counter and a
//! lifetime that each refusal renews: the kernel keeps the list, and it is read when somebody
//! asks ([`crate::denials`]).
//!
//! An address that a name on the allow list was resolved to is opened by the resolver relay,
//! which has no rights: it sends a datagram that carries the address and the number of the
//! policy in force, from a port of the slot that only it has, and the chain `openings` puts the
//! two into the set `opened` and drops the datagram. What a guest sends never passes there. Only
//! what was opened under the number in force is open: emptying the set in the same transaction
//! would not do, as a packet that the old rules renew an element for, while the new ones are
//! being prepared, makes a new element, which stays (Linux looks for one that both the old and
//! the new rules have, `NFT_GENMASK_ANY` in `nft_set_hash.c`).
//!
//! ```text
//!  guest ──▶ tap0 │ slot: prerouting ─ forward ─ egress ─ masquerade │ out0 ──▶ wrenn-7 │ host
//!                 │        └ input: resolver only                    │   forward, input, masquerade
//! ```

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::config::{GATEWAY_ADDR, GUEST_ADDR, Ipv4Net, NetConfig};
use crate::denials::Reason;
use crate::egress::{NetworkPolicy, Resolves};
use crate::nft::{
    Batch, CT_ESTABLISHED, CT_INVALID, CT_KNOWN, CT_NEW, Chain, Field, Hook, Must, Rule, Side, TCP,
    UDP,
};

/// The guest's end of a slot.
pub(crate) const TAP: &str = "tap0";
/// The host's end of a slot, seen from inside.
pub(crate) const OUT: &str = "out0";
/// The port of the resolver.
pub(crate) const DNS_PORT: u16 = 53;
/// The port from which the relay opens addresses.
pub(crate) const OPENINGS_PORT: u16 = 5300;
/// The addresses that are open by name, each with the policy's number.
const OPENED: &str = "opened";
/// What such a datagram is: the policy's number and the address, after the 8 bytes of UDP's own.
const OPENING_GENERATION: u32 = 8;
const OPENING_ADDR: u32 = 12;

/// How long a guest may keep an address it has resolved by name, at most: the relay shortens
/// what resolvers say.
pub(crate) const NAME_KEPT: Duration = Duration::from_secs(300);
/// How long that address is open: as long as it may be kept, and the time to connect. Packets
/// of a connection renew it.
const NAME_OPEN: Duration = Duration::from_secs(360);
/// Addresses open by name at the same time.
const MOST_NAMED: u32 = 4096;

/// Refusals: those of TCP and UDP, which have ports, and of other protocols.
pub(crate) const REFUSED: &str = "refused";
pub(crate) const REFUSED_OTHER: &str = "refused_other";
/// How long a refusal is remembered.
pub(crate) const REFUSAL_KEPT: Duration = Duration::from_secs(3600);
/// Different refusals remembered of one guest, and of all guests by the host's table.
const MOST_REFUSALS: u32 = 1024;
const MOST_REFUSALS_OF_HOST: u32 = 16 * 1024;
/// What a refusal is noted by. In the host's table guests are told apart by their slot's
/// address, in a slot's the mark says why.
pub(crate) const SLOT_FIELDS: [Field; 4] = [Field::To, Field::Protocol, Field::Mark, Field::Port];
pub(crate) const HOST_FIELDS: [Field; 4] = [Field::From, Field::To, Field::Protocol, Field::Port];

/// Networks no guest may reach: everything that is not public unicast (IANA IPv4 special-purpose
/// registry, RFC 6890), and the one public address clouds use for their own services.
pub(crate) const DENIED: [Ipv4Net; 16] = [
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
fn common(batch: &mut Batch, config: &NetConfig, fields: &[Field; 4], most: u32) {
    let mut denied = DENIED.to_vec();
    // Other slots; if the operator chose a subnet outside of the private ranges, too.
    denied.push(config.subnet);
    batch.networks("denied", &denied);
    batch.networks("open", &config.open);
    // Without the port, which is last.
    let [first, second, third, _] = *fields;
    let portless = [first, second, third];
    batch.noted(REFUSED, fields, most, REFUSAL_KEPT);
    batch.noted(REFUSED_OTHER, &portless, most, REFUSAL_KEPT);
    // An answer at once: a program that waits for a time-out does not know it was policy.
    batch.chain("answer", Chain::Plain);
    batch.rule(
        "answer",
        Rule::new().protocol(Must::Be, TCP).count().reset(),
    );
    batch.rule("answer", Rule::new().count().prohibit());
    // Noted first, in rules of their own: they end where a set is full.
    batch.chain("refuse", Chain::Plain);
    for protocol in [TCP, UDP] {
        let noted = Rule::new().protocol(Must::Be, protocol);
        batch.rule("refuse", noted.note(REFUSED, fields));
    }
    let other = Rule::new()
        .protocol(Must::NotBe, TCP)
        .protocol(Must::NotBe, UDP);
    batch.rule("refuse", other.note(REFUSED_OTHER, &portless));
    batch.rule("refuse", Rule::new().jump("answer"));
}

fn refuse_denied(rule: Rule) -> Rule {
    refuse(
        rule.addr_in_set(Side::To, Must::Be, "denied")
            .addr_in_set(Side::To, Must::NotBe, "open"),
        Reason::Forbidden,
    )
}

fn refuse(rule: Rule, reason: Reason) -> Rule {
    rule.mark(reason.mark()).jump("refuse")
}

/// The table in a slot's namespace.
pub(crate) fn slot_table(config: &NetConfig, policy: &NetworkPolicy, generation: u32) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    batch.fresh_table();
    common(&mut batch, config, &SLOT_FIELDS, MOST_REFUSALS);
    batch.changing_networks("allow", &policy.allow);
    batch.changing_networks("deny", &policy.deny);
    batch.noted(OPENED, &[Field::Mark, Field::To], MOST_NAMED, NAME_OPEN);

    // Nothing but IPv4 from the guest's own address comes out of the tap.
    batch.chain("prerouting", filter(Hook::Prerouting, RAW, false));
    let from_guest = || Rule::new().link(Side::From, Must::Be, TAP);
    let to_guest = || Rule::new().link(Side::To, Must::Be, TAP);
    batch.rule("prerouting", from_guest().ipv4(Must::NotBe).count().drop());
    batch.rule(
        "prerouting",
        from_guest()
            .addr(Side::From, Must::NotBe, GUEST_ADDR)
            .count()
            .drop(),
    );

    admitted(&mut batch, config);
    for chain in CHANGING {
        batch.chain(chain, Chain::Plain);
    }
    batch.chain("forward", filter(Hook::Forward, FILTER, true));
    let bandwidth = config.limits.bytes_per_sec;
    let too_fast = |rule: Rule, per_second: u64| {
        let burst = u32::try_from(per_second / 4).unwrap_or(u32::MAX);
        rule.bytes_faster_than(per_second, burst.max(SMALLEST_BURST))
            .count()
            .drop()
    };
    if let Some(per_second) = bandwidth {
        batch.rule("forward", too_fast(from_guest(), per_second));
        batch.rule("forward", too_fast(to_guest(), per_second));
    }
    batch.rule(
        "forward",
        from_guest().link(Side::To, Must::Be, OUT).jump("egress"),
    );
    batch.rule("forward", refuse(from_guest(), Reason::Forbidden));
    batch.rule("forward", to_guest().state(CT_KNOWN).jump("ingress"));

    batch.chain("input", filter(Hook::Input, FILTER, true));
    // Answers to the agent's connections into the guest, whose sockets are in this namespace.
    batch.rule("input", from_guest().state(CT_KNOWN).accept());
    batch.rule(
        "input",
        from_guest()
            .addr(Side::To, Must::Be, GATEWAY_ADDR)
            .jump("resolver"),
    );
    batch.rule("input", refuse(from_guest(), Reason::Forbidden));

    // Sockets of this namespace talk to the guest and to nobody else. What is left of an
    // earlier tenant's connection is invalid since they were forgotten, and must not reach
    // the next guest as a retransmission.
    batch.chain("output", filter(Hook::Output, FILTER, true));
    batch.rule(
        "output",
        Rule::new()
            .port(Side::From, UDP, OPENINGS_PORT)
            .jump("openings"),
    );
    batch.rule("output", to_guest().state(CT_INVALID).drop());
    batch.rule("output", to_guest().accept());

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

    fill(&mut batch, policy, generation);
    batch
}

/// The least that may be sent at once: some packets as large as the kernel makes them.
const SMALLEST_BURST: u32 = 256 * 1024;

/// The chain where what the policy lets through meets the limits. Its counts must survive
/// changes of policy.
fn admitted(batch: &mut Batch, config: &NetConfig) {
    batch.chain("admitted", Chain::Plain);
    let new = || Rule::new().state(CT_NEW);
    if let Some(per_second) = config.limits.connections_per_sec {
        let rule = new().packets_faster_than(u64::from(per_second), per_second.saturating_mul(2));
        batch.rule("admitted", refuse(rule, Reason::ConnectionRate));
    }
    if let Some(most) = config.limits.connections {
        let rule = new().more_connections_than(most);
        batch.rule("admitted", refuse(rule, Reason::ConnectionLimit));
    }
    batch.rule("admitted", Rule::new().accept());
}

const CHANGING: [&str; 4] = ["egress", "ingress", "resolver", "openings"];

/// A change of [`slot_table`] to another policy. What was opened by name under another number is
/// closed; `forget_names` makes room for what is opened under a new one.
pub(crate) fn slot_change(
    config: &NetConfig,
    policy: &NetworkPolicy,
    generation: u32,
    forget_names: bool,
) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    for chain in CHANGING {
        batch.flush_chain(chain);
    }
    batch.replace_networks("allow", &policy.allow);
    batch.replace_networks("deny", &policy.deny);
    if forget_names {
        batch.empty_set(OPENED);
    }
    fill(&mut batch, policy, generation);
    batch
}

/// A change of [`slot_table`] for the next tenant: nothing of the last one's is left.
pub(crate) fn forget_refusals(config: &NetConfig) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    batch.empty_set(REFUSED);
    batch.empty_set(REFUSED_OTHER);
    batch
}

fn fill(batch: &mut Batch, policy: &NetworkPolicy, generation: u32) {
    // As its bytes are in a datagram.
    let number = u32::from_ne_bytes(generation.to_be_bytes());
    let to_opened = [Field::Mark, Field::To];
    let to_one_of = |set| Rule::new().addr_in_set(Side::To, Must::Be, set);
    batch.rule("egress", refuse_denied(Rule::new()));
    // An untracked packet would leave untranslated. Most often it belongs to a connection from
    // before a pause: the reset tells the program to connect anew.
    batch.rule("egress", Rule::new().state(CT_INVALID).jump("answer"));
    batch.rule("egress", to_one_of("allow").jump("admitted"));
    batch.rule("egress", Rule::new().mark(number));
    let to_name = || Rule::new().ipv4(Must::Be).in_set(OPENED, &to_opened);
    batch.rule(
        "egress",
        to_name()
            .state(CT_ESTABLISHED)
            .renew(OPENED, &to_opened)
            .jump("admitted"),
    );
    batch.rule("egress", to_name().jump("admitted"));
    batch.rule("egress", refuse(to_one_of("deny"), Reason::Denied));
    // What comes back, for who only listens is not cut by what he sends.
    let opened_to = |set| Rule::new().in_set(set, &[Field::OpenedTo]);
    batch.rule("ingress", opened_to("allow").accept());
    let opened_to_name = Rule::new()
        .mark(number)
        .in_set(OPENED, &[Field::Mark, Field::OpenedTo]);
    batch.rule("ingress", opened_to_name.accept());
    batch.rule("ingress", opened_to("deny").count().drop());
    if policy.internet {
        batch.rule("egress", Rule::new().jump("admitted"));
        batch.rule("ingress", Rule::new().accept());
    } else {
        batch.rule("egress", refuse(Rule::new(), Reason::InternetOff));
        batch.rule("ingress", Rule::new().count().drop());
    }
    if policy.resolves() == Resolves::Nothing {
        let reason = if policy.internet {
            Reason::Denied
        } else {
            Reason::InternetOff
        };
        batch.rule("resolver", refuse(Rule::new(), reason));
    } else {
        for protocol in [UDP, TCP] {
            batch.rule(
                "resolver",
                Rule::new().port(Side::To, protocol, DNS_PORT).accept(),
            );
        }
    }
    // An opening on behalf of an earlier policy is none.
    batch.rule(
        "openings",
        Rule::new()
            .datagram_has(OPENING_GENERATION, generation)
            .mark(number)
            .renew(OPENED, &[Field::Mark, Field::Carried(OPENING_ADDR)])
            .count()
            .drop(),
    );
    batch.rule("openings", Rule::new().count().drop());
}

/// The table on the host.
pub(crate) fn host_table(config: &NetConfig) -> Batch {
    let mut batch = Batch::new(&config.name_prefix);
    let ours = format!("{}-", config.name_prefix);
    let from_slot = || Rule::new().link_starts(Side::From, Must::Be, &ours);
    let to_slot = || Rule::new().link_starts(Side::To, Must::Be, &ours);

    batch.fresh_table();
    common(&mut batch, config, &HOST_FIELDS, MOST_REFUSALS_OF_HOST);

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
    batch.rule(
        "forward",
        from_slot()
            .addr_in_set(Side::To, Must::Be, "denied")
            .addr_in_set(Side::To, Must::NotBe, "open")
            .jump("refuse"),
    );
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
