//! Sandboxes: one owner task each, found through the manager.

mod bond;
mod death;
mod diff;
mod everything;
mod handle;
mod journal;
mod manager;
mod merging;
mod network;
mod owner;
mod paused;
mod rehearsal;
mod room;
mod shown;
mod transitions;

pub use bond::{Bond, Fate};
pub use death::cpu_ms;
pub use diff::{Against, Diffs};
pub use everything::Everything;
pub use handle::{Certificate, Handle, Live, Order, Resume};
pub use journal::Journal;
pub use manager::{CreateSandbox, Manager};
pub use network::NetworkRules;
pub use owner::Common;
pub use paused::Paused;

use std::fmt;

use wrenn_snapshot::{SnapshotError, SnapshotId};
use wrenn_types::{SandboxId, SandboxState};

use crate::capacity::CapacityError;
use crate::guest::GuestError;
use crate::machine::MachineError;
use crate::template::TemplateError;

/// Why a sandbox could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// This host has no such sandbox.
    #[error("there is no sandbox {0} on this host")]
    NotFound(SandboxId),
    /// It is not in a state for that.
    #[error("sandbox {id} is {state}: it must be running for that")]
    NotRunning {
        /// Which one.
        id: SandboxId,
        /// What it is doing instead.
        state: SandboxState,
    },
    /// The host has no room.
    #[error(transparent)]
    Capacity(#[from] CapacityError),
    /// Its template cannot be had.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Its machine cannot be had.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its guest agent failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Its guest agent does not answer, and it can only be saved with its help.
    #[error("nothing was saved, and the sandbox runs on: {0}")]
    Unresponsive(#[source] GuestError),
    /// Its journal cannot be kept.
    #[error("cannot keep the journal of sandbox {id}: {source}")]
    Journal {
        /// Whose.
        id: SandboxId,
        /// What the system said.
        source: std::io::Error,
    },
    /// It failed earlier, for this reason.
    #[error("sandbox {id} could not be started: {reason}")]
    Failed {
        /// Which one.
        id: SandboxId,
        /// What was said then.
        reason: String,
    },
    /// A snapshot could not be written or read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It has no such snapshot to go back to.
    #[error("sandbox {id} has no snapshot {snapshot} of itself to go back to")]
    ForeignSnapshot {
        /// Which sandbox.
        id: SandboxId,
        /// What was asked for.
        snapshot: SnapshotId,
    },
    /// It cannot be compared.
    #[error("{0} cannot be compared: {1}")]
    NotComparable(SandboxId, &'static str),
    /// What it is to reach cannot be read.
    #[error(transparent)]
    Network(#[from] wrenn_net::PolicyError),
    /// Its machine died while something was under way in it.
    #[error("the machine of sandbox {id} died while this was under way: {reason}")]
    Died {
        /// Which one.
        id: SandboxId,
        /// One word for the class of the reason.
        cause: &'static str,
        /// Its death certificate's reason.
        reason: String,
    },
    /// It ended while something was under way in it.
    #[error("sandbox {id} ended while this was under way: {reason}")]
    Over {
        /// Which one.
        id: SandboxId,
        /// Why.
        reason: String,
    },
    /// It was paused while something was under way in it that does not outlast that.
    #[error("sandbox {0} was paused while this was under way: resume it and ask again")]
    PutAway(SandboxId),
    /// It went on as another machine while something was under way in it.
    #[error(
        "sandbox {0} was put back to another moment, or booted, while this was under way: ask again"
    )]
    Replaced(SandboxId),
    /// Something was cut short.
    #[error("{0}")]
    Broken(String),
    /// The host drains.
    #[error("this host drains and starts nothing: `wrenn drain --off` ends that")]
    Draining,
    /// The agent is ending.
    #[error("this host agent is ending and starts nothing new")]
    Ending,
}

/// Why a port of a sandbox could not be reached.
#[derive(Debug)]
pub enum DialFailure {
    /// No such sandbox here.
    NotFound,
    /// It is not running.
    NotRunning,
    /// Nothing listens on that port.
    PortClosed(std::io::Error),
}

impl fmt::Display for DialFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DialFailure::NotFound => f.write_str("there is no such sandbox"),
            DialFailure::NotRunning => f.write_str("the sandbox is not running"),
            DialFailure::PortClosed(e) => write!(f, "nothing listens on that port: {e}"),
        }
    }
}

impl std::error::Error for DialFailure {}
