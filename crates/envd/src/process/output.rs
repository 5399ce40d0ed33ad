//! A program's output: one bounded log with offsets, read by any number of readers.
//!
//! Bytes are counted over all channels in the order they were read. Each reader has its own
//! place. A *lossless* reader holds the log back: when [`WINDOW`] bytes are unread by it, the
//! program waits, as it would for a full pipe. Any other reader that falls behind skips what
//! was dropped meanwhile and is told how much. A lossless reader that has not moved for
//! [`PATIENCE`] while others listen becomes such a one, so that it cannot hold them up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::exit::Exit;
use crate::handover::Counter;

/// Unread bytes after which a lossless reader makes the program wait.
pub const WINDOW: u64 = 256 * 1024;
/// Bytes kept for those who come late.
pub const KEPT: u64 = 192 * 1024;
/// Chunks after which the same holds, however small they are.
const WINDOW_CHUNKS: usize = 2048;
const KEPT_CHUNKS: usize = 1024;
/// How long a lossless reader may stand still while others listen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where output comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The terminal.
    Pty,
}

impl Channel {
    /// The most bytes of one event.
    pub fn max_chunk(self) -> usize {
        match self {
            Channel::Stdout | Channel::Stderr => 32 * 1024,
            Channel::Pty => 16 * 1024,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Channel::Stdout => "stdout",
            Channel::Stderr => "stderr",
            Channel::Pty => "pty",
        }
    }

    /// Number of its field in `DataEvent`.
    pub(super) fn field(self) -> u8 {
        match self {
            Channel::Stdout => 1,
            Channel::Stderr => 2,
            Channel::Pty => 3,
        }
    }
}

/// What a reader gets next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Output.
    Data(Channel, Bytes),
    /// So many bytes were dropped before this reader came to them.
    Missed(u64),
    /// The program has ended and all its output was read.
    End(Exit),
}

#[derive(Debug)]
struct Chunk {
    offset: u64,
    channel: Channel,
    data: Bytes,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + self.data.len() as u64
    }
}

#[derive(Debug)]
struct Place {
    at: u64,
    lossless: bool,
    moved: Instant,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Inner {
    chunks: VecDeque<Chunk>,
    /// Offset of the first byte that is kept.
    start: u64,
    /// Offset of the next byte.
    end: u64,
    exit: Option<Exit>,
    places: Vec<Option<Place>>,
    /// Pumps that wait for room.
    blocked: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Log {
    inner: Mutex<Inner>,
    room: Notify,
    /// Tells the next agent how far this one came.
    counter: Option<Counter>,
}

/// What the log holds back for.
enum Room {
    Free,
    Full { retry: Option<Duration> },
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty log, whose end is counted where a crash does not reach.
    pub fn counted(counter: Option<Counter>) -> Log {
        Log {
            counter,
            ..Log::default()
        }
    }

    /// The log of a program that an agent before this one has started: what was read then
    /// is missed by whoever asks for it.
    pub fn resumed(counter: Option<Counter>) -> Log {
        let log = Log::counted(counter);
        let at = log.counter.as_ref().map_or(0, Counter::get);
        let mut inner = log.lock();
        (inner.start, inner.end) = (at, at);
        drop(inner);
        log
    }

    /// The log of a program that has ended after `end` bytes, none of which are kept.
    pub fn ended(end: u64, exit: Exit) -> Log {
        let log = Log::default();
        let mut inner = log.lock();
        (inner.start, inner.end, inner.exit) = (end, end, Some(exit));
        drop(inner);
        log
    }

    /// Number of its counter.
    pub fn counter(&self) -> Option<u32> {
        self.counter.as_ref().map(Counter::slot)
    }

    /// A reader from `offset` on (what is no longer kept counts as missed), or from now.
    pub fn reader(self: &Arc<Self>, offset: Option<u64>, lossless: bool) -> Reader {
        let mut inner = self.lock();
        let at = offset.map_or(inner.end, |offset| offset.min(inner.end));
        let place = Some(Place {
            at,
            lossless,
            moved: Instant::now(),
            waker: None,
        });
        let free = inner.places.iter().position(Option::is_none);
        let slot = match free {
            Some(slot) => {
                inner.places[slot] = place;
                slot
            }
            None => {
                inner.places.push(place);
                inner.places.len() - 1
            }
        };
        Reader {
            log: Arc::clone(self),
            slot,
        }
    }

    /// Waits until more may be pushed. Once the program has ended there is always room:
    /// what comes then is dropped.
    pub async fn room(&self) {
        let mut waited = false;
        loop {
            let notified = self.room.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let retry = {
                let mut inner = self.lock();
                let room = inner.room();
                let full = matches!(room, Room::Full { .. });
                if full && !waited {
                    inner.blocked += 1;
                }
                if !full && waited {
                    inner.blocked -= 1;
                }
                waited = full;
                match room {
                    Room::Free => return,
                    Room::Full { retry } => retry,
                }
            };
            match retry {
                Some(retry) => {
                    let _ = tokio::time::timeout(retry, notified).await;
                }
                None => notified.await,
            }
        }
    }

    /// Adds output and wakes the readers.
    pub fn push(&self, channel: Channel, data: Bytes) {
        let mut inner = self.lock();
        if inner.exit.is_some() || data.is_empty() {
            return;
        }
        let offset = inner.end;
        inner.end += data.len() as u64;
        if let Some(counter) = &self.counter {
            // Before any reader has it: no offset that a client knows is ever ahead.
            counter.set(inner.end);
        }
        inner.chunks.push_back(Chunk {
            offset,
            channel,
            data,
        });
        inner.evict();
        let wakers = inner.take_wakers();
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Marks the end. The first exit counts.
    pub fn finish(&self, exit: Exit) {
        let mut inner = self.lock();
        inner.exit.get_or_insert(exit);
        let wakers = inner.take_wakers();
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
        self.room.notify_waiters();
    }

    /// Offset of the next byte, and whether a pump waits for a reader: a log that stands
    /// still for that reason is not quiet.
    pub fn progress(&self) -> (u64, bool) {
        let inner = self.lock();
        (inner.end, inner.blocked > 0)
    }

    /// Bytes that are kept now.
    pub fn kept(&self) -> u64 {
        let inner = self.lock();
        inner.end - inner.start
    }

    /// What it takes to keep them: of many small outputs the log itself is the most.
    pub(super) fn memory(&self) -> u64 {
        let inner = self.lock();
        let frame = size_of::<Log>() + inner.chunks.capacity() * size_of::<Chunk>();
        frame as u64 + inner.end - inner.start
    }
}

impl Inner {
    /// Where the slowest lossless reader is; the end where there is none.
    fn needed_from(&self) -> u64 {
        self.places
            .iter()
            .flatten()
            .filter(|p| p.lossless)
            .map(|p| p.at)
            .min()
            .unwrap_or(self.end)
    }

    fn evict(&mut self) {
        if self.end - self.start <= KEPT && self.chunks.len() <= KEPT_CHUNKS {
            return;
        }
        let needed_from = self.needed_from();
        while let Some(first) = self.chunks.front() {
            let over = self.end - self.start > KEPT || self.chunks.len() > KEPT_CHUNKS;
            if !over || first.end() > needed_from {
                break;
            }
            self.start = first.end();
            self.chunks.pop_front();
        }
    }

    fn room(&mut self) -> Room {
        loop {
            let unread = self.end - self.needed_from();
            if self.exit.is_some() || (unread < WINDOW && self.chunks.len() < WINDOW_CHUNKS) {
                return Room::Free;
            }
            // The count may be full of what everybody has read.
            self.evict();
            if unread < WINDOW && self.chunks.len() < WINDOW_CHUNKS {
                return Room::Free;
            }
            if self.places.iter().flatten().count() < 2 {
                // Alone: as with a pipe, the program waits as long as its reader does.
                // Another reader that comes later is seen at the next look.
                return Room::Full {
                    retry: Some(PATIENCE),
                };
            }
            let needed_from = self.needed_from();
            let slowest = self
                .places
                .iter_mut()
                .flatten()
                .filter(|p| p.lossless && p.at == needed_from);
            let mut wait = None;
            let mut gave_up = false;
            for place in slowest {
                let stood = place.moved.elapsed();
                if stood >= PATIENCE {
                    place.lossless = false;
                    gave_up = true;
                } else {
                    wait = Some(PATIENCE - stood);
                }
            }
            if !gave_up {
                return Room::Full { retry: wait };
            }
        }
    }

    fn take_wakers(&mut self) -> Vec<Waker> {
        self.places
            .iter_mut()
            .flatten()
            .filter_map(|p| p.waker.take())
            .collect()
    }

    /// What the reader at `at` gets next, and where it is then.
    fn next(&self, at: u64) -> Option<(Item, u64)> {
        if at < self.start {
            return Some((Item::Missed(self.start - at), self.start));
        }
        let index = self.chunks.partition_point(|chunk| chunk.end() <= at);
        match self.chunks.get(index) {
            Some(chunk) => {
                let skip = usize::try_from(at - chunk.offset).unwrap_or(usize::MAX);
                let data = chunk.data.slice(skip.min(chunk.data.len())..);
                Some((Item::Data(chunk.channel, data), chunk.end()))
            }
            None => self.exit.map(|exit| (Item::End(exit), at)),
        }
    }
}

/// One reader's place in a log; given up on drop.
#[derive(Debug)]
pub struct Reader {
    log: Arc<Log>,
    slot: usize,
}

impl Reader {
    /// The next item; after [`Item::End`] the same again.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Item> {
        let mut inner = self.log.lock();
        let Some(Some(place)) = inner.places.get(self.slot) else {
            return Poll::Pending;
        };
        match inner.next(place.at) {
            Some((item, at)) => {
                if let Some(Some(place)) = inner.places.get_mut(self.slot) {
                    place.at = at;
                    place.moved = Instant::now();
                }
                // Woken at half, so that pump and reader do not take turns per chunk.
                let wake = inner.blocked > 0 && inner.end - inner.needed_from() <= WINDOW / 2;
                drop(inner);
                if wake {
                    self.log.room.notify_waiters();
                }
                Poll::Ready(item)
            }
            None => {
                if let Some(Some(place)) = inner.places.get_mut(self.slot) {
                    // Nothing to read is no standing still.
                    place.moved = Instant::now();
                    match &mut place.waker {
                        Some(waker) => waker.clone_from(cx.waker()),
                        none => *none = Some(cx.waker().clone()),
                    }
                }
                Poll::Pending
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.log.lock().places[self.slot] = None;
        self.log.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    async fn next(reader: &mut Reader) -> Item {
        poll_fn(|cx| reader.poll_next(cx)).await
    }

    fn chunk(n: usize) -> Bytes {
        Bytes::from(vec![b'x'; n])
    }

    #[tokio::test]
    async fn g27_a_lossless_reader_holds_the_program_back_and_loses_nothing() {
        let log = Arc::new(Log::default());
        let mut reader = log.reader(None, true);
        for _ in 0..8 {
            log.room().await;
            log.push(Channel::Stdout, chunk(32 * 1024));
        }
        let blocked = tokio::time::timeout(Duration::from_millis(20), log.room()).await;
        assert!(blocked.is_err(), "a full window must hold back");
        for _ in 0..4 {
            assert_eq!(
                next(&mut reader).await,
                Item::Data(Channel::Stdout, chunk(32 * 1024))
            );
        }
        log.room().await;
        log.finish(Exit::Code(0));
        for _ in 0..4 {
            assert!(matches!(next(&mut reader).await, Item::Data(..)));
        }
        assert_eq!(next(&mut reader).await, Item::End(Exit::Code(0)));
    }

    #[tokio::test]
    async fn g27_a_stuck_reader_is_told_what_it_missed_and_holds_nobody_up() {
        let log = Arc::new(Log::default());
        let mut stuck = log.reader(None, false);
        let mut total = 0;
        for n in 0..1000 {
            log.room().await;
            log.push(Channel::Stdout, chunk(n));
            total += n as u64;
        }
        assert!(log.kept() <= KEPT);
        log.finish(Exit::Code(0));
        let Item::Missed(missed) = next(&mut stuck).await else {
            panic!("must be told")
        };
        let mut read = 0;
        loop {
            match next(&mut stuck).await {
                Item::Data(_, data) => read += data.len() as u64,
                Item::End(_) => break,
                Item::Missed(_) => panic!("told twice"),
            }
        }
        assert_eq!(missed + read, total);
    }

    #[tokio::test]
    async fn g27_a_late_reader_replays_from_any_offset() {
        let log = Arc::new(Log::default());
        for part in ["abc", "def", "ghi"] {
            log.push(Channel::Pty, Bytes::from_static(part.as_bytes()));
        }
        let mut reader = log.reader(Some(4), false);
        assert_eq!(
            next(&mut reader).await,
            Item::Data(Channel::Pty, Bytes::from_static(b"ef"))
        );
        assert_eq!(
            next(&mut reader).await,
            Item::Data(Channel::Pty, Bytes::from_static(b"ghi"))
        );
        let mut now = log.reader(None, false);
        log.push(Channel::Pty, Bytes::from_static(b"j"));
        assert_eq!(
            next(&mut now).await,
            Item::Data(Channel::Pty, Bytes::from_static(b"j"))
        );
    }

    #[tokio::test]
    async fn many_tiny_chunks_are_bounded_too() {
        let log = Arc::new(Log::default());
        let _idle = log.reader(None, true);
        for _ in 0..WINDOW_CHUNKS {
            log.push(Channel::Stdout, chunk(1));
        }
        assert!(
            tokio::time::timeout(Duration::from_millis(20), log.room())
                .await
                .is_err()
        );
        drop(_idle);
        log.room().await;
        assert!(log.lock().chunks.len() <= KEPT_CHUNKS);
    }

    #[tokio::test]
    async fn g27_patience_with_a_lossless_reader_ends_when_others_listen() {
        let log = Arc::new(Log::default());
        let _stuck = log.reader(None, true);
        let mut other = log.reader(None, false);
        for _ in 0..8 {
            log.push(Channel::Stdout, chunk(32 * 1024));
        }
        // The log's patience is real time; make the reader look as if it had stood long.
        if let Some(place) = log.lock().places[0].as_mut() {
            place.moved = Instant::now().checked_sub(PATIENCE).unwrap();
        }
        log.room().await;
        log.push(Channel::Stdout, chunk(1));
        assert!(matches!(
            next(&mut other).await,
            Item::Data(..) | Item::Missed(_)
        ));
    }
}
