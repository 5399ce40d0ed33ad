//! The guest agent: what a program or a person does inside a sandbox goes through here.
//!
//! ```text
//!   connection ── server ── auth ──┬─ process      start, follow, feed, signal
//!   (epoch)       (own      (token,│  filesystem   stat, list, move, watch
//!                  accept    user) │  files        bytes up and down
//!                  loop)           └─ host         restore hook, quiesce, health
//!                                       └─ ports   loopback listeners made reachable
//! ```
//!
//! One [`state::State`] holds what the restore hook changes: token, identity, defaults.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod auth;
pub mod cgroups;
pub mod files;
pub mod filesystem;
pub mod handover;
pub mod host;
pub mod ports;
pub mod process;
pub mod server;
pub mod state;
pub mod sys;
pub mod users;
