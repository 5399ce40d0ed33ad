//! From pipes and terminals into the log, and from a program's end to its exit event.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::exit::Exit;
use super::output::{Channel, Log};
use super::table::{Process, Table};

/// What a pipe holds once a program has shown that it writes much.
const BIG_PIPE: usize = 256 * 1024;
/// Descendants may hold the pipes open after the program's end. Its own output is all
/// there by then; theirs is waited for as long as it keeps coming …
const QUIET: Duration = Duration::from_millis(300);
/// … but no longer than this.
const DRAIN: Duration = Duration::from_secs(5);

/// A descriptor of ours that does not block.
pub(super) fn nonblocking(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    crate::sys::async_fd(fd).map_err(|(_, error)| error)
}

/// One pipe or terminal of a program, and the task that empties it.
pub(super) struct Pump {
    source: Arc<AsyncFd<OwnedFd>>,
    task: JoinHandle<()>,
}

impl Pump {
    /// Begins to carry output from `source` into the log.
    pub(super) fn start(source: Arc<AsyncFd<OwnedFd>>, channel: Channel, log: &Arc<Log>) -> Pump {
        let task = tokio::spawn(pump(Arc::clone(&source), channel, Arc::clone(log)));
        Pump { source, task }
    }

    /// Bytes that wait to be read, and will be.
    fn unread(&self) -> u64 {
        if self.task.is_finished() {
            return 0;
        }
        // A terminal whose program is gone may not say; then there is nothing.
        rustix::io::ioctl_fionread(self.source.get_ref()).unwrap_or(0)
    }
}

/// Carries output from `source` into the log until its end.
async fn pump(source: Arc<AsyncFd<OwnedFd>>, channel: Channel, log: Arc<Log>) {
    let max = channel.max_chunk();
    let mut buffer = Vec::new();
    let mut grown = channel == Channel::Pty;
    loop {
        log.room().await;
        let Ok(mut ready) = source.ready(Interest::READABLE).await else {
            return;
        };
        buffer.reserve_exact(max - buffer.len());
        let outcome = fill(source.get_ref(), &mut buffer, channel);
        if buffer.is_empty() {
            match outcome {
                Fill::More => {}
                Fill::Empty => {
                    ready.clear_ready();
                    // An idle program costs no buffer.
                    buffer = Vec::new();
                }
                Fill::End => return,
            }
            continue;
        }
        let full = buffer.len() == max;
        let data = if buffer.len() >= max / 2 {
            Bytes::from(std::mem::take(&mut buffer))
        } else {
            let data = Bytes::copy_from_slice(&buffer);
            buffer.clear();
            data
        };
        log.push(channel, data);
        if full && !grown {
            grown = true;
            // Refused where a user has too many big pipes; the small one works too.
            let _ = rustix::pipe::fcntl_setpipe_size(source.get_ref(), BIG_PIPE);
        }
        match outcome {
            Fill::More => tokio::task::coop::consume_budget().await,
            Fill::Empty => {
                ready.clear_ready();
                buffer = Vec::new();
            }
            Fill::End => return,
        }
    }
}

enum Fill {
    /// There may be more.
    More,
    /// Nothing more for now.
    Empty,
    End,
}

/// Reads once from a pipe; from a terminal, whose driver gives a few hundred bytes at a
/// time, as long as there is something.
fn fill(fd: &OwnedFd, buffer: &mut Vec<u8>, channel: Channel) -> Fill {
    loop {
        match rustix::io::read(fd, rustix::buffer::spare_capacity(buffer)) {
            Ok(0) => return Fill::End,
            Ok(_) if channel == Channel::Pty && buffer.len() < buffer.capacity() => {}
            Ok(_) => return Fill::More,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Fill::Empty,
            // The other side of a terminal is closed (EIO). Nothing else can happen to a
            // pipe of ours.
            Err(_) => return Fill::End,
        }
    }
}

/// How a program's end is learnt.
pub(super) enum Death {
    /// From the kernel: it is our child.
    Child(AsyncFd<OwnedFd>),
    /// From init, whose child it has become.
    Orphan(tokio::sync::oneshot::Receiver<Exit>),
    /// From init, before we were there.
    Known(Exit),
}

impl Death {
    /// Waits for it; `None` is a false alarm.
    async fn wait(&mut self, process: &Process) -> Option<Exit> {
        match self {
            Death::Child(pidfd) => {
                let ready = pidfd.readable().await;
                let exit = process.reap(pidfd.get_ref().as_fd());
                if exit.is_none()
                    && let Ok(mut guard) = ready
                {
                    guard.clear_ready();
                }
                exit
            }
            Death::Orphan(told) => {
                // Init says it of all that it keeps; where it cannot, nobody knows.
                let exit = told.await.unwrap_or(Exit::Lost);
                process.reaped();
                Some(exit)
            }
            Death::Known(exit) => Some(*exit),
        }
    }
}

/// Follows a program to its end: reaps it, kills its group at the deadline, lets its
/// output drain, and marks the end.
pub(super) async fn supervise(
    process: Arc<Process>,
    mut death: Death,
    pumps: Vec<Pump>,
    deadline: Option<Instant>,
    table: Arc<Table>,
) {
    let exit = loop {
        let due = async {
            match deadline {
                Some(at) if !process.timed_out() => tokio::time::sleep_until(at).await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            exit = death.wait(&process) => {
                if let Some(exit) = exit {
                    break exit;
                }
            }
            () = due => process.kill_for_deadline(),
        }
    };
    drop(death);
    drain(&process.log, pumps).await;
    process.close_input().await;
    process.forget();
    // First the table, then the end: who sees the end finds the process gone.
    table.ended(&process, exit);
    process.log.finish(exit);
}

/// Waits for what the program has left in its pipes, all of it, however busy the host is; and
/// for what descendants write, within bounds.
async fn drain(log: &Log, mut pumps: Vec<Pump>) {
    let unread = |pumps: &[Pump]| pumps.iter().map(Pump::unread).sum::<u64>();
    // Counted before the log is asked: what moves in between is counted twice, not never.
    let left = unread(&pumps);
    let own = log.progress().0 + left;
    let mut until = Instant::now() + DRAIN;
    loop {
        let (before, _) = log.progress();
        let all = async {
            for pump in &mut pumps {
                if !pump.task.is_finished() {
                    // A pump does not panic, and is never aborted.
                    let _ = (&mut pump.task).await;
                }
            }
        };
        if tokio::time::timeout(QUIET, all).await.is_ok() {
            return;
        }
        let (after, blocked) = log.progress();
        let waiting = unread(&pumps);
        let quiet = after == before && waiting == 0;
        if blocked {
            until = Instant::now() + DRAIN;
        } else if quiet || (after >= own && Instant::now() >= until) {
            return;
        }
    }
}
