//! Network slots: what a sandbox is plugged into.
//!
//! A slot is a network namespace with a tap, where the guest's packets arrive, and one end of
//! a veth pair, through which they leave. Every guest has the same address; what tells guests
//! apart is the slot.
//!
//! ```text
//!   guest             slot: namespace wrenn-7                    host
//!   169.254.0.21 ──── 169.254.0.22  tap0 ─ nftables ─ out0 ────── wrenn-7 ─ nftables ─ eth0
//!                      resolver relay      masquerade 10.212.0.15 10.212.0.14   masquerade
//!                      agent's sockets
//! ```
//!
//! [`SlotPool`] keeps slots ready, hands them out and recycles them. A [`Slot`] gives QEMU its
//! tap ([`Slot::open_tap`]), the [`relay`] its sockets ([`Slot::relay`]), and the agent
//! its only way into the guest ([`Slot::guest`]): connections from sockets inside the
//! namespace, so that nothing else on the host can reach a guest.
//!
//! Everything is done by netlink from this process: no helper program runs per slot, and what
//! exists can be found by name in the kernel, with no record that could disagree. A process
//! that dies leaves its slots to the machines that use them; the next one adopts those
//! ([`SlotPool::adopt`]) and sweeps the rest ([`SlotPool::sweep`]).
//!
//! What guests may reach is in `policy.rs`, the only file that knows. Each slot can be told to
//! let through less, or only this and that ([`NetworkPolicy`]), at any time; what was refused
//! can be read ([`Slot::denials`]).

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod config;
mod denials;
mod egress;
mod error;
mod host;
mod netlink;
mod netns;
mod nft;
mod notice;
mod plumbing;
mod policy;
mod pool;
mod refused;
pub mod relay;
mod route;
mod slot;
mod sweep;
mod sys;

pub use config::{
    GATEWAY_ADDR, GATEWAY_MAC, GUEST_ADDR, GUEST_MAC, GUEST_PREFIX_LEN, Ipv4Net, Limits, NetConfig,
};
pub use denials::{AT_WITHIN, Denial, Destination, Reason};
pub use egress::{MOST_ENTRIES, NamePattern, NetworkPolicy, PolicyError};
pub use error::NetError;
pub use pool::{PoolStats, SlotPool};
pub use slot::{GuestDialer, Slot};
pub use sweep::SweepReport;
