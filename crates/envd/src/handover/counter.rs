//! How many bytes of output were read from each program, where a crash does not reach: eight
//! bytes per program in a memory file that init holds too.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::MemfdFlags;

#[derive(Debug)]
pub(super) struct Counters {
    file: File,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    free: Vec<u32>,
    /// All from here on were never used.
    next: u32,
}

impl Counters {
    /// Those of a predecessor, or new ones.
    pub(super) fn new(file: Option<OwnedFd>) -> io::Result<Counters> {
        let file = match file {
            Some(file) => file,
            None => rustix::fs::memfd_create(c"counters", MemfdFlags::CLOEXEC)?,
        };
        Ok(Counters {
            file: file.into(),
            slots: Mutex::default(),
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One program's counter; its place is free for another once this is dropped.
#[derive(Debug)]
pub struct Counter {
    all: Arc<Counters>,
    slot: u32,
}

impl Counter {
    pub(super) fn new(all: &Arc<Counters>, taken: Option<u32>) -> Counter {
        let mut slots = all.slots();
        let slot = match taken {
            // Adopted all at once before any new one is made.
            Some(slot) => {
                let first = slots.next;
                slots.free.extend(first..slot);
                slots.free.retain(|free| *free != slot);
                slots.next = slots.next.max(slot.saturating_add(1));
                slot
            }
            None => slots.free.pop().unwrap_or_else(|| {
                slots.next += 1;
                slots.next - 1
            }),
        };
        drop(slots);
        let counter = Counter {
            all: Arc::clone(all),
            slot,
        };
        if taken.is_none() {
            counter.set(0);
        }
        counter
    }

    /// Its number, for the next agent.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// So many bytes were read.
    pub fn set(&self, bytes: u64) {
        let at = u64::from(self.slot) * 8;
        if let Err(error) = self.all.file.write_all_at(&bytes.to_le_bytes(), at) {
            tracing::warn!(%error, "cannot count output for a crash");
        }
    }

    /// How many bytes were read; 0 where nobody has counted.
    pub fn get(&self) -> u64 {
        let mut bytes = [0; 8];
        match self
            .all
            .file
            .read_exact_at(&mut bytes, u64::from(self.slot) * 8)
        {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(error) => {
                tracing::warn!(%error, "cannot read how much output was read before a crash");
                0
            }
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.all.slots().free.push(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_outlive_their_agent_and_places_are_used_again() {
        let first = Arc::new(Counters::new(None).unwrap());
        let made: Vec<_> = (0..4).map(|_| Counter::new(&first, None)).collect();
        made[1].set(10);
        made[3].set(1 << 40);
        let file = first.as_fd().try_clone_to_owned().unwrap();

        let second = Arc::new(Counters::new(Some(file)).unwrap());
        let late = Counter::new(&second, Some(3));
        let early = Counter::new(&second, Some(1));
        assert_eq!((late.get(), early.get()), (1 << 40, 10));
        let mut new: Vec<_> = (0..3).map(|_| Counter::new(&second, None).slot()).collect();
        new.sort_unstable();
        assert!(!new.contains(&1) && !new.contains(&3), "{new:?}");
        drop(early);
        assert_eq!(
            Counter::new(&second, None).get(),
            0,
            "a used place begins at 0"
        );
    }
}
