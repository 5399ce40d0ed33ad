//! How busy sandboxes are: looked at every few seconds, kept with bounded memory.
//!
//! The guest agent says what the guest uses; a guest whose agent does not answer several times
//! in a row is reported. Looking does not count as use of the sandbox.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use wrenn_types::SandboxState;

use crate::activity::unix_ms;
use crate::events::{Actor, EventLog, Kind};
use crate::guest::GuestMetrics;
use crate::sandbox::{Handle, Live, Manager, cpu_ms};

/// How often a sandbox is looked at.
pub const EVERY: Duration = Duration::from_secs(5);
/// Points that are kept as they were taken: 20 minutes.
const FINE: usize = 240;
/// Every so many points one is kept for longer: five minutes,
const COARSE_EVERY: u32 = 60;
/// and as many of them as make a day.
const COARSE: usize = 288;
/// So many points more have room at a time.
const STEP: usize = 24;
/// Points that are kept of a sandbox that has ended.
const AFTERWARDS: usize = 12;
/// A guest agent that fails to answer so many times in a row is reported.
const SILENCES: u32 = 3;
/// Guests that are asked at the same time.
const AT_ONCE: usize = 8;

/// How busy a sandbox was at one moment. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Milliseconds since 1970.
    pub at_unix_ms: i64,
    /// Processors.
    pub cpu_count: u32,
    /// Of all of them, 0 to 100, since the point before.
    pub cpu_used_pct: f64,
    /// Memory that is in use, without caches.
    pub mem_used: u64,
    /// All of the guest's memory.
    pub mem_total: u64,
    /// What caches hold.
    pub mem_cache: u64,
    /// Used on the root file system.
    pub disk_used: u64,
    /// Its size.
    pub disk_total: u64,
    /// Received by the guest since its machine was made.
    pub net_received: u64,
    /// Sent by it.
    pub net_sent: u64,
}

/// A point as it is kept, in little room: there are hundreds of each sandbox. Guests count their
/// memory and disks in KiB at least.
#[derive(Debug, Clone, Copy)]
struct Kept {
    at_unix_ms: i64,
    net_received: u64,
    net_sent: u64,
    mem_used_kib: u32,
    mem_total_kib: u32,
    mem_cache_kib: u32,
    disk_used_kib: u32,
    disk_total_kib: u32,
    cpu_count: u16,
    /// Hundredths of a percent.
    cpu_used: u16,
}

impl From<Point> for Kept {
    fn from(point: Point) -> Self {
        let kib = |bytes: u64| u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
        Kept {
            at_unix_ms: point.at_unix_ms,
            net_received: point.net_received,
            net_sent: point.net_sent,
            mem_used_kib: kib(point.mem_used),
            mem_total_kib: kib(point.mem_total),
            mem_cache_kib: kib(point.mem_cache),
            disk_used_kib: kib(point.disk_used),
            disk_total_kib: kib(point.disk_total),
            cpu_count: u16::try_from(point.cpu_count).unwrap_or(u16::MAX),
            // A number that does not fit, or is none, becomes the nearest, or 0.
            cpu_used: (point.cpu_used_pct * 100.0).round() as u16,
        }
    }
}

impl From<Kept> for Point {
    fn from(kept: Kept) -> Self {
        let bytes = |kib: u32| u64::from(kib) << 10;
        Point {
            at_unix_ms: kept.at_unix_ms,
            cpu_count: u32::from(kept.cpu_count),
            cpu_used_pct: f64::from(kept.cpu_used) / 100.0,
            mem_used: bytes(kept.mem_used_kib),
            mem_total: bytes(kept.mem_total_kib),
            mem_cache: bytes(kept.mem_cache_kib),
            disk_used: bytes(kept.disk_used_kib),
            disk_total: bytes(kept.disk_total_kib),
            net_received: kept.net_received,
            net_sent: kept.net_sent,
        }
    }
}

/// Adds a point to those that are kept, at most `most`.
fn keep(points: &mut VecDeque<Kept>, point: Point, most: usize) {
    if points.len() >= most {
        points.pop_front();
    }
    // By itself it would take twice the room each time.
    if points.len() == points.capacity() {
        points.reserve_exact(STEP);
    }
    points.push_back(point.into());
}

#[derive(Debug, Default)]
struct Inner {
    fine: VecDeque<Kept>,
    coarse: VecDeque<Kept>,
    taken: u32,
    silences: u32,
    cpu_ms: u64,
}

/// The points of one sandbox.
#[derive(Debug, Default)]
pub struct Series(Mutex<Inner>);

impl Series {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic in between leaves a shorter history, nothing worse.
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn add(&self, point: Point) {
        let mut inner = self.inner();
        if inner.taken.is_multiple_of(COARSE_EVERY) {
            keep(&mut inner.coarse, point, COARSE);
        }
        inner.taken = inner.taken.wrapping_add(1);
        keep(&mut inner.fine, point, FINE);
    }

    /// The points from `from` to `to`, ascending: as they were taken where that is still known,
    /// and one of many before that.
    pub fn between(&self, from: i64, to: i64) -> Vec<Point> {
        let inner = self.inner();
        let first_fine = inner.fine.front().map_or(i64::MAX, |p| p.at_unix_ms);
        let old = inner.coarse.iter().filter(|p| p.at_unix_ms < first_fine);
        let all = old.chain(&inner.fine);
        all.filter(|p| p.at_unix_ms >= from && p.at_unix_ms <= to)
            .map(|kept| Point::from(*kept))
            .collect()
    }

    /// The newest point.
    pub fn latest(&self) -> Option<Point> {
        self.inner().fine.back().map(|kept| Point::from(*kept))
    }

    /// Processor time of its machine's monitor when it was last looked at, in milliseconds.
    pub fn cpu_ms(&self) -> u64 {
        self.inner().cpu_ms
    }

    /// Keeps the end only: the sandbox is over.
    pub fn finish(&self) {
        let mut inner = self.inner();
        inner.coarse = VecDeque::new();
        let surplus = inner.fine.len().saturating_sub(AFTERWARDS);
        inner.fine = inner.fine.split_off(surplus);
        inner.fine.shrink_to_fit();
    }

    /// Notes whether the guest agent answered. `Some` when that is news: whether it is well.
    fn answered(&self, answered: bool) -> Option<bool> {
        let mut inner = self.inner();
        let before = inner.silences;
        inner.silences = if answered {
            0
        } else {
            before.saturating_add(1)
        };
        match answered {
            true => (before >= SILENCES).then_some(true),
            false => (inner.silences == SILENCES).then_some(false),
        }
    }
}

/// Looks at all running sandboxes again and again, until it is aborted.
pub fn sample(
    manager: Arc<Manager>,
    events: Arc<EventLog>,
    network_prefix: String,
    patience: Duration,
) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let looks = manager.list().into_iter().filter_map(|handle| {
                let live = handle.live()?;
                let running = handle.view().state == SandboxState::Running;
                running.then(|| look(handle, live, &events, &network_prefix, patience))
            });
            let looks: Vec<_> = looks.collect();
            let looks = futures::stream::iter(looks);
            futures::StreamExt::for_each_concurrent(looks, AT_ONCE, |look| look).await;
        }
    })
}

async fn look(
    handle: Arc<Handle>,
    live: Arc<Live>,
    events: &EventLog,
    network_prefix: &str,
    patience: Duration,
) {
    let asked = tokio::time::timeout(patience, live.guest.metrics()).await;
    let answer = asked.ok().and_then(Result::ok);
    let same = handle.live().is_some_and(|now| Arc::ptr_eq(&now, &live));
    if handle.view().state != SandboxState::Running || !same {
        // It was frozen meanwhile: no wonder that it was silent.
        return;
    }
    if let Some(well) = handle.metrics.answered(answer.is_some()) {
        let (kind, reason) = match well {
            true => (Kind::Responsive, None),
            false => (
                Kind::Unresponsive,
                Some(format!(
                    "its guest agent did not answer {SILENCES} times in a row"
                )),
            ),
        };
        tracing::warn!(sandbox = %handle.id, kind = kind.word(), "guest agent");
        events.add(handle.id, kind, Actor::Guest, reason, None);
    }
    if let Some(used) = cpu_ms(live.vm.pids().vmm.pid) {
        handle.metrics.inner().cpu_ms = used;
    }
    if let Some(guest) = answer {
        let network = traffic(network_prefix, live.slot);
        handle.metrics.add(point(&guest, network));
    }
}

fn point(guest: &GuestMetrics, (net_received, net_sent): (u64, u64)) -> Point {
    Point {
        at_unix_ms: unix_ms(SystemTime::now()),
        cpu_count: guest.cpu_count,
        cpu_used_pct: guest.cpu_used_pct,
        mem_used: guest.mem_used,
        mem_total: guest.mem_total,
        mem_cache: guest.mem_cache,
        disk_used: guest.disk_used,
        disk_total: guest.disk_total,
        net_received,
        net_sent,
    }
}

/// What the guest in a slot has received and sent, as the host's end of the slot counts it; 0
/// where that cannot be read. The host's end sends what the guest receives.
fn traffic(network_prefix: &str, slot: u32) -> (u64, u64) {
    let link = format!("/sys/class/net/{network_prefix}-{slot}/statistics");
    let count = |name: &str| -> u64 {
        let text = std::fs::read_to_string(Path::new(&link).join(name)).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    (count("tx_bytes"), count("rx_bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Point {
        Point {
            at_unix_ms: seconds * 1000,
            cpu_count: 1,
            cpu_used_pct: 0.0,
            mem_used: 0,
            mem_total: 0,
            mem_cache: 0,
            disk_used: 0,
            disk_total: 0,
            net_received: 0,
            net_sent: 0,
        }
    }

    #[test]
    fn a_day_is_kept_in_bounded_memory_and_in_order() {
        let series = Series::default();
        for n in 0..40_000 {
            series.add(at(n * 5));
        }
        let all = series.between(i64::MIN, i64::MAX);
        assert!(all.len() <= FINE + COARSE, "{}", all.len());
        assert!(all.windows(2).all(|w| w[0].at_unix_ms < w[1].at_unix_ms));
        let span = all[all.len() - 1].at_unix_ms - all[0].at_unix_ms;
        assert!(span >= 23 * 3_600_000, "{span}");
        let last = series.latest().unwrap().at_unix_ms;
        let minute = series.between(last - 60_000, last);
        assert_eq!(minute.len(), 13);
        series.finish();
        assert_eq!(series.between(i64::MIN, i64::MAX).len(), AFTERWARDS);
    }

    #[test]
    fn a_point_is_kept_as_it_was_taken() {
        let point = Point {
            at_unix_ms: 1_700_000_000_123,
            cpu_count: 4,
            cpu_used_pct: 12.34,
            mem_used: 100 << 20,
            mem_total: 512 << 20,
            mem_cache: 4 << 10,
            disk_used: 3 << 30,
            disk_total: 2 << 40,
            net_received: u64::MAX,
            net_sent: 1,
        };
        assert_eq!(Point::from(Kept::from(point)), point);
        let odd = Point {
            cpu_used_pct: f64::NAN,
            disk_total: u64::MAX,
            ..point
        };
        let kept = Point::from(Kept::from(odd));
        assert_eq!((kept.cpu_used_pct, kept.disk_total >> 40), (0.0, 3));
    }

    #[test]
    fn silence_is_told_once_and_so_is_its_end() {
        let series = Series::default();
        let news: Vec<_> = [true, false, false, false, false, true, true, false]
            .into_iter()
            .map(|answered| series.answered(answered))
            .collect();
        let mut expected = [None; 8];
        expected[3] = Some(false);
        expected[5] = Some(true);
        assert_eq!(news, expected);
    }
}
