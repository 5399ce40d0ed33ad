//! Reads pages before the machine asks for them: the working set, then everything.
//!
//! Only reads: a batch is what the snapshot has, whatever the machine did meanwhile. The
//! server, which alone knows that, decides at the last moment which pages of a batch are
//! still wanted.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};

use wrenn_snapshot::{PAGE, PageRange, PageReader, is_zero};

use crate::ServeError;
use crate::layers::{Kind, Layers};
use crate::settled::Settled;
use crate::status::Shared;
use crate::working_set::WorkingSet;

/// Pages with data in a batch, 1 MiB: enough that handing it over costs nothing, and it still
/// lies in the processor's cache when it is copied.
pub(crate) const BATCH_PAGES: u64 = 256;

/// Batches read ahead: while one is copied, the next is read.
pub(crate) const BATCHES: usize = 2;

/// Runs in a batch; zeros have no data, so their number is bounded too.
const MAX_PIECES: usize = 512;

/// Pages of the working set that are brought in ascending order: their order of use matters
/// less than that neighbours come together, within some milliseconds of copying.
const WINDOW_PAGES: u64 = 2048;

/// Pages between two looks at whether anybody still wants this.
const STRIDE: u64 = 4096;

/// Why pages are brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Prefetch,
    Background,
}

/// Pages, read and verified.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) purpose: Purpose,
    pub(crate) bytes: Vec<u8>,
    pub(crate) pieces: Vec<Piece>,
}

/// Consecutive pages of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) pages: PageRange,
    pub(crate) content: Content,
}

/// Where the content of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// They are zero.
    Zero,
    /// In the base.
    Base,
    /// In the batch, from this byte on.
    Batch(usize),
}

/// Ends without an error when the receiver is gone.
struct NotWanted;

/// The one that reads.
pub(crate) struct Feeder<'a> {
    reader: PageReader<'static>,
    layers: &'a Layers,
    settled: &'a Settled,
    shared: &'a Shared,
    batches: SyncSender<Result<Batch, ServeError>>,
    /// Batches that were used up.
    empties: Receiver<Batch>,
    batch: Batch,
    /// Bytes that were read into the batch.
    filled: usize,
    /// Pages with data that the batch brings, wherever it lies.
    data: u64,
}

impl<'a> Feeder<'a> {
    pub(crate) fn new(
        layers: &'a Layers,
        settled: &'a Settled,
        shared: &'a Shared,
        batches: SyncSender<Result<Batch, ServeError>>,
        empties: Receiver<Batch>,
    ) -> Result<Feeder<'a>, ServeError> {
        Ok(Feeder {
            reader: layers.reader().map_err(ServeError::Snapshot)?,
            layers,
            settled,
            shared,
            batches,
            empties,
            batch: Batch {
                purpose: Purpose::Prefetch,
                bytes: Vec::new(),
                pieces: Vec::new(),
            },
            filled: 0,
            data: 0,
        })
    }

    /// Reads all that is to be read, and ends: with it, when a page cannot be read, or when
    /// nobody wants more.
    pub(crate) fn run(mut self, working_set: Option<&WorkingSet>, background: bool) {
        // Either way the receiver finds the end of the channel.
        let _: Result<(), NotWanted> = self.feed(working_set, background);
        let Feeder {
            batches, shared, ..
        } = self;
        drop(batches);
        shared.for_server.ring();
    }

    fn feed(
        &mut self,
        working_set: Option<&WorkingSet>,
        background: bool,
    ) -> Result<(), NotWanted> {
        for window in working_set.map(windows).into_iter().flatten() {
            for run in window {
                self.add(run)?;
            }
        }
        self.flush(Purpose::Background)?;
        if background {
            let pages = self.layers.pages();
            let mut first = 0;
            while first < pages {
                let count = STRIDE.min(pages - first);
                self.add(PageRange { first, count })?;
                first += count;
            }
            self.flush(Purpose::Background)?;
        }
        Ok(())
    }

    /// Adds those pages of a range that are not settled yet.
    fn add(&mut self, range: PageRange) -> Result<(), NotWanted> {
        if self.shared.cancelled.load(Ordering::Relaxed) {
            return Err(NotWanted);
        }
        let (layers, settled) = (self.layers, self.settled);
        let mut next = range.first;
        while let Some(open) = settled.first_open(PageRange {
            first: next,
            count: range.end() - next,
        }) {
            next = open.end();
            for (kind, part) in layers.parts(open) {
                match kind {
                    Kind::Zero => self.push(part, Content::Zero)?,
                    Kind::Base => self.look_at(part)?,
                    Kind::Read => self.read(part)?,
                }
            }
        }
        Ok(())
    }

    /// Reads pages into the batch, and into the next ones if they do not fit.
    fn read(&mut self, range: PageRange) -> Result<(), NotWanted> {
        let mut next = range.first;
        while next < range.end() {
            let part = PageRange {
                first: next,
                count: (BATCH_PAGES - self.data).min(range.end() - next),
            };
            let (from, to) = (self.filled, self.filled + part.count as usize * PAGE);
            if self.batch.bytes.len() < to {
                self.batch.bytes.resize(BATCH_PAGES as usize * PAGE, 0);
            }
            if let Err(source) = self
                .reader
                .read(part.first, &mut self.batch.bytes[from..to])
            {
                let error = ServeError::Unreadable {
                    first: part.first,
                    last: part.end() - 1,
                    source,
                };
                // Nobody who does not want batches wants this.
                let _ = self.batches.send(Err(error));
                return Err(NotWanted);
            }
            next = part.end();
            self.filled = to;
            self.push(part, Content::Batch(from))?;
        }
        Ok(())
    }

    /// Adds pages of the base, run by run: they may be zero without being holes, and a zero
    /// page costs the machine no memory.
    fn look_at(&mut self, range: PageRange) -> Result<(), NotWanted> {
        let mut next = range.first;
        while next < range.end() {
            let rest = PageRange {
                first: next,
                count: (BATCH_PAGES - self.data).min(range.end() - next),
            };
            let mut kinds = self.layers.in_base(rest).chunks_exact(PAGE).map(is_zero);
            let zero = kinds.next().unwrap_or_default();
            let count = 1 + kinds.take_while(|kind| *kind == zero).count() as u64;
            let pages = PageRange { first: next, count };
            next = pages.end();
            match zero {
                true => self.push(pages, Content::Zero)?,
                false => self.push(pages, Content::Base)?,
            }
        }
        Ok(())
    }

    /// Adds a piece, and hands the batch over if it is full.
    fn push(&mut self, pages: PageRange, content: Content) -> Result<(), NotWanted> {
        self.batch.pieces.push(Piece { pages, content });
        if content != Content::Zero {
            self.data += pages.count;
        }
        match self.data >= BATCH_PAGES || self.batch.pieces.len() >= MAX_PIECES {
            true => self.flush(self.batch.purpose),
            false => Ok(()),
        }
    }

    /// Hands the batch over, waiting until there is room, and begins one for `next`.
    fn flush(&mut self, next: Purpose) -> Result<(), NotWanted> {
        if !self.batch.pieces.is_empty() {
            let empty = self.empties.try_recv().unwrap_or(Batch {
                purpose: next,
                bytes: Vec::new(),
                pieces: Vec::new(),
            });
            let full = std::mem::replace(&mut self.batch, empty);
            self.batch.pieces.clear();
            self.filled = 0;
            self.data = 0;
            self.batches.send(Ok(full)).map_err(|_| NotWanted)?;
            self.shared.for_server.ring();
        }
        self.batch.purpose = next;
        Ok(())
    }
}

/// The runs of a working set, each window of some pages in ascending order.
fn windows(set: &WorkingSet) -> Vec<Vec<PageRange>> {
    let mut windows = Vec::new();
    let (mut window, mut pages) = (Vec::new(), 0);
    for run in set.runs() {
        window.push(*run);
        pages += run.count;
        if pages >= WINDOW_PAGES {
            windows.push(std::mem::take(&mut window));
            pages = 0;
        }
    }
    windows.push(window);
    for window in &mut windows {
        window.sort_unstable();
        window.dedup_by(|next, run| {
            let joined = run.end() == next.first;
            if joined {
                run.count += next.count;
            }
            joined
        });
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn windows_have_the_same_pages_nearly_in_order(
            order in proptest::collection::vec(0u64..20_000, 0..6000),
        ) {
            let set = WorkingSet::new(20_000, order);
            let pages = |runs: &[PageRange]| -> Vec<u64> {
                runs.iter().flat_map(|run| run.first..run.end()).collect()
            };
            let wanted = pages(set.runs());
            let mut done = 0;
            for window in windows(&set) {
                let found = pages(&window);
                prop_assert!(found.is_sorted());
                let mut same = wanted[done..done + found.len()].to_vec();
                same.sort_unstable();
                prop_assert_eq!(&same, &found);
                done += found.len();
            }
            prop_assert_eq!(done, wanted.len());
        }
    }
}
