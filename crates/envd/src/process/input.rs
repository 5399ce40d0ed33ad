//! What goes into a program: its standard input or its terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Why input was not taken.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Started without standard input, or it was closed, or the program has ended.
    #[error("process {0} has no open standard input: start it with `stdin` set")]
    NoStdin(u32),
    /// Started with a terminal.
    #[error("process {0} has a terminal: send `pty` input, and end of file as control-D")]
    IsTerminal(u32),
    /// Started without one.
    #[error("process {0} has no terminal: send `stdin` input")]
    NoTerminal(u32),
    /// The program has closed its end.
    #[error("process {0} no longer reads its input")]
    Closed(u32),
    /// The kernel refused.
    #[error("writing to process {pid} failed: {source}")]
    Failed {
        /// Which process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A program's input.
#[derive(Debug)]
pub(super) enum Input {
    None,
    Pipe(AsyncFd<OwnedFd>),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

/// Writes all of `data`, waiting while the program does not read.
pub(super) async fn write_all(fd: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = fd.ready(Interest::WRITABLE).await?;
        match rustix::io::write(fd.get_ref(), data) {
            Ok(n) => data = &data[n..],
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
