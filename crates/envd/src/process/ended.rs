//! The programs that have ended, for those who connect late.
//!
//! A sandbox may end thousands of programs within [`RETENTION`], so a record of one is small
//! ([`Record`], 32 bytes) and lies in a queue by the order of endings. Who connects late is
//! rare, and reads the queue from its newest end: the newest of a number, or of a tag, counts.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::exit::Exit;
use super::output::Log;
use super::table::Selector;

/// How long an exit is kept for those who connect late.
pub const RETENTION: Duration = Duration::from_secs(60);
/// Exits that are kept: as many as a kernel has process ids unless told otherwise, so that in
/// practice only a number that is used again makes one unreachable. Without a bound they
/// would fill the guest.
const MAX_ENDED: usize = 32_768;
/// Memory of the output of ended programs that is kept for replay, all together.
const ENDED_OUTPUT: u64 = 4 << 20;

/// A program that has ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// The process id it had.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
    /// Bytes it had written.
    end: u64,
    /// The last part of its output, as long as there is memory for it.
    kept: Option<Arc<Log>>,
}

impl Ended {
    /// The log for a late reader. Where nothing is left it still has its end, so that the
    /// reader is told what it missed (G27).
    pub fn log(&self) -> Arc<Log> {
        match &self.kept {
            Some(log) => Arc::clone(log),
            None => Arc::new(Log::ended(self.end, self.exit)),
        }
    }
}

/// What is known of a program that has ended.
#[derive(Debug)]
struct Record {
    pid: u32,
    /// When, in tenths of a second since the queue was made: enough for 13 years.
    at: u32,
    /// Bytes it had written.
    end: u64,
    exit: Exit,
    /// Most have nothing more.
    extra: Option<Box<Extra>>,
}

#[derive(Debug)]
struct Extra {
    tag: Option<Box<str>>,
    kept: Option<KeptLog>,
}

/// Output that is kept for replay.
#[derive(Debug)]
struct KeptLog {
    log: Arc<Log>,
    /// What it counts for in [`Ends::output`].
    memory: u64,
}

impl Record {
    fn is(&self, selector: &Selector) -> bool {
        match selector {
            Selector::Pid(pid) => self.pid == *pid,
            Selector::Tag(tag) => self
                .extra
                .as_ref()
                .is_some_and(|extra| extra.tag.as_deref() == Some(tag)),
        }
    }

    /// Gives the output up, and how much memory that frees. Readers that are at it keep the
    /// log itself.
    fn drop_output(&mut self) -> u64 {
        let Some(extra) = &mut self.extra else {
            return 0;
        };
        let memory = extra.kept.take().map_or(0, |kept| kept.memory);
        if extra.tag.is_none() {
            self.extra = None;
        }
        memory
    }
}

/// See the module. The clock is the caller's.
#[derive(Debug)]
pub(super) struct Ends {
    began: Instant,
    /// The oldest first.
    records: VecDeque<Record>,
    /// How many were before the first of `records`: with it a record's serial number is where
    /// it lies.
    dropped: u64,
    /// Serial numbers of those whose output is kept, the oldest first.
    with_output: VecDeque<u64>,
    /// Memory of that output.
    output: u64,
}

impl Ends {
    pub(super) fn new(now: Instant) -> Ends {
        Ends {
            began: now,
            records: VecDeque::new(),
            dropped: 0,
            with_output: VecDeque::new(),
            output: 0,
        }
    }

    fn tenths(&self, now: Instant) -> u32 {
        let millis = now.saturating_duration_since(self.began).as_millis();
        u32::try_from(millis / 100).unwrap_or(u32::MAX)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Adds a program that has ended now.
    pub(super) fn push(
        &mut self,
        pid: u32,
        tag: Option<&str>,
        log: &Arc<Log>,
        exit: Exit,
        now: Instant,
    ) {
        let kept = (log.kept() > 0).then(|| KeptLog {
            log: Arc::clone(log),
            memory: log.memory(),
        });
        if let Some(kept) = &kept {
            self.output += kept.memory;
            self.with_output
                .push_back(self.dropped + self.records.len() as u64);
        }
        let tag = tag.map(Box::from);
        let extra = (tag.is_some() || kept.is_some()).then(|| Box::new(Extra { tag, kept }));
        self.records.push_back(Record {
            pid,
            at: self.tenths(now),
            end: log.progress().0,
            exit,
            extra,
        });
        self.drop_output();
        self.expire(now);
    }

    /// The last one that has ended with this number or tag, if that was within [`RETENTION`].
    pub(super) fn find(&mut self, selector: &Selector, now: Instant) -> Option<Ended> {
        self.expire(now);
        let found = self.records.iter().rev().find(|one| one.is(selector))?;
        let kept = found.extra.as_ref().and_then(|extra| extra.kept.as_ref());
        Some(Ended {
            pid: found.pid,
            exit: found.exit,
            end: found.end,
            kept: kept.map(|kept| Arc::clone(&kept.log)),
        })
    }

    /// Forgets those whose time has come.
    pub(super) fn expire(&mut self, now: Instant) {
        let now = self.tenths(now);
        let is_over = |oldest: &Record| {
            let age = Duration::from_millis(u64::from(now.saturating_sub(oldest.at)) * 100);
            age >= RETENTION
        };
        while self.records.len() > MAX_ENDED || self.records.front().is_some_and(is_over) {
            let Some(mut oldest) = self.records.pop_front() else {
                break;
            };
            self.dropped += 1;
            self.output = self.output.saturating_sub(oldest.drop_output());
        }
        while self
            .with_output
            .front()
            .is_some_and(|one| *one < self.dropped)
        {
            self.with_output.pop_front();
        }
    }

    /// Gives memory back that the queues no longer need.
    pub(super) fn shrink(&mut self) {
        self.records.shrink_to_fit();
        self.with_output.shrink_to_fit();
    }

    /// Gives up the oldest output where it is too much.
    fn drop_output(&mut self) {
        while self.output > ENDED_OUTPUT {
            let Some(serial) = self.with_output.pop_front() else {
                break;
            };
            let index = serial.checked_sub(self.dropped);
            let record = index.and_then(|index| self.records.get_mut(usize::try_from(index).ok()?));
            if let Some(record) = record {
                self.output = self.output.saturating_sub(record.drop_output());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Channel;
    use super::*;
    use bytes::Bytes;

    /// The log of a program that has written so many bytes, in chunks of at most `chunk`.
    fn wrote(bytes: usize, chunk: usize) -> Arc<Log> {
        let log = Arc::new(Log::default());
        let mut left = bytes;
        while left > 0 {
            let now = left.min(chunk);
            log.push(Channel::Stdout, Bytes::from(vec![b'x'; now]));
            left -= now;
        }
        log.finish(Exit::Code(0));
        log
    }

    fn pid(pid: u32) -> Selector {
        Selector::Pid(pid)
    }

    fn tag(tag: &str) -> Selector {
        Selector::Tag(tag.to_owned())
    }

    #[test]
    fn a_record_is_small() {
        assert_eq!(size_of::<Record>(), 32);
    }

    #[test]
    fn an_exit_is_kept_for_its_time_and_no_longer() {
        let began = Instant::now();
        let mut ends = Ends::new(began);
        ends.push(7, None, &wrote(0, 1), Exit::Code(3), began);
        let later = began + Duration::from_secs(30);
        ends.push(8, Some("a"), &wrote(5, 5), Exit::Code(4), later);
        let almost = began + RETENTION - Duration::from_millis(200);
        assert_eq!(
            ends.find(&pid(7), almost).map(|e| e.exit),
            Some(Exit::Code(3))
        );
        let after = began + RETENTION;
        assert!(ends.find(&pid(7), after).is_none());
        assert_eq!(
            ends.find(&tag("a"), after).map(|e| e.exit),
            Some(Exit::Code(4))
        );
        ends.expire(later + RETENTION);
        assert!(ends.is_empty() && ends.with_output.is_empty());
        assert_eq!(ends.output, 0);
        ends.shrink();
        assert_eq!(
            (ends.records.capacity(), ends.with_output.capacity()),
            (0, 0)
        );
    }

    #[test]
    fn the_newest_of_a_number_or_a_tag_counts() {
        let now = Instant::now();
        let mut ends = Ends::new(now);
        ends.push(7, Some("a"), &wrote(0, 1), Exit::Code(1), now);
        ends.push(8, Some("a"), &wrote(0, 1), Exit::Code(2), now);
        ends.push(7, Some("b"), &wrote(0, 1), Exit::Lost, now);
        assert_eq!(ends.find(&pid(7), now).map(|e| e.exit), Some(Exit::Lost));
        assert_eq!(ends.find(&tag("a"), now).map(|e| e.pid), Some(8));
        assert_eq!(ends.find(&tag("b"), now).map(|e| e.pid), Some(7));
        assert!(ends.find(&tag("c"), now).is_none());
        assert!(ends.find(&pid(9), now).is_none());
    }

    #[test]
    fn no_more_than_so_many_are_kept_and_serial_numbers_stay_right() {
        let now = Instant::now();
        let mut ends = Ends::new(now);
        let more = 100;
        for n in 0..MAX_ENDED + more {
            // Every thousandth with output, so that it is looked for behind what was dropped.
            let bytes = if n % 1000 == 0 { 3 } else { 0 };
            ends.push(n as u32, None, &wrote(bytes, 3), Exit::Code(0), now);
        }
        assert_eq!((ends.records.len(), ends.dropped), (MAX_ENDED, more as u64));
        assert!(ends.find(&pid(more as u32 - 1), now).is_none());
        assert!(ends.find(&pid(more as u32), now).is_some());
        for serial in &ends.with_output {
            let record = &ends.records[(serial - ends.dropped) as usize];
            assert_eq!((u64::from(record.pid), record.end), (*serial, 3));
        }
        assert_eq!(ends.with_output.len(), MAX_ENDED / 1000);
    }

    #[test]
    fn g27_output_is_kept_up_to_a_bound_and_its_end_beyond_that() {
        let now = Instant::now();
        for (bytes, chunk) in [(100_000, 32_000), (1, 1), (500, 1)] {
            let mut ends = Ends::new(now);
            let one = wrote(bytes, chunk).memory();
            assert!(one > bytes as u64);
            let fit = ENDED_OUTPUT / one;
            let count = fit as u32 + 10;
            for n in 0..count {
                ends.push(n, Some("tag"), &wrote(bytes, chunk), Exit::Code(0), now);
            }
            assert_eq!(ends.with_output.len() as u64, fit);
            assert_eq!(ends.output, fit * one);
            let kept = |ends: &mut Ends, n| ends.find(&pid(n), now).map(|e| e.log());
            let gone = kept(&mut ends, 9).expect("its end is known");
            assert_eq!((gone.kept(), gone.progress().0), (0, bytes as u64));
            let there = kept(&mut ends, 10).expect("it is there");
            assert_eq!(there.kept(), bytes as u64);
            // The tag stays where output is given up.
            assert!(ends.records[9].is(&tag("tag")));
        }
    }
}
