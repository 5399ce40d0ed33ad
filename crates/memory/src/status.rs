//! What a page server tells about itself, and what its threads share.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

/// Notes kept; what goes wrong more often than that is the same thing.
const MAX_NOTES: usize = 8;

/// Where a page server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// It waits for the monitor.
    Listening,
    /// It records what the machine asks for, and brings nothing else.
    Recording,
    /// It brings the working set.
    Prefetching,
    /// It brings everything else.
    Copying,
    /// It only answers faults: the rest is there, or was not wanted.
    Idle,
    /// The machine is gone, by itself.
    Ended,
    /// It failed, and ended the machine if there was one; see the reason.
    Failed,
}

/// What was done so far, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Counts {
    /// Faults answered.
    pub faults: u64,
    /// Pages brought because they are in the working set.
    pub prefetched: u64,
    /// Pages brought because they are there.
    pub background: u64,
    /// Pages that the machine gave back.
    pub removed: u64,
}

/// A page server's account of itself, in its status file and as the answer to any request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Status {
    /// The process that wrote it.
    pub pid: u32,
    /// The monitor it serves.
    pub monitor: Option<u32>,
    /// Where it is.
    pub state: State,
    /// Why it failed.
    pub reason: Option<String>,
    /// Pages of the machine.
    pub pages: u64,
    /// What was done.
    pub counts: Counts,
    /// What went wrong without harm: a working set that cannot be used, or not be written.
    pub notes: Vec<String>,
}

/// A flag that wakes who polls.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    pub(crate) fn ring(&self) {
        // Fails only when it is ringing already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Stops it ringing.
    pub(crate) fn hush(&self) {
        let mut count = [0; 8];
        // Fails only when it is not ringing.
        let _ = rustix::io::read(&self.0, &mut count);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the threads of one page server share.
#[derive(Debug)]
pub(crate) struct Shared {
    pages: u64,
    pub(crate) faults: AtomicU64,
    pub(crate) prefetched: AtomicU64,
    pub(crate) background: AtomicU64,
    pub(crate) removed: AtomicU64,
    /// Bytes per second; 0: as fast as it goes.
    pub(crate) rate: AtomicU64,
    /// Nothing more shall be brought.
    pub(crate) cancelled: AtomicBool,
    pub(crate) finish_recording: AtomicBool,
    /// The housekeeper shall end.
    pub(crate) stop: AtomicBool,
    /// For the server: there is a batch, or one of the above has changed.
    pub(crate) for_server: Bell,
    /// For the housekeeper: there is something to write, or it shall end.
    pub(crate) for_house: Bell,
    told: Mutex<Told>,
}

#[derive(Debug)]
struct Told {
    monitor: Option<u32>,
    state: State,
    reason: Option<String>,
    notes: Vec<String>,
}

impl Shared {
    pub(crate) fn new(pages: u64, rate: Option<u64>) -> io::Result<Shared> {
        Ok(Shared {
            pages,
            faults: AtomicU64::new(0),
            prefetched: AtomicU64::new(0),
            background: AtomicU64::new(0),
            removed: AtomicU64::new(0),
            rate: AtomicU64::new(rate.unwrap_or(0)),
            cancelled: AtomicBool::new(false),
            finish_recording: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            for_server: Bell::new()?,
            for_house: Bell::new()?,
            told: Mutex::new(Told {
                monitor: None,
                state: State::Listening,
                reason: None,
                notes: Vec::new(),
            }),
        })
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Every state of it is a valid one.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_monitor(&self, pid: u32) {
        self.told().monitor = Some(pid);
    }

    /// Notes the state, and has it written.
    pub(crate) fn set_state(&self, state: State) {
        self.told().state = state;
        self.for_house.ring();
    }

    /// Notes why it all ends.
    pub(crate) fn set_failed(&self, reason: String) {
        let mut told = self.told();
        told.state = State::Failed;
        told.reason = Some(reason);
    }

    pub(crate) fn note(&self, note: String) {
        tracing::warn!("{note}");
        let mut told = self.told();
        if told.notes.len() < MAX_NOTES {
            told.notes.push(note);
        }
    }

    /// The background copy is told to stop; nothing of it happens after the server's next
    /// look, at most one call later.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.for_server.ring();
    }

    pub(crate) fn counts(&self) -> Counts {
        let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Counts {
            faults: count(&self.faults),
            prefetched: count(&self.prefetched),
            background: count(&self.background),
            removed: count(&self.removed),
        }
    }

    pub(crate) fn status(&self) -> Status {
        let counts = self.counts();
        let told = self.told();
        Status {
            pid: std::process::id(),
            monitor: told.monitor,
            state: told.state,
            reason: told.reason.clone(),
            pages: self.pages,
            counts,
            notes: told.notes.clone(),
        }
    }
}

/// Adds to a count.
pub(crate) fn add(count: &AtomicU64, more: u64) {
    count.fetch_add(more, Ordering::Relaxed);
}
