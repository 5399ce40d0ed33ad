//! Why a page server could not start, or ended its VM.

use std::io;
use std::path::PathBuf;

use wrenn_snapshot::{PAGE, SnapshotError};

use crate::handshake::HandshakeError;

/// Why memory is no longer served. Where a monitor was connected, it has been killed: memory
/// that nobody serves would read as zeros.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The orders are not what this version understands, or do not fit the snapshot.
    #[error("the page server's configuration is wrong: {0}")]
    Config(String),
    /// The snapshot cannot be opened.
    #[error("the snapshot cannot be opened")]
    Snapshot(#[source] SnapshotError),
    /// Neither a snapshot nor a base was named, or a snapshot that saved only a disk.
    #[error("{0} has no memory to serve: name a snapshot of a running machine, or a base")]
    NoMemory(String),
    /// The memory a snapshot is laid over cannot be used.
    #[error("base memory {path} cannot be used: {problem}")]
    Base {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The operating system refused something.
    #[error("cannot {doing}")]
    System {
        /// What was being done, to what.
        doing: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No monitor connected in time.
    #[error("no monitor connected to {socket} within {seconds} s: is it started?")]
    NobodyCame {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// A monitor connected and sent something else than its memory.
    #[error("the monitor (process {pid}) sent no valid description of its memory, so it was ended")]
    Handshake {
        /// The monitor.
        pid: u32,
        /// What was wrong.
        #[source]
        source: HandshakeError,
    },
    /// A page cannot be read, or is not what was written.
    #[error(
        "pages {first} to {last} of the machine's memory (from byte {:#x} on) cannot be served, so the machine was ended",
        first * PAGE as u64
    )]
    Unreadable {
        /// The first page of what was read at once.
        first: u64,
        /// The last one.
        last: u64,
        /// The cause: names the file.
        #[source]
        source: SnapshotError,
    },
    /// The kernel did not take a page.
    #[error("page {page} of the machine's memory cannot be put in place, so the machine was ended")]
    Unplaceable {
        /// The page.
        page: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The monitor did to its memory what cannot be followed.
    #[error(
        "the monitor (process {pid}) {what}, which a page server cannot follow, so it was ended"
    )]
    Unsupported {
        /// The monitor.
        pid: u32,
        /// What it did.
        what: String,
    },
}

impl ServeError {
    /// Wraps what the operating system said.
    pub(crate) fn system<E: Into<io::Error>>(
        doing: impl Into<String>,
    ) -> impl FnOnce(E) -> ServeError {
        let doing = doing.into();
        move |source| ServeError::System {
            doing,
            source: source.into(),
        }
    }

    /// The error with all its causes in one line, for the status file.
    pub fn reason(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
