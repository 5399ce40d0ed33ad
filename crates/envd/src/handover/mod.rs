//! What a crash of the agent must not lose, kept by init (guarantee G34).
//!
//! ```text
//!   init ──WRENN_KEEPER=fd──▶ agent
//!        ◀── Keep, Forget ───         as programs start and end, as `/init` changes things
//!   init ─── Keep …, Done ──▶ next agent: memory, listener, counters, programs
//!        ─── Exited ────────▶         when a program ends that is init's child by now
//! ```
//!
//! Handed over are the sandbox's token, identity and defaults, the listening socket, and of
//! each running program its pidfd, pipes or terminal, and how much of its output was read.
//! What is only in the agent's memory is lost: output that no reader has had yet (readers
//! that ask for it by offset are told how much), exits of programs that had ended, watchers,
//! and streams under way. [`Report`] lists it.

mod counter;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use serde::Serialize;
use tokio::io::Interest;
use tokio::sync::oneshot;
use wrenn_init::keeper::{self, Head, Kind, MEMORY, Message, VARIABLE};

pub use self::counter::Counter;
use self::counter::Counters;
use crate::process::exit::Exit;

/// How long init may take to hand everything over; it needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// What every crash loses, whatever ran.
const ALWAYS_LOST: [&str; 4] = [
    "output that was read from programs and by no client yet",
    "exits of programs that had ended before",
    "watchers of directories",
    "connections, with the streams and transfers on them",
];

/// The agent's half of the handover.
#[derive(Debug)]
pub struct Handover {
    socket: OwnedFd,
    counters: Arc<Counters>,
    listener: Mutex<Option<OwnedFd>>,
    next_key: AtomicU64,
    /// Who waits for the end of an adopted program.
    waiting: Mutex<HashMap<u64, oneshot::Sender<Exit>>>,
    report: Mutex<Report>,
}

/// What a crash has left, for the agent that follows.
#[derive(Debug, Default)]
pub struct Inheritance {
    /// What the predecessor remembered; see [`Handover::remember`].
    pub memory: Option<Vec<u8>>,
    /// The socket on which it listened.
    pub listener: Option<OwnedFd>,
    /// Its programs and what belongs to them, in the order they were kept.
    pub entries: Vec<Entry>,
}

/// One thing that was kept.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub key: u64,
    /// The process, or 0.
    pub pid: u32,
    /// What its keeper wrote.
    pub body: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
    /// How the process ended, if it has.
    pub end: Option<Exit>,
}

/// What came of the last crash, as the host and people see it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// How often this agent's predecessors have crashed since the machine booted.
    pub restarts: u32,
    /// Programs that were taken over.
    pub adopted: Vec<u32>,
    /// What was not.
    pub lost: Vec<String>,
}

fn exit_of(head: &Head) -> Option<Exit> {
    match head.kind {
        Kind::Exited => Some(Exit::Code(head.value)),
        Kind::Killed | Kind::Dumped => Some(Exit::Signal {
            number: head.value,
            dumped: head.kind == Kind::Dumped,
        }),
        Kind::Gone => Some(Exit::Lost),
        Kind::Keep | Kind::Forget | Kind::Done => None,
    }
}

impl Handover {
    /// Takes over from init what a predecessor has left; `None` without such an init.
    ///
    /// # Errors
    /// The socket does not work: nothing is taken over, and nothing can be kept.
    pub fn receive() -> io::Result<Option<(Arc<Handover>, Inheritance)>> {
        let Some(number) = std::env::var_os(VARIABLE) else {
            return Ok(None);
        };
        let number = number
            .to_str()
            .and_then(|n| n.parse().ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let socket = crate::sys::inherited(number)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        let mut inheritance = Inheritance::default();
        let mut counters = None;
        let mut lost = Vec::new();
        let mut last = MEMORY;
        loop {
            let message = match keeper::receive(socket.as_fd(), true) {
                Ok(Some(message)) => message,
                Ok(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => {
                    lost.push(format!("whatever init did not hand over: {error}"));
                    break;
                }
            };
            let head = message.head;
            last = last.max(head.key);
            match (head.kind, exit_of(&head)) {
                (Kind::Done, _) => break,
                (Kind::Keep, _) if head.key == MEMORY => match message.into_parts() {
                    Ok((body, fds)) => {
                        let mut fds = fds.into_iter();
                        counters = fds.next();
                        inheritance.listener = fds.next();
                        inheritance.memory = Some(body);
                    }
                    Err(error) => lost.push(format!("the agent's memory: {error}")),
                },
                (Kind::Keep, _) => match entry(message) {
                    Ok(entry) => inheritance.entries.push(entry),
                    Err(error) => lost.push(format!("process {}: {error}", head.pid)),
                },
                (_, Some(end)) => {
                    if let Some(entry) = inheritance.entries.last_mut()
                        && entry.key == head.key
                    {
                        entry.end = Some(end);
                    }
                }
                (Kind::Forget, _) | (_, None) => {}
            }
        }
        let handover = Handover {
            socket,
            counters: Arc::new(Counters::new(counters)?),
            listener: Mutex::default(),
            next_key: AtomicU64::new(last + 1),
            waiting: Mutex::default(),
            report: Mutex::new(Report {
                lost,
                ..Report::default()
            }),
        };
        Ok(Some((Arc::new(handover), inheritance)))
    }

    /// Keeps the listening socket beside the memory, so that who connects while no agent is
    /// there waits for the next one.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn keep_listener(&self, listener: BorrowedFd<'_>) -> io::Result<()> {
        *lock(&self.listener) = Some(listener.try_clone_to_owned()?);
        Ok(())
    }

    /// Keeps what the agent must know to go on, in place of what was kept before.
    pub fn remember(&self, body: &[u8]) {
        let listener = lock(&self.listener);
        let mut fds = vec![self.counters.as_fd()];
        fds.extend(listener.as_ref().map(AsFd::as_fd));
        let head = Head::new(Kind::Keep, MEMORY, 0);
        self.send(head, body, &fds);
    }

    /// Keeps something under a key of its own until it is told to forget it. For a process,
    /// the first descriptor is its pidfd.
    pub fn keep(self: &Arc<Self>, pid: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Kept {
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        self.send(Head::new(Kind::Keep, key, pid), body, fds);
        self.kept(key)
    }

    /// Takes charge of what a predecessor has kept.
    pub fn kept(self: &Arc<Self>, key: u64) -> Kept {
        Kept {
            key,
            handover: Arc::clone(self),
        }
    }

    fn send(&self, head: Head, body: &[u8], fds: &[BorrowedFd<'_>]) {
        if let Err(error) = keeper::send(self.socket.as_fd(), head, body, fds) {
            tracing::error!(?head, %error, "init does not keep what a crash would lose");
        }
    }

    /// A counter of output that outlives the agent; or the one with this number that a
    /// predecessor has used.
    pub fn counter(&self, slot: Option<u32>) -> Counter {
        Counter::new(&self.counters, slot)
    }

    /// Tells how the process kept under `key` ends.
    pub fn end_of(&self, key: u64) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.waiting).insert(key, sender);
        receiver
    }

    /// Passes on what init tells, for as long as there is an init.
    pub async fn follow(self: Arc<Self>) {
        let socket = match self.socket.try_clone() {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(%error, "cannot listen to init"),
        };
        let socket = match crate::sys::async_fd(socket) {
            Ok(socket) => socket,
            Err((_, error)) => return tracing::error!(%error, "cannot listen to init"),
        };
        loop {
            let Ok(mut ready) = socket.ready(Interest::READABLE).await else {
                return;
            };
            match keeper::receive(socket.get_ref().as_fd(), false) {
                Ok(Some(message)) => self.told(&message),
                Ok(None) => return tracing::error!("init has closed its end"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return tracing::error!(%error, "cannot understand init"),
            }
        }
    }

    fn told(&self, message: &Message) {
        if let Some(exit) = exit_of(&message.head)
            && let Some(waiting) = lock(&self.waiting).remove(&message.head.key)
        {
            // Nobody waits where the program was given up.
            let _ = waiting.send(exit);
        }
    }

    /// What came of the last crash.
    pub fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    /// Notes that this agent follows a crash, and what came of it.
    pub fn took_over(&self, restarts: u32, adopted: Vec<u32>, lost: Vec<String>) {
        let mut report = lock(&self.report);
        report.restarts = restarts;
        report.adopted = adopted;
        report.lost.extend(lost);
        report.lost.extend(ALWAYS_LOST.map(str::to_owned));
        tracing::warn!(
            restarts,
            adopted = ?report.adopted,
            lost = ?report.lost,
            "took over from an agent that crashed"
        );
    }
}

fn entry(message: Message) -> io::Result<Entry> {
    let Head { key, pid, .. } = message.head;
    let (body, fds) = message.into_parts()?;
    Ok(Entry {
        key,
        pid,
        body,
        fds,
        end: None,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that init keeps. Dropping it changes nothing: an agent that panics drops all
/// that it has, and the next one needs it.
#[derive(Debug)]
pub struct Kept {
    key: u64,
    handover: Arc<Handover>,
}

impl Kept {
    /// Its name.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Has init forget it.
    pub fn forget(self) {
        let head = Head::new(Kind::Forget, self.key, 0);
        self.handover.send(head, &[], &[]);
    }
}
