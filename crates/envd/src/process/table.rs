//! The programs that run, and the exits of those that ran.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::ended::{Ended, Ends, RETENTION};
use super::exit::Exit;
use super::input::{Input, InputError, write_all};
use super::output::Log;
use crate::handover::Kept;

/// What was asked for.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// The program.
    pub cmd: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Variables of this request.
    pub envs: BTreeMap<String, String>,
    /// Working directory of this request.
    pub cwd: Option<String>,
}

/// One program.
#[derive(Debug)]
pub struct Process {
    /// Process id, session and process group.
    pub pid: u32,
    /// Name given by the client.
    pub tag: Option<String>,
    /// What was asked for.
    pub config: Config,
    /// Its output.
    pub log: Arc<Log>,
    pub(super) input: tokio::sync::Mutex<Input>,
    pub(super) terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// False once it is reaped: its number may then belong to somebody else.
    pub(super) alive: Mutex<bool>,
    /// Where it is no child of ours: the process itself. Init reaps it, and tells us later.
    pub(super) orphan: Option<OwnedFd>,
    /// What init has of it.
    pub(super) kept: Mutex<Hold>,
    pub(super) timed_out: AtomicBool,
}

/// What init keeps of a program for the agent that may have to follow us.
#[derive(Debug, Default)]
pub(super) struct Hold {
    pub(super) program: Option<Kept>,
    /// Apart, for it may be closed before the end.
    pub(super) input: Option<Kept>,
}

impl Process {
    /// Whether its request's deadline has killed it.
    pub fn timed_out(&self) -> bool {
        self.timed_out.load(Ordering::Acquire)
    }

    fn alive(&self) -> MutexGuard<'_, bool> {
        self.alive.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes its status if it has ended. Under the same lock as signals, so that none goes
    /// to a number that was given away.
    pub(super) fn reap(&self, pidfd: BorrowedFd<'_>) -> Option<Exit> {
        let mut alive = self.alive();
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(pidfd), options) {
            Ok(None) | Err(rustix::io::Errno::INTR) => None,
            Ok(Some(status)) => {
                *alive = false;
                Some(Exit::from_wait(&status))
            }
            Err(error) => {
                // Nobody else may wait for our children; if somebody did, the status is lost.
                tracing::error!(pid = self.pid, %error, "cannot read a program's exit status");
                *alive = false;
                Some(Exit::Signal {
                    number: 0,
                    dumped: false,
                })
            }
        }
    }

    /// Init has reaped it.
    pub(super) fn reaped(&self) {
        *self.alive() = false;
    }

    /// After the end there is nothing to hand over.
    pub(super) fn forget(&self) {
        let mut hold = self.hold();
        let (input, program) = (hold.input.take(), hold.program.take());
        drop(hold);
        input.into_iter().chain(program).for_each(Kept::forget);
    }

    fn hold(&self) -> MutexGuard<'_, Hold> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal to the program's whole group.
    ///
    /// # Errors
    /// `ESRCH` when it has ended, else what the kernel says.
    pub fn signal(&self, signal: Signal) -> rustix::io::Result<()> {
        let alive = self.alive();
        let Some(pid) = i32::try_from(self.pid)
            .ok()
            .and_then(Pid::from_raw)
            .filter(|_| *alive)
        else {
            return Err(rustix::io::Errno::SRCH);
        };
        if self.orphan.as_ref().is_some_and(has_ended) {
            return Err(rustix::io::Errno::SRCH);
        }
        rustix::process::kill_process_group(pid, signal)
    }

    pub(super) fn kill_for_deadline(&self) {
        self.timed_out.store(true, Ordering::Release);
        if let Err(error) = self.signal(Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::error!(pid = self.pid, %error, "cannot kill a program at its deadline");
        }
    }

    fn failed(&self, error: std::io::Error) -> InputError {
        match error.raw_os_error() {
            // A terminal whose other side is gone says EIO.
            Some(libc::EPIPE | libc::EIO) => InputError::Closed(self.pid),
            _ => InputError::Failed {
                pid: self.pid,
                source: error,
            },
        }
    }

    /// Writes to standard input; in order with other input.
    ///
    /// # Errors
    /// See [`InputError`].
    pub async fn write_stdin(&self, data: &[u8]) -> Result<(), InputError> {
        match &*self.input.lock().await {
            Input::Pipe(pipe) => write_all(pipe, data).await.map_err(|e| self.failed(e)),
            Input::Terminal(_) => Err(InputError::IsTerminal(self.pid)),
            Input::None => Err(InputError::NoStdin(self.pid)),
        }
    }

    /// Writes to the terminal; in order with other input.
    ///
    /// # Errors
    /// See [`InputError`].
    pub async fn write_terminal(&self, data: &[u8]) -> Result<(), InputError> {
        match &*self.input.lock().await {
            Input::Terminal(terminal) => {
                write_all(terminal, data).await.map_err(|e| self.failed(e))
            }
            Input::Pipe(_) | Input::None => Err(InputError::NoTerminal(self.pid)),
        }
    }

    /// End of file on standard input, once what was sent before is written.
    ///
    /// # Errors
    /// [`InputError::IsTerminal`]; closing twice is no error.
    pub async fn close_stdin(&self) -> Result<(), InputError> {
        let mut input = self.input.lock().await;
        if matches!(*input, Input::Terminal(_)) {
            return Err(InputError::IsTerminal(self.pid));
        }
        *input = Input::None;
        // Init holds the pipe open too: without this its end never comes.
        if let Some(kept) = self.hold().input.take() {
            kept.forget();
        }
        Ok(())
    }

    /// After the end: who still writes gets an error as soon as the pipe tells them.
    pub(super) async fn close_input(&self) {
        // A writer that waits for room holds the lock; the reader's end is closed, so it
        // fails with EPIPE unless a descendant holds it open. That must not delay the end.
        if let Ok(mut input) = self.input.try_lock() {
            *input = Input::None;
        }
    }

    /// Changes the terminal's size.
    ///
    /// # Errors
    /// [`InputError::NoTerminal`], or what the kernel says.
    pub fn resize(&self, cols: u16, rows: u16) -> Result<(), InputError> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or(InputError::NoTerminal(self.pid))?;
        rustix::termios::tcsetwinsize(terminal.get_ref(), window(cols, rows))
            .map_err(|error| self.failed(error.into()))
    }
}

/// A pidfd is readable once its process has ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec::default();
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1))
}

pub(super) fn window(cols: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// What a selector found.
#[derive(Debug)]
pub enum Found {
    /// It runs.
    Running(Arc<Process>),
    /// It has ended within [`RETENTION`].
    Ended(Ended),
}

/// How a client names a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selector {
    /// By process id.
    Pid(u32),
    /// By the name it was started with.
    Tag(String),
}

/// Why a selector found nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SelectError {
    /// No such process id.
    #[error("process with pid {0} not found")]
    NoPid(u32),
    /// No such tag.
    #[error("process with tag {0} not found")]
    NoTag(String),
    /// Several have this tag.
    #[error("tag {tag} names {count} processes: select one by its pid")]
    Ambiguous {
        /// The tag.
        tag: String,
        /// How many there are.
        count: usize,
    },
}

#[derive(Debug)]
struct Inner {
    running: HashMap<u32, Arc<Process>>,
    ended: Ends,
    /// Whether somebody forgets them when their time has come.
    janitor: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Table {
    inner: Mutex<Inner>,
}

impl Default for Table {
    fn default() -> Table {
        let inner = Inner {
            running: HashMap::new(),
            ended: Ends::new(Instant::now()),
            janitor: false,
        };
        Table {
            inner: Mutex::new(inner),
        }
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn started(&self, process: &Arc<Process>) {
        self.lock().running.insert(process.pid, Arc::clone(process));
    }

    pub(super) fn ended(self: &Arc<Self>, process: &Arc<Process>, exit: Exit) {
        let mut inner = self.lock();
        if inner
            .running
            .get(&process.pid)
            .is_some_and(|p| Arc::ptr_eq(p, process))
        {
            inner.running.remove(&process.pid);
        }
        if inner.running.contains_key(&process.pid) {
            // The number is another program's by now.
            return;
        }
        let tag = process.tag.as_deref();
        let now = Instant::now();
        inner.ended.push(process.pid, tag, &process.log, exit, now);
        if !inner.janitor {
            inner.janitor = true;
            let table = Arc::clone(self);
            tokio::spawn(async move { table.clean().await });
        }
    }

    /// Forgets exits when their time has come; runs only while there are any.
    async fn clean(&self) {
        loop {
            tokio::time::sleep(RETENTION).await;
            let mut inner = self.lock();
            inner.ended.expire(Instant::now());
            if inner.ended.is_empty() {
                inner.janitor = false;
                inner.ended.shrink();
                drop(inner);
                crate::sys::trim_heap();
                return;
            }
        }
    }

    /// The running programs, by process id.
    pub fn list(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = self.lock().running.values().cloned().collect();
        all.sort_by_key(|p| p.pid);
        all
    }

    /// A running program.
    ///
    /// # Errors
    /// None, or several.
    pub fn running(&self, selector: &Selector) -> Result<Arc<Process>, SelectError> {
        self.lock()
            .running(selector)?
            .ok_or_else(|| selector.not_found())
    }

    /// A running program, or one that ended within [`RETENTION`].
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, selector: &Selector) -> Result<Found, SelectError> {
        let mut inner = self.lock();
        if let Some(process) = inner.running(selector)? {
            return Ok(Found::Running(process));
        }
        let ended = inner.ended.find(selector, Instant::now());
        ended.map(Found::Ended).ok_or_else(|| selector.not_found())
    }
}

impl Selector {
    fn not_found(&self) -> SelectError {
        match self {
            Selector::Pid(pid) => SelectError::NoPid(*pid),
            Selector::Tag(tag) => SelectError::NoTag(tag.clone()),
        }
    }
}

impl Inner {
    fn running(&self, selector: &Selector) -> Result<Option<Arc<Process>>, SelectError> {
        match selector {
            Selector::Pid(pid) => Ok(self.running.get(pid).cloned()),
            Selector::Tag(tag) => {
                let mut matching = self
                    .running
                    .values()
                    .filter(|p| p.tag.as_ref() == Some(tag));
                let first = matching.next().cloned();
                match matching.count() {
                    0 => Ok(first),
                    more => Err(SelectError::Ambiguous {
                        tag: tag.clone(),
                        count: more + 1,
                    }),
                }
            }
        }
    }
}
