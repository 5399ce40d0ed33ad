//! Programs in the sandbox: start, follow, feed, signal.
//!
//! ```text
//!   Start ──▶ spawn ──▶ program ──stdout, stderr, terminal──▶ pump ──▶ output log
//!               │                                                        │   │
//!               └▶ supervisor: pidfd ─▶ reap ─▶ drain ─▶ end ────────────┘   ├▶ reader: Start
//!                  deadline ─▶ kill the group                                └▶ reader: Connect …
//! ```
//!
//! A program belongs to no stream: when all readers go, it runs on. Its exit is kept for
//! [`ended::RETENTION`] after the end, for those who connect late. It survives the agent too:
//! see [`crate::handover`].

mod adopted;
pub mod ended;
pub mod event;
pub mod exit;
mod input;
pub mod output;
mod pump;
mod service;
mod spawn;
mod stream;
pub mod table;

pub use self::service::ProcessService;
