//! The process that stands between the agent and a machine's monitor, and outlives the agent.
//!
//! ```text
//! agent ── spawn, stdin = channel ──▶ keeper
//!       ── orders + descriptors ────▶   │ own session, drops to the machine's uid
//!                                       ├── spawn ──▶ monitor (dies with the keeper)
//!       ◀── started: pids ───────────   │
//!  writes machine.json                  │
//!       ── commit ──────────────────▶   │ closes the channel; from here on its own
//!                                       │ console pipe ─▶ console.log, bounded
//!                                       │ companions (DNS relay) in a thread
//!                                       ▼ monitor ends: writes exit.json, exits
//! ```
//!
//! If the agent dies before the commit, the keeper ends the monitor: no machine is left
//! that no `machine.json` names. All files come as descriptors, so that the machine's user
//! needs no right in the machine's folder.

mod console;
mod orders;
mod run;

use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) use orders::{Channel, Commit, FIRST_FD, Orders, Report, SERIAL_FD};
pub use run::main;
pub(crate) use run::unix_ms;

/// How a keeper is started: a program that calls [`main`] first thing.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The program.
    pub program: PathBuf,
    /// What makes it a keeper.
    pub args: Vec<OsString>,
}

impl Default for Launcher {
    /// This program again, as `keeper`.
    fn default() -> Self {
        Launcher {
            program: PathBuf::from("/proc/self/exe"),
            args: vec![OsString::from("keeper")],
        }
    }
}
