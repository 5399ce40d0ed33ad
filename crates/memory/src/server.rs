//! The loop that serves one machine's memory: the only place that reads its events and the
//! only one that puts pages into it.
//!
//! ```text
//!             ┌───────────── poll: memory, monitor, bell ◀──────────────┐
//!             ▼                                                         │
//!   read events ──faults──▶ answer them ──none left──▶ place one slice ─┘
//!        └─removed──▶ settled                            of a batch
//! ```
//!
//! Why a page that was removed never comes back with its old content: a thread that empties
//! memory (`MADV_DONTNEED`, a balloon) waits until its event has been read, and only then
//! empties it. So everything placed before the read is emptied with the rest. The read marks
//! the pages as settled, and whatever is placed later looks at that first. Between that look
//! and the placing no event is read, because one thread does both. Events that wait to be
//! read meanwhile make the kernel refuse the placing (`EAGAIN`), and it is tried again behind
//! them. A settled page that is missing all the same was emptied, so it is filled with zeros.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use wrenn_snapshot::{PAGE, PageRange, PageReader};

use crate::ServeError;
use crate::feeder::{Batch, Content, Piece, Purpose};
use crate::handshake::timespec;
use crate::kernel::{Event, Messages, Placed, Uffd};
use crate::layers::{Kind, Layers};
use crate::monitor::Monitor;
use crate::regions::Regions;
use crate::settled::Settled;
use crate::status::{Shared, State, add};
use crate::throttle::Throttle;

/// Pages of data placed between two looks at the faults, 256 KiB: a fault waits some 100 µs
/// for them at most, and larger slices are not faster.
const SLICE_PAGES: u64 = 64;

/// So many zero pages are made in the time of one with data.
const ZEROS_PER_PAGE: u64 = 8;

/// Calls between two looks at the faults, where pages lie scattered.
const SLICE_CALLS: u32 = 24;

/// How often a placing that the kernel refused for now is tried at once, before it is waited
/// a little: the thread it waits for has been woken and needs a processor.
const BUSY_YIELDS: u32 = 64;
const BUSY_WAIT: Duration = Duration::from_micros(500);

/// How long the end of a process is waited for whose memory is gone already.
const GONE_PATIENCE: Duration = Duration::from_secs(10);

/// What the feeder is connected by.
pub(crate) struct Feed {
    pub(crate) batches: Receiver<Result<Batch, ServeError>>,
    pub(crate) empties: Sender<Batch>,
    /// Lets it begin.
    pub(crate) begin: Option<Sender<()>>,
}

/// A recording of what is asked for.
pub(crate) struct Recording {
    pub(crate) order: Vec<u64>,
    pub(crate) most: usize,
    pub(crate) until: Instant,
}

/// Where in a batch the server is.
struct Cursor {
    batch: Batch,
    piece: usize,
    /// Pages of the piece that are behind.
    done: u64,
    /// Most pages that are placed at once; less while a mapping ends inside a slice.
    most: u64,
}

/// Whether there is still a machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Lives,
    Gone,
}

/// What one call brought.
enum Step {
    /// Pages, counted by the time they take.
    Placed(u64),
    /// Nothing, and nothing more for now.
    Stopped,
    /// The memory is gone.
    Gone,
}

pub(crate) struct Server<'a> {
    uffd: &'a Uffd,
    monitor: &'a mut Monitor,
    regions: &'a Regions,
    layers: &'a Layers,
    settled: &'a Settled,
    shared: &'a Shared,
    reader: PageReader<'static>,
    messages: Messages,
    page: Box<[u8; PAGE]>,
    /// Pages that are waited for.
    faults: VecDeque<u64>,
    recording: Option<Recording>,
    /// Told when the recording has ended.
    recorded: &'a mut dyn FnMut(Recording),
    feed: Option<Feed>,
    cursor: Option<Cursor>,
    throttle: Throttle,
    rate: u64,
    /// Placings refused for now, in a row.
    busy: u32,
    state: State,
}

impl<'a> Server<'a> {
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, with what was made for it"
    )]
    pub(crate) fn new(
        uffd: &'a Uffd,
        monitor: &'a mut Monitor,
        regions: &'a Regions,
        layers: &'a Layers,
        settled: &'a Settled,
        shared: &'a Shared,
        feed: Option<Feed>,
        recording: Option<Recording>,
        recorded: &'a mut dyn FnMut(Recording),
    ) -> Result<Server<'a>, ServeError> {
        let now = Instant::now();
        Ok(Server {
            uffd,
            monitor,
            regions,
            layers,
            settled,
            shared,
            reader: layers.reader().map_err(ServeError::Snapshot)?,
            messages: Messages::new(),
            page: Box::new([0; PAGE]),
            faults: VecDeque::new(),
            recording,
            recorded,
            feed,
            cursor: None,
            throttle: Throttle::new(now),
            rate: shared.rate.load(Ordering::Relaxed),
            busy: 0,
            state: State::Listening,
        })
    }

    /// Serves until the machine is gone.
    pub(crate) fn run(mut self) -> Result<(), ServeError> {
        loop {
            self.obey();
            self.next_batch()?;
            let (life, memory) = self.poll()?;
            if life == Life::Gone {
                return Ok(());
            }
            if memory {
                self.take_events()?;
            }
            let life = match self.faults.is_empty() {
                true => self.place()?,
                false => self.answer_faults()?,
            };
            if life == Life::Gone {
                return self.mourn();
            }
        }
    }

    /// Does what was asked for meanwhile.
    fn obey(&mut self) {
        if self.shared.cancelled.load(Ordering::Relaxed) {
            self.feed = None;
            self.cursor = None;
        }
        let rate = self.shared.rate.load(Ordering::Relaxed);
        if rate != self.rate {
            self.rate = rate;
            self.throttle.reset(Instant::now());
        }
        let over = |recording: &mut Recording| {
            recording.order.len() >= recording.most
                || Instant::now() >= recording.until
                || self.shared.finish_recording.load(Ordering::Relaxed)
        };
        if let Some(recording) = self.recording.take_if(over) {
            (self.recorded)(recording);
        }
        if self.recording.is_none()
            && let Some(feed) = &mut self.feed
            && let Some(begin) = feed.begin.take()
        {
            // If it has ended already, the channel's end tells.
            let _ = begin.send(());
        }
    }

    /// Takes the next batch if there is one and it is time.
    fn next_batch(&mut self) -> Result<(), ServeError> {
        if self.cursor.is_none()
            && let Some(feed) = &self.feed
        {
            match feed.batches.try_recv() {
                Ok(Ok(batch)) => {
                    self.cursor = Some(Cursor {
                        batch,
                        piece: 0,
                        done: 0,
                        most: u64::MAX,
                    });
                }
                Ok(Err(error)) => return Err(error),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.feed = None,
            }
        }
        let state = match (&self.recording, &self.cursor, &self.feed) {
            (Some(_), ..) => State::Recording,
            (None, Some(cursor), _) => match cursor.batch.purpose {
                Purpose::Prefetch => State::Prefetching,
                Purpose::Background => State::Copying,
            },
            // Between two batches it is what it was; before the first one it reads.
            (None, None, Some(_)) => match self.state {
                State::Prefetching | State::Copying => self.state,
                _ => State::Prefetching,
            },
            (None, None, None) => State::Idle,
        };
        if state != self.state {
            self.state = state;
            self.shared.set_state(state);
        }
        Ok(())
    }

    /// How long nothing will be to do unless somebody wakes us; `None`: for ever.
    fn pause(&self) -> Option<Duration> {
        if self.busy > BUSY_YIELDS {
            return Some(BUSY_WAIT);
        }
        if !self.faults.is_empty() {
            return Some(Duration::ZERO);
        }
        if let Some(cursor) = &self.cursor {
            return Some(self.throttled(cursor).unwrap_or_default());
        }
        let recording = self.recording.as_ref()?;
        Some(recording.until.saturating_duration_since(Instant::now()))
    }

    /// How long the batch has to wait.
    fn throttled(&self, cursor: &Cursor) -> Option<Duration> {
        let free = self.rate == 0
            || cursor.batch.purpose == Purpose::Prefetch
            || cursor
                .piece()
                .is_none_or(|piece| piece.content == Content::Zero);
        match free {
            true => None,
            false => self.throttle.wait(Instant::now()),
        }
    }

    /// Waits for something to do. Tells whether the machine lives, and whether there are
    /// events.
    fn poll(&mut self) -> Result<(Life, bool), ServeError> {
        let pause = self.pause().map(timespec);
        let mut polled = [
            PollFd::new(self.uffd, PollFlags::IN),
            PollFd::new(&*self.monitor, PollFlags::IN),
            PollFd::new(&self.shared.for_server, PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, pause.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ServeError::system("wait for the monitor")(error)),
        }
        let [memory, monitor, bell] = polled.map(|polled| polled.revents());
        if !bell.is_empty() {
            self.shared.for_server.hush();
        }
        if !monitor.is_empty() {
            self.monitor.set_ended();
            return Ok((Life::Gone, false));
        }
        if memory.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            let broken = io::Error::other("its descriptor reports an error");
            return Err(ServeError::system("watch the monitor's memory")(broken));
        }
        Ok((Life::Lives, !memory.is_empty()))
    }

    /// Reads all events: faults are noted, removals take effect.
    fn take_events(&mut self) -> Result<(), ServeError> {
        let Server {
            uffd,
            regions,
            settled,
            shared,
            messages,
            faults,
            ..
        } = self;
        let pid = self.monitor.pid();
        let mut problem = None;
        let mut more = true;
        while more && problem.is_none() {
            let read = uffd.read(messages, |event| match event {
                Event::Missing(address) => match regions.page_at(address) {
                    Some(page) => faults.push_back(page),
                    None => {
                        problem = Some(format!(
                            "waits for address {address:#x}, which is in no region it described"
                        ));
                    }
                },
                Event::Removed { start, end } => {
                    for range in regions.pages_in(start..end) {
                        settled.add(range);
                        add(&shared.removed, range.count);
                    }
                }
                Event::Other(what) => problem = Some(what.to_owned()),
            });
            more = read.map_err(ServeError::system("read what the monitor's memory tells"))?;
        }
        match problem {
            Some(what) => Err(ServeError::Unsupported { pid, what }),
            None => Ok(()),
        }
    }

    /// Tries to answer every fault once; those that are refused for now stay.
    fn answer_faults(&mut self) -> Result<Life, ServeError> {
        for _ in 0..self.faults.len() {
            let Some(page) = self.faults.pop_front() else {
                break;
            };
            let Some((address, _)) = self.regions.address_of(page, 1) else {
                continue;
            };
            match self.bring(page, address)? {
                Placed::Bytes(_) => self.settle(page),
                // Somebody was faster: the batch it was in, or the monitor itself.
                Placed::Exists => {
                    self.settle(page);
                    self.wake(page, address)?;
                }
                // Nobody can wait for it there any more; should they, they ask again.
                Placed::Unmapped => self.wake(page, address)?,
                Placed::Busy => {
                    self.faults.push_back(page);
                    self.back_off();
                    continue;
                }
                Placed::Gone => return Ok(Life::Gone),
            }
            self.busy = 0;
            add(&self.shared.faults, 1);
        }
        Ok(Life::Lives)
    }

    /// Puts the page there that the machine must find.
    fn bring(&mut self, page: u64, address: u64) -> Result<Placed, ServeError> {
        let one = PageRange {
            first: page,
            count: 1,
        };
        let kind = match self.settled.has(page) {
            true => Kind::Zero,
            false => self.layers.kind(page, 1).0,
        };
        let placed = match kind {
            Kind::Zero => self.uffd.zero(address, PAGE),
            Kind::Base => self.uffd.copy(address, self.layers.in_base(one)),
            Kind::Read => {
                let read = self.reader.read(page, &mut self.page[..]);
                read.map_err(|source| ServeError::Unreadable {
                    first: page,
                    last: page,
                    source,
                })?;
                self.uffd.copy(address, &self.page[..])
            }
        };
        placed.map_err(|source| ServeError::Unplaceable { page, source })
    }

    /// Notes that a page has come, because it was asked for.
    fn settle(&mut self, page: u64) {
        if let Some(recording) = &mut self.recording
            && !self.settled.has(page)
        {
            recording.order.push(page);
        }
        self.settled.add(PageRange {
            first: page,
            count: 1,
        });
    }

    fn wake(&self, page: u64, address: u64) -> Result<(), ServeError> {
        let woken = self.uffd.wake(address);
        woken.map_err(|source| ServeError::Unplaceable { page, source })
    }

    /// Lets the thread go on that has to before anything can be placed.
    fn back_off(&mut self) {
        self.busy += 1;
        std::thread::yield_now();
    }

    /// Places a part of the batch, small enough that a fault does not notice.
    fn place(&mut self) -> Result<Life, ServeError> {
        let mut room = SLICE_PAGES;
        for _ in 0..SLICE_CALLS {
            match self.place_slice(room)? {
                Step::Placed(pages) => room = room.saturating_sub(pages),
                Step::Stopped => break,
                Step::Gone => return Ok(Life::Gone),
            }
            if room == 0 {
                break;
            }
        }
        Ok(Life::Lives)
    }

    /// Makes one call for pages of the batch, at most for as many as take the time of `room`
    /// pages of data.
    fn place_slice(&mut self, room: u64) -> Result<Step, ServeError> {
        let Some(mut cursor) = self.cursor.take() else {
            return Ok(Step::Stopped);
        };
        if self.throttled(&cursor).is_some() {
            self.cursor = Some(cursor);
            return Ok(Step::Stopped);
        }
        let Some((run, content)) = cursor.next_run(self.settled, room) else {
            if let Some(feed) = &self.feed {
                // The feeder may have ended, then nobody needs it.
                let _ = feed.empties.send(cursor.batch);
            }
            return Ok(Step::Stopped);
        };
        let Some((address, count)) = self.regions.address_of(run.first, run.count) else {
            // The regions have every page of the memory.
            cursor.skip_to(run.end());
            self.cursor = Some(cursor);
            return Ok(Step::Placed(0));
        };
        let bytes = count as usize * PAGE;
        let placed = match content {
            Content::Zero => self.uffd.zero(address, bytes),
            Content::Base => {
                let first = run.first;
                self.uffd
                    .copy(address, self.layers.in_base(PageRange { first, count }))
            }
            Content::Batch(at) => self.uffd.copy(address, &cursor.batch.bytes[at..at + bytes]),
        };
        let placed = placed.map_err(|source| ServeError::Unplaceable {
            page: run.first,
            source,
        })?;
        let purpose = cursor.batch.purpose;
        let mut settle = |count: u64| {
            let range = PageRange {
                first: run.first,
                count,
            };
            self.settled.add(range);
            cursor.skip_to(range.end());
        };
        let mut step = Step::Placed(0);
        match placed {
            Placed::Bytes(bytes) => {
                let pages = (bytes / PAGE) as u64;
                settle(pages);
                let count = match purpose {
                    Purpose::Prefetch => &self.shared.prefetched,
                    Purpose::Background => &self.shared.background,
                };
                add(count, pages);
                if purpose == Purpose::Background && content != Content::Zero {
                    self.throttle.spend(Instant::now(), bytes as u64, self.rate);
                }
                step = Step::Placed(match content {
                    Content::Zero => pages.div_ceil(ZEROS_PER_PAGE),
                    Content::Base | Content::Batch(_) => pages,
                });
                self.busy = 0;
                cursor.most = cursor.most.saturating_mul(2);
            }
            Placed::Exists => settle(1),
            // A mapping ends inside. A page that has none is left to whoever asks for it.
            Placed::Unmapped if count > 1 => cursor.most = count / 2,
            Placed::Unmapped => cursor.skip_to(run.first + 1),
            Placed::Busy => {
                self.back_off();
                step = Step::Stopped;
            }
            Placed::Gone => return Ok(Step::Gone),
        }
        self.cursor = Some(cursor);
        Ok(step)
    }

    /// The memory is gone: so is the process soon, unless it runs another program now.
    fn mourn(self) -> Result<(), ServeError> {
        match self.monitor.ends_within(GONE_PATIENCE) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ServeError::Unsupported {
                pid: self.monitor.pid(),
                what: "gave up its memory without ending".into(),
            }),
            Err(error) => Err(ServeError::system("wait for the monitor's end")(error)),
        }
    }
}

impl Cursor {
    fn piece(&self) -> Option<Piece> {
        self.batch.pieces.get(self.piece).copied()
    }

    /// The next pages to place and where their content is: a slice at most, none that is
    /// settled. `None` at the end of the batch.
    fn next_run(&mut self, settled: &Settled, room: u64) -> Option<(PageRange, Content)> {
        while let Some(piece) = self.piece() {
            let rest = PageRange {
                first: piece.pages.first + self.done,
                count: piece.pages.count - self.done,
            };
            let Some(mut run) = settled.first_open(rest) else {
                self.piece += 1;
                self.done = 0;
                continue;
            };
            let skipped = (run.first - piece.pages.first) as usize * PAGE;
            let (slice, content) = match piece.content {
                Content::Zero => (room * ZEROS_PER_PAGE, Content::Zero),
                Content::Base => (room, Content::Base),
                Content::Batch(at) => (room, Content::Batch(at + skipped)),
            };
            run.count = run.count.min(slice).min(self.most.max(1));
            return Some((run, content));
        }
        None
    }

    /// Goes on with `page`, of the same piece or just behind it.
    fn skip_to(&mut self, page: u64) {
        if let Some(piece) = self.piece() {
            self.done = page
                .saturating_sub(piece.pages.first)
                .min(piece.pages.count);
        }
    }
}
