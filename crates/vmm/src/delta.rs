//! What a clone changed of its template's memory, as a stream of page runs.
//!
//! ```text
//! Machine::save_delta ─▶ SavedDelta { state, firmware, pages: ChangedPages }
//!                                                         │ next_run: Zero │ Data
//!                              a snapshot's writer, or ◀──┤
//!                              PageBuffer (in memory) ◀───┘
//!                                   │
//! Vmm::restore_delta ◀── Delta { firmware, pages: dyn DeltaPages }
//! ```
//!
//! Runs come in ascending order, and none is held longer than until the next is asked for, so
//! that no stage needs memory for more than one of them.

use std::error::Error;
use std::io;
use std::time::Duration;

use tokio::sync::watch;

use crate::delta_file::SavedPages;
use crate::guest_memory::GuestMemory;
use crate::machine::RunState;
use crate::memory::PAGE;
use crate::runs::is_zero;
use crate::{MemoryError, SealedMemory};

/// Size of the firmware segment, guest addresses 0xF0000 to 0xFFFFF: the one RAM of a
/// machine that is neither in its memory nor in a state saved by [`crate::Machine::save_delta`].
pub const FIRMWARE_BYTES: usize = 64 << 10;

/// Content of the firmware segment. Firecracker has none: there it is all zeros, and the
/// guest's memory at these addresses is memory like any other.
pub type Firmware = Box<[u8; FIRMWARE_BYTES]>;

/// How much of a machine's memory is read at once: it fits the processor's second cache.
pub(crate) const CHUNK_PAGES: u64 = 64;

/// Consecutive pages (of 4096 bytes) of a machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl PageRange {
    /// The page behind the last.
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }
}

/// Consecutive pages with what they hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run<'a> {
    /// Nothing but zeros.
    Zero(PageRange),
    /// Bytes.
    Data {
        /// Number of the first page.
        first: u64,
        /// Whole pages.
        bytes: &'a [u8],
    },
}

impl Run<'_> {
    /// The pages it covers.
    pub fn range(&self) -> Result<PageRange, DeltaError> {
        match self {
            Run::Zero(range) => Ok(*range),
            Run::Data { first, bytes } if bytes.len().is_multiple_of(PAGE) => Ok(PageRange {
                first: *first,
                count: (bytes.len() / PAGE) as u64,
            }),
            Run::Data { first, bytes } => Err(DeltaError::Ragged {
                first: *first,
                bytes: bytes.len(),
            }),
        }
    }
}

/// Why a delta could not be read, or be brought into a machine.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The machine's memory is not a private mapping of a template's.
    #[error(
        "process {pid} has no private mapping of a template's memory: only a machine that was restored has changes against one"
    )]
    NoTemplate {
        /// The monitor.
        pid: u32,
    },
    /// The mapping is not as this driver makes it.
    #[error("the memory map of process {pid} is not understood: {why}")]
    Map {
        /// The monitor.
        pid: u32,
        /// What is wrong.
        why: String,
    },
    /// The monitor's memory could not be reached.
    #[error("cannot {doing} of process {pid}")]
    Process {
        /// What was being done.
        doing: &'static str,
        /// The monitor.
        pid: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The machine ended meanwhile.
    #[error("the machine's process {pid} ended while its memory was {doing}")]
    Ended {
        /// The monitor.
        pid: u32,
        /// `read` or `written`.
        doing: &'static str,
    },
    /// The machine was started again while its pages were still being read.
    #[error("the machine runs again: its changed pages must be read before it is resumed")]
    Resumed,
    /// A run that reaches outside the memory.
    #[error(
        "pages {first} to {end} are outside a memory of {pages} pages: the delta belongs to another machine or is damaged"
    )]
    Outside {
        /// First page of the run.
        first: u64,
        /// The page behind its last.
        end: u64,
        /// Pages of the memory.
        pages: u64,
    },
    /// Runs that overlap or go backwards.
    #[error(
        "page {first} comes after page {after} in the delta, whose runs must ascend: it is damaged"
    )]
    Order {
        /// First page of the run.
        first: u64,
        /// The page behind the last of the run before.
        after: u64,
    },
    /// A run of data that is not whole pages.
    #[error("the run at page {first} has {bytes} bytes, which are not whole pages")]
    Ragged {
        /// First page of the run.
        first: u64,
        /// Its length.
        bytes: usize,
    },
    /// A page that is as in the snapshot the machine came from, and is only there.
    #[error(
        "page {page} has not changed since the restore, and its content is with the page server: read it from the snapshot"
    )]
    Elsewhere {
        /// The page.
        page: u64,
    },
    /// The kernel does not tell which pages of a file were written.
    #[error("the changed pages cannot be told from the others: {0}")]
    Inexact(String),
    /// Whoever supplies the pages could not.
    #[error("the pages of the delta cannot be had")]
    Source(#[source] Box<dyn Error + Send + Sync>),
    /// The template's memory could not be read or made.
    #[error("the template's memory failed")]
    Template(#[from] MemoryError),
}

/// A stream of page runs, in ascending order. Blocking.
pub trait DeltaPages: Send {
    /// The next run; `None` after the last.
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError>;
}

/// What a saved clone had changed.
pub struct Delta {
    /// The firmware segment.
    pub firmware: Firmware,
    /// The pages that differ from the template's, or may.
    pub pages: Box<dyn DeltaPages>,
}

/// A stopped machine, saved by [`crate::Machine::save_delta`].
#[derive(Debug)]
pub struct SavedDelta {
    /// State of processors and devices, for [`crate::RestoreSpec::state`].
    pub state: Vec<u8>,
    /// The firmware segment.
    pub firmware: Firmware,
    /// The changed pages, to be read while the machine is stopped.
    pub pages: ChangedPages,
    /// How long the parts took.
    pub times: SaveTimes,
}

/// How long the parts of [`crate::Machine::save_delta`] took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveTimes {
    /// Halting the processors and draining the devices.
    pub stop: Duration,
    /// Saving the state of the devices.
    pub state: Duration,
    /// Reading the firmware segment.
    pub firmware: Duration,
    /// Finding the changed pages.
    pub scan: Duration,
}

/// The pages that a stopped machine has written since it was restored: also those that hold
/// again what the template holds.
#[derive(Debug)]
pub struct ChangedPages {
    memory: Source,
    running: watch::Receiver<RunState>,
    ranges: Vec<PageRange>,
    /// Where the next chunk begins: index of a range and pages of it that are done.
    next: (usize, u64),
    buffer: Vec<u8>,
    /// First page in the buffer, and the bytes of it that were handed out and that are there.
    first: u64,
    handed: usize,
    filled: usize,
}

/// Where the pages of a stopped machine are read from.
#[derive(Debug)]
pub(crate) enum Source {
    /// From the monitor's own memory.
    Process(GuestMemory),
    /// From what the monitor wrote into a file.
    File(SavedPages),
}

impl Source {
    fn pages(&self) -> u64 {
        match self {
            Source::Process(memory) => memory.pages(),
            Source::File(pages) => pages.pages(),
        }
    }

    fn read(&self, first: u64, into: &mut [u8]) -> Result<(), DeltaError> {
        match self {
            Source::Process(memory) => memory.read(first, into),
            Source::File(pages) => pages.read(first, into),
        }
    }
}

impl ChangedPages {
    pub(crate) fn new(
        memory: Source,
        running: watch::Receiver<RunState>,
        ranges: Vec<PageRange>,
    ) -> ChangedPages {
        ChangedPages {
            memory,
            running,
            ranges,
            next: (0, 0),
            buffer: vec![0; CHUNK_PAGES as usize * PAGE],
            first: 0,
            handed: 0,
            filled: 0,
        }
    }

    /// The changed pages, ascending and not adjacent.
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// How many pages have changed.
    pub fn count(&self) -> u64 {
        self.ranges.iter().map(|range| range.count).sum()
    }

    /// Pages of the machine's whole memory.
    pub fn memory_pages(&self) -> u64 {
        self.memory.pages()
    }

    /// Fills `into` (whole pages) with what the machine's memory holds from page `first` on,
    /// changed or not. Blocking.
    pub fn read(&self, first: u64, into: &mut [u8]) -> Result<(), DeltaError> {
        self.memory.read(first, into)?;
        self.still_stopped()
    }

    /// Begins again at the first page.
    pub fn rewind(&mut self) {
        (self.next, self.handed, self.filled) = ((0, 0), 0, 0);
    }

    fn still_stopped(&self) -> Result<(), DeltaError> {
        match *self.running.borrow() {
            RunState::Stopped => Ok(()),
            RunState::Running => Err(DeltaError::Resumed),
        }
    }

    /// Reads the next chunk; `false` when there is none.
    fn fill(&mut self) -> Result<bool, DeltaError> {
        let (index, done) = self.next;
        let Some(range) = self.ranges.get(index) else {
            return Ok(false);
        };
        let count = (range.count - done).min(CHUNK_PAGES);
        self.first = range.first + done;
        self.next = if done + count == range.count {
            (index + 1, 0)
        } else {
            (index, done + count)
        };
        self.handed = 0;
        self.filled = count as usize * PAGE;
        self.memory
            .read(self.first, &mut self.buffer[..self.filled])?;
        self.still_stopped()?;
        Ok(true)
    }
}

impl DeltaPages for ChangedPages {
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
        if self.handed == self.filled && !self.fill()? {
            return Ok(None);
        }
        let first = self.first + (self.handed / PAGE) as u64;
        let rest = &self.buffer[self.handed..self.filled];
        let (zero, bytes) = leading_run(rest);
        self.handed += bytes.len();
        Ok(Some(if zero {
            Run::Zero(PageRange {
                first,
                count: (bytes.len() / PAGE) as u64,
            })
        } else {
            Run::Data { first, bytes }
        }))
    }
}

/// The longest run of pages at the start of `pages` that are all zero, or all not.
fn leading_run(pages: &[u8]) -> (bool, &[u8]) {
    let zero = pages.chunks(PAGE).next().is_some_and(is_zero);
    let bytes = pages
        .chunks(PAGE)
        .take_while(|page| is_zero(page) == zero)
        .map(<[u8]>::len)
        .sum();
    (zero, &pages[..bytes])
}

/// Checks that runs ascend within a memory.
#[derive(Debug)]
pub(crate) struct Course {
    pages: u64,
    after: u64,
}

impl Course {
    /// Through a memory of so many pages.
    pub(crate) fn new(pages: u64) -> Course {
        Course { pages, after: 0 }
    }

    pub(crate) fn check(&mut self, run: &Run<'_>) -> Result<PageRange, DeltaError> {
        let range = run.range()?;
        if range.end() > self.pages {
            return Err(DeltaError::Outside {
                first: range.first,
                end: range.end(),
                pages: self.pages,
            });
        }
        if range.first < self.after {
            return Err(DeltaError::Order {
                first: range.first,
                after: self.after,
            });
        }
        self.after = range.end();
        Ok(range)
    }
}

/// What [`inject`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Injected {
    pub(crate) data_pages: u64,
    /// Zero pages that had to be written, since the template holds data there.
    pub(crate) zero_pages: u64,
}

/// Writes a delta over the template's pages in a machine that has not run yet. Blocking.
pub(crate) fn inject(
    pages: &mut dyn DeltaPages,
    template: &SealedMemory,
    memory: &GuestMemory,
) -> Result<Injected, DeltaError> {
    let mut course = Course::new(memory.pages());
    let mut done = Injected::default();
    let zeros = vec![0; CHUNK_PAGES as usize * PAGE];
    let mut parts = template.data_parts();
    while let Some(run) = pages.next_run()? {
        let range = course.check(&run)?;
        match run {
            Run::Data { first, bytes } => {
                memory.write(first, bytes)?;
                done.data_pages += range.count;
            }
            // Where the template has a hole it reads as zeros already, and writing them
            // would cost memory.
            Run::Zero(_) => {
                for data in parts
                    .within(range)
                    .map_err(|source| template.unreadable(source))?
                {
                    let mut first = data.first;
                    while first < data.end() {
                        let count = (data.end() - first).min(CHUNK_PAGES);
                        memory.write(first, &zeros[..count as usize * PAGE])?;
                        first += count;
                    }
                    done.zero_pages += data.count;
                }
            }
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_outside_backwards_or_ragged_are_told_apart() {
        let zero = |first, count| Run::Zero(PageRange { first, count });
        let mut course = Course::new(10);
        course.check(&zero(2, 3)).unwrap();
        assert!(matches!(
            course.check(&zero(4, 1)),
            Err(DeltaError::Order { first: 4, after: 5 })
        ));
        assert!(matches!(
            course.check(&zero(9, 2)),
            Err(DeltaError::Outside { end: 11, .. })
        ));
        assert!(matches!(
            course.check(&zero(6, u64::MAX)),
            Err(DeltaError::Outside { end: u64::MAX, .. })
        ));
        let ragged = Run::Data {
            first: 5,
            bytes: &[1; 5000],
        };
        assert!(matches!(
            course.check(&ragged),
            Err(DeltaError::Ragged { bytes: 5000, .. })
        ));
        course.check(&zero(5, 5)).unwrap();
    }

    proptest! {
        #[test]
        fn leading_runs_cover_all_pages_and_tell_zero_from_data(
            pages in proptest::collection::vec(any::<bool>(), 1..40),
            at in 0..PAGE,
        ) {
            let mut bytes = vec![0; pages.len() * PAGE];
            for (index, data) in pages.iter().enumerate() {
                bytes[index * PAGE + at] = u8::from(*data);
            }
            let mut rest = &bytes[..];
            let mut found = Vec::new();
            let mut last = None;
            while !rest.is_empty() {
                let (zero, run) = leading_run(rest);
                prop_assert!(!run.is_empty() && Some(zero) != last);
                last = Some(zero);
                found.extend(std::iter::repeat_n(!zero, run.len() / PAGE));
                rest = &rest[run.len()..];
            }
            prop_assert_eq!(found, pages);
        }
    }
}
