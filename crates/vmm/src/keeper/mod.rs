//! The process that stands between the agent and a machine's monitor, and outlives the agent.
//!
//! ```text
//! agent ── spawn, stdin = channel ──▶ keeper
//!       ── orders + descriptors ────▶   │ own session, drops to the machine's uid
//!                                       ├── spawn ──▶ monitor, in its jail (dies with the keeper)
//!       ◀── started: pids ───────────   │
//!  writes machine.json                  │
//!       ── commit ──────────────────▶   │ closes the channel; from here on its own
//!                                       │ console pipe ─▶ console.log, bounded
//!                                       │ companions (DNS relay) in a thread
//!                                       ▼ monitor ends: writes exit.json, exits
//! ```
//!
//! If the agent dies before the commit, the keeper ends the monitor: no machine is left
//! that no `machine.json` names. Each monitor is locked in a jail (`jail.rs`) that shows it what
//! it needs of the host and nothing else. QEMU gets all else as descriptors, so that the machine's
//! user needs no right in the machine's folder; Firecracker opens paths in its jail.

mod console;
mod jail;
mod orders;
mod run;
mod start;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use orders::{Bind, Console, FIRST_FD, Jail, SERIAL_FD};
pub use run::main;
pub(crate) use run::unix_ms;
pub(crate) use start::Start;

/// How long a keeper may take to start its monitor, on the reference machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

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
