//! Network slots by themselves, in a name space of names and a subnet of their own.

use std::path::Path;
use std::time::{Duration, Instant};

use wrenn_net::{NetConfig, NetError, NetworkPolicy, SlotPool};

use super::super::report::{Phase, Unit};
use crate::error::Failure;

const TARGET_TAKE: f64 = 10.0;
const TARGET_POLICY: f64 = 20.0;
/// How often what is quick is done.
const ROUNDS: usize = 50;
/// Entries of a long list.
const MANY: usize = 500;
/// The kernel's memory stands still when it has changed by no more than this in that time.
const SETTLE: Duration = Duration::from_secs(1);
const STILL_KIB: u64 = 256;
/// On a busy machine it never does.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);

/// Takes, changes and gives back slots, and makes `slots` of them.
pub(super) async fn measure(folder: &Path, slots: usize) -> Result<Vec<Phase>, Failure> {
    let mut config = NetConfig::new(folder);
    config.name_prefix = "nbench".to_owned();
    config.subnet = "10.248.0.0/16"
        .parse()
        .map_err(|error| Failure::from_error(&error))?;
    (config.ready, config.max_slots) = (1, slots + 8);
    let failed = |error: NetError| Failure::from_error(&error);
    let pool = SlotPool::start(config.clone()).await.map_err(failed)?;
    let quick = quick(&pool).await;
    pool.shutdown().await;
    let mut phases = quick?;

    config.ready = slots;
    let before = settled().await?;
    let began = Instant::now();
    let pool = SlotPool::start(config).await.map_err(failed)?;
    while pool.stats().ready < slots {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let each = ms(began) / slots as f64;
    let with = settled().await;
    pool.shutdown().await;
    let with = with?;
    let after = settled().await?;
    let of_thousand = |kib: u64| vec![kib as f64 * 1024.0 * 1000.0 / slots as f64];
    let bytes = |name: &str, kib| Phase::new(name, Unit::Bytes, of_thousand(kib), None);
    phases.extend([
        Phase::new("make a slot", Unit::Milliseconds, vec![each], None),
        bytes("kernel memory of 1,000 slots", with.saturating_sub(before)),
        bytes("  of it, given back", with.saturating_sub(after)),
    ]);
    Ok(phases)
}

async fn quick(pool: &SlotPool) -> Result<Vec<Phase>, Failure> {
    let many: Vec<String> = (0..MANY)
        .map(|n| format!("9.{}.{}.7", n / 250, n % 250))
        .collect();
    let policy = |deny: &[&str]| {
        NetworkPolicy::read(true, &["pypi.org"], deny).map_err(|error| Failure::from_error(&error))
    };
    let short = policy(&["9.9.9.0/24"])?;
    let long = policy(&many.iter().map(String::as_str).collect::<Vec<_>>())?;
    let failed = |error: NetError| Failure::from_error(&error);
    let (mut take, mut change, mut long_change, mut back) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let slot = pool.take().await.map_err(failed)?;
        take.push(ms(began));
        let began = Instant::now();
        slot.set_policy(&short).await.map_err(failed)?;
        change.push(ms(began));
        let began = Instant::now();
        slot.set_policy(&long).await.map_err(failed)?;
        long_change.push(ms(began));
        let began = Instant::now();
        pool.give_back(slot).await;
        back.push(ms(began));
    }
    let phase = |name: &str, values, target| Phase::new(name, Unit::Milliseconds, values, target);
    Ok(vec![
        phase("take a ready slot", take, Some(TARGET_TAKE)),
        phase("change its network policy", change, Some(TARGET_POLICY)),
        phase("  with 500 entries", long_change, Some(TARGET_POLICY)),
        phase("give it back, recycled", back, None),
    ])
}

/// Memory that the kernel has for itself, in KiB: its own allocator's, that of each processor,
/// and what it maps. A slot consists of these; the machine's other memory goes up and down with
/// whatever runs and is cached, a thousand times as much.
fn kernel_kib() -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| Failure::from_error(&e))?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let fields = ["SUnreclaim:", "SReclaimable:", "Percpu:", "VmallocUsed:"];
    let kib: Option<Vec<u64>> = fields.into_iter().map(field).collect();
    kib.map(|kib| kib.iter().sum())
        .ok_or_else(|| Failure::message("/proc/meminfo is not as proc(5) says"))
}

/// The same once the kernel has done what it put off: it frees what namespaces had after it has
/// said that they are gone.
async fn settled() -> Result<u64, Failure> {
    let began = Instant::now();
    let mut last = kernel_kib()?;
    loop {
        tokio::time::sleep(SETTLE).await;
        let now = kernel_kib()?;
        if now.abs_diff(last) <= STILL_KIB || began.elapsed() > SETTLED_WITHIN {
            return Ok(now);
        }
        last = now;
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
