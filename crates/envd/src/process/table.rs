//! The programs that run, and the exits of those that ran.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::exit::Exit;
use super::input::{Input, InputError, write_all};
use super::output::Log;
use crate::handover::Kept;

/// How long an exit is kept for those who connect late.
pub const RETENTION: Duration = Duration::from_secs(60);
/// Exits that are kept: as many as a kernel has process ids unless told otherwise, so that in
/// practice only a number that is used again makes one unreachable. Without a bound they
/// would fill the guest.
const MAX_ENDED: usize = 32_768;
/// Output of ended programs that is kept for replay, all together.
const ENDED_OUTPUT: u64 = 4 << 20;

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

/// A program that has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// The process id it had.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
    /// Its output.
    pub output: Output,
    tag: Option<String>,
    at: Instant,
    serial: u64,
}

/// What is left of the output of a program that has ended.
#[derive(Debug, Clone)]
pub enum Output {
    /// Its last part, as long as there is memory for it.
    Kept(Arc<Log>),
    /// Nothing but where it ended, so that a late reader is told what it missed (G27).
    Gone {
        /// Bytes it had written.
        end: u64,
    },
}

impl Ended {
    /// The log for a late reader.
    pub fn log(&self) -> Arc<Log> {
        match &self.output {
            Output::Kept(log) => Arc::clone(log),
            Output::Gone { end } => Arc::new(Log::ended(*end, self.exit)),
        }
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

#[derive(Debug, Default)]
struct Inner {
    running: HashMap<u32, Arc<Process>>,
    /// A tree, for it gives back the memory of what is forgotten.
    ended: BTreeMap<u32, Ended>,
    /// Ended ones by age: number and serial.
    order: VecDeque<(u32, u64)>,
    /// Those of them whose output is kept.
    with_output: VecDeque<(u32, u64)>,
    output: u64,
    serial: u64,
    janitor: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Table {
    inner: Mutex<Inner>,
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn started(&self, process: &Arc<Process>) {
        let mut inner = self.lock();
        // The number is used again: what ended under it is out of reach.
        inner.forget(process.pid, None);
        inner.running.insert(process.pid, Arc::clone(process));
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
            return;
        }
        inner.forget(process.pid, None);
        inner.serial += 1;
        let (pid, serial) = (process.pid, inner.serial);
        let kept = process.log.kept();
        inner.order.push_back((pid, serial));
        if kept > 0 {
            inner.with_output.push_back((pid, serial));
            inner.output += kept;
        }
        let ended = Ended {
            pid,
            exit,
            output: match kept {
                0 => Output::Gone {
                    end: process.log.progress().0,
                },
                _ => Output::Kept(Arc::clone(&process.log)),
            },
            tag: process.tag.clone(),
            at: Instant::now(),
            serial,
        };
        inner.ended.insert(pid, ended);
        inner.drop_output();
        inner.expire();
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
            inner.expire();
            if inner.ended.is_empty() {
                inner.janitor = false;
                inner.order.shrink_to_fit();
                inner.with_output.shrink_to_fit();
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
        inner.expire();
        match selector {
            Selector::Pid(pid) => inner.ended.get(pid).cloned(),
            // Of several that ended, the last one.
            Selector::Tag(tag) => inner
                .ended
                .values()
                .filter(|e| e.tag.as_ref() == Some(tag))
                .max_by_key(|e| e.serial)
                .cloned(),
        }
        .map(Found::Ended)
        .ok_or_else(|| selector.not_found())
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

    /// Forgets an ended program; with a serial, only if it is still that one.
    fn forget(&mut self, pid: u32, serial: Option<u64>) {
        if self
            .ended
            .get(&pid)
            .is_some_and(|e| serial.is_none_or(|s| s == e.serial))
            && let Some(ended) = self.ended.remove(&pid)
            && let Output::Kept(log) = ended.output
        {
            self.output = self.output.saturating_sub(log.kept());
        }
    }

    fn drop_output(&mut self) {
        while self.output > ENDED_OUTPUT {
            let Some((pid, serial)) = self.with_output.pop_front() else {
                break;
            };
            if let Some(ended) = self.ended.get_mut(&pid).filter(|e| e.serial == serial)
                && let Output::Kept(log) = &ended.output
            {
                // Readers that are at it keep the log itself.
                self.output = self.output.saturating_sub(log.kept());
                let end = log.progress().0;
                ended.output = Output::Gone { end };
            }
        }
    }

    fn expire(&mut self) {
        while let Some(&(pid, serial)) = self.order.front() {
            let young = self
                .ended
                .get(&pid)
                .is_some_and(|e| e.serial == serial && e.at.elapsed() < RETENTION);
            if young && self.ended.len() <= MAX_ENDED {
                break;
            }
            self.order.pop_front();
            self.forget(pid, Some(serial));
        }
        while let Some(&(pid, serial)) = self.with_output.front() {
            if self.ended.get(&pid).is_some_and(|e| e.serial == serial) {
                break;
            }
            self.with_output.pop_front();
        }
    }
}
