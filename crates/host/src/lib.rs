//! The host agent: owns the virtual machines of one computer.
//!
//! ```text
//!  HostAgent ── Manager ── one Owner task per sandbox ── Machine (VM + slot + folder + guest client)
//!     │            ▲                                        ▲
//!     │            └── rpc: HostService                     │ taken from
//!     ├── TemplateStore: images booted once, warmed, frozen │
//!     └── Pool: machines restored, warmed and stopped ──────┘
//! ```
//!
//! The life of a sandbox, as its owner sees it:
//!
//! ```text
//!                    ┌─▶ Snapshotting ─┐
//!                    └───────┬─────────┘ snapshot, fork
//!  create ─▶ Starting ──▶ Running ──▶ Stopping ─▶ Stopped   by request, or its time was over
//!                │         │  ▲  └────────────▶ Error       its machine died
//!                │  Pausing┘  └Resuming                     by request, its time, or traffic
//!                │         └▶ Paused ─▶ Stopping ─▶ Stopped
//!                └──────────────────────────▶ Error         it could not be started
//! ```
//!
//! A machine's life hangs on no request and not on this process either: QEMU runs under a
//! keeper in its own session, and [`HostAgent::start`] adopts what an earlier agent left.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod activity;
mod agent;
pub mod capacity;
pub mod cgroups;
mod config;
mod diff;
mod drain;
mod events;
mod guest;
mod images;
mod lifetime;
mod machine;
mod metrics;
mod pool;
pub mod remote;
mod rpc;
mod sandbox;
mod snapshots;
mod template;

pub use activity::InUse;
pub use agent::{AgentError, HostAgent, InProcessHost};
pub use config::{HostConfig, network_prefix};
pub use drain::draining_since;
pub use images::{ImageUse, PruneError, PruneReport, image_uses, prune_images};
pub use machine::{SweepError, SweepReport, crash_by, serve_pages, sweep};
pub use sandbox::{DialFailure, Everything, SandboxError};
pub use template::TemplateError;
