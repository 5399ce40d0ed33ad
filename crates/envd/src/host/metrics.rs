//! How busy the guest is.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::cgroups::meminfo;

/// One look; names and units are E2B's.
#[derive(Debug, Serialize)]
pub(super) struct Metrics {
    /// Unix time in seconds.
    ts: u64,
    cpu_count: usize,
    /// Of all CPUs together, since the last look, two decimals.
    cpu_used_pct: f64,
    /// Bytes.
    mem_total: u64,
    mem_used: u64,
    mem_cache: u64,
    mem_total_mib: u64,
    mem_used_mib: u64,
    /// Bytes of the root file system.
    disk_total: u64,
    disk_used: u64,
}

/// CPU time at the last look.
#[derive(Debug, Default)]
pub(super) struct CpuClock {
    last: Mutex<Option<(u64, u64)>>,
}

impl CpuClock {
    /// Share of the time since the last look (the first: since boot) that was not idle.
    fn used_percent(&self) -> io::Result<f64> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let now = busy_and_total(&stat).ok_or(io::ErrorKind::InvalidData)?;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.replace(now).unwrap_or_default();
        let (busy, total) = (
            now.0.saturating_sub(before.0),
            now.1.saturating_sub(before.1),
        );
        if total == 0 {
            return Ok(0.0);
        }
        Ok((busy as f64 / total as f64 * 10_000.0).round() / 100.0)
    }
}

/// Ticks of the line `cpu`, see proc_stat(5): idle and iowait are no work; guest time is
/// part of user time.
fn busy_and_total(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find_map(|l| l.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .take(8)
        .map_while(|t| t.parse().ok())
        .collect();
    let total: u64 = ticks.iter().sum();
    let idle = ticks.get(3)? + ticks.get(4).unwrap_or(&0);
    Some((total.saturating_sub(idle), total))
}

pub(super) fn read(cpu: &CpuClock) -> io::Result<Metrics> {
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo lacks a line");
    let mem_total = meminfo("MemTotal:").ok_or_else(missing)?;
    let available = meminfo("MemAvailable:").ok_or_else(missing)?;
    let mem_used = mem_total.saturating_sub(available);
    let disk = rustix::fs::statvfs("/")?;
    let blocks = |n: u64| n.saturating_mul(disk.f_frsize);
    Ok(Metrics {
        ts: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
        cpu_count: std::thread::available_parallelism().map_or(1, usize::from),
        cpu_used_pct: cpu.used_percent()?,
        mem_total,
        mem_used,
        mem_cache: meminfo("Cached:").unwrap_or(0),
        mem_total_mib: mem_total >> 20,
        mem_used_mib: mem_used >> 20,
        disk_total: blocks(disk.f_blocks),
        disk_used: blocks(disk.f_blocks.saturating_sub(disk.f_bfree)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_are_no_work() {
        let (busy, total) = busy_and_total("cpu  10 0 20 60 10 0 0 0 5 0\ncpu0 1 2 3 4\n").unwrap();
        assert_eq!((busy, total), (30, 100));
        assert!(busy_and_total("intr 1").is_none());
    }

    #[test]
    fn metrics_are_plausible() {
        let metrics = read(&CpuClock::default()).unwrap();
        assert!(metrics.mem_used < metrics.mem_total && metrics.disk_used <= metrics.disk_total);
        assert!((0.0..=100.0).contains(&metrics.cpu_used_pct));
    }
}
