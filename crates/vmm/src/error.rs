//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::delta::DeltaError;
use crate::firecracker::ApiError;
use crate::machine::ExitReason;
use crate::memory::MemoryError;
use crate::qcow2::OverlayError;
use crate::qmp::QmpError;

/// Why a machine could not be made, steered or read.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// No usable monitor on this host.
    #[error("no QEMU was found: install qemu-system-x86, or name the program in WRENN_QEMU")]
    NoMonitor,
    /// Firecracker is asked for and not here.
    #[error("no Firecracker was found: install it, or name the program in FIRECRACKER_BIN")]
    NoFirecracker,
    /// A monitor that is too old or cannot be started.
    #[error("{path} cannot be used: {why}")]
    UnusableMonitor {
        /// The program.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// The accelerator that the operator asked for does not work here.
    #[error("{asked} was asked for and cannot be used: {why}")]
    Accelerator {
        /// What was asked for.
        asked: crate::Accelerator,
        /// Why it cannot be used.
        why: String,
    },
    /// The host could not be measured.
    #[error("the host cannot be measured: {what}")]
    Probe {
        /// What was measured.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The specification contradicts itself.
    #[error("the machine cannot be made: {0}")]
    Spec(String),
    /// A file of the machine could not be used.
    #[error("{what} {path}")]
    File {
        /// What was to be done, as in `cannot open the disk`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The memory could not be made or sealed.
    #[error("the machine's memory failed")]
    Memory(#[from] MemoryError),
    /// The keeper process could not be started or reported a failure.
    #[error("the machine's keeper could not start it: {0}")]
    Keeper(String),
    /// The monitor's control socket failed.
    #[error("the monitor failed on {doing}")]
    Qmp {
        /// What it was asked for.
        doing: &'static str,
        /// The cause.
        #[source]
        source: QmpError,
    },
    /// Firecracker's interface failed.
    #[error("the monitor failed on {doing}")]
    Api {
        /// What it was asked for.
        doing: &'static str,
        /// The cause.
        #[source]
        source: ApiError,
    },
    /// This monitor cannot do that at all.
    #[error("{monitor} cannot {what}: {why}")]
    Unsupported {
        /// The monitor.
        monitor: &'static str,
        /// What was asked for, as in `boot a bzImage`.
        what: &'static str,
        /// Why, and what to do.
        why: String,
    },
    /// A disk layer could not be made.
    #[error("the machine's disk failed")]
    Overlay(#[from] OverlayError),
    /// The machine ended while it was being used.
    #[error("the machine ended while {doing}: {reason}")]
    Ended {
        /// What was being done.
        doing: &'static str,
        /// How it ended.
        reason: ExitReason,
    },
    /// Loading or saving a state failed.
    #[error("the machine's state could not be {doing}: {why}")]
    State {
        /// `loaded` or `saved`.
        doing: &'static str,
        /// The monitor's words.
        why: String,
    },
    /// What a machine changed could not be read, or be brought into another.
    #[error("the machine's changes could not be {doing}")]
    Delta {
        /// `read` or `brought in`.
        doing: &'static str,
        /// The cause.
        #[source]
        source: DeltaError,
    },
    /// The machine's disk could not get a new layer.
    #[error("the machine's disk could not be switched to {path}: {why}")]
    DiskLayer {
        /// The new layer.
        path: PathBuf,
        /// Why, and what the disk is now.
        why: String,
    },
    /// The machine does not die.
    #[error("the machine's process {pid} did not end within {} s of SIGKILL", .waited.as_secs())]
    Undead {
        /// The monitor's process.
        pid: u32,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The guest showed no sign of life; made by [`crate::Machine::stalled`].
    #[error("the guest was not ready after {:.1} s; end of its console: {console}", .waited.as_secs_f64())]
    BootStalled {
        /// How long it was waited for.
        waited: Duration,
        /// The end of its console.
        console: String,
    },
    /// A process of the machine could not be read.
    #[error("cannot read {what} of process {pid}")]
    Process {
        /// What was read.
        what: &'static str,
        /// The process.
        pid: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
}
