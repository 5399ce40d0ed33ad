//! The page server: gives a virtual machine its memory page by page, from a snapshot's layers,
//! through userfaultfd(2).
//!
//! ```text
//!                     ┌────────────── one page server per machine ─────────────┐
//!  monitor ──uffd───▶ │ server thread: events, faults, all placing of pages    │
//!  (Firecracker)      │    ▲ batches                                           │
//!                     │ feeder thread: reads working set, then everything else │ ◀── snapshot
//!  agent ──control──▶ │ housekeeper: control socket, status file, working set  │
//!                     └────────────────────────────────────────────────────────┘
//! ```
//!
//! The monitor connects to a Unix socket and hands its memory over ([`HandshakeError`] tells
//! what may be wrong with that). From then on it depends on this process, so this process is
//! its own ([`serve`] with a [`Config`] that came on a descriptor), needs no agent, and ends
//! the monitor before it gives up: a page that cannot be read, verified or placed is the end
//! of the machine, with a reason in the [`Status`], never a hang and never a wrong content.
//! The reverse cannot be done here: who starts both ends the monitor when this process dies.
//!
//! What is brought before it is asked for ([`Policy`]) changes when a page arrives, never what
//! is in it: see [`serve`]'s server module for why that holds for removed pages too.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod base;
mod config;
mod error;
mod feeder;
mod handshake;
mod house;
mod kernel;
mod layers;
mod monitor;
mod regions;
mod serve;
mod server;
mod settled;
mod status;
mod throttle;
mod working_set;

pub use base::SealedBase;
pub use config::{BaseConfig, Config, Policy, Record};
pub use error::ServeError;
pub use handshake::{HandshakeError, message_is_whole};
pub use house::{Request, ask};
pub use regions::{RegionError, Regions};
pub use serve::serve;
pub use status::{Counts, State, Status};
pub use working_set::{WorkingSet, WorkingSetError};
