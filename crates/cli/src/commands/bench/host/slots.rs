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
    let before = used_kib()?;
    let began = Instant::now();
    let pool = SlotPool::start(config).await.map_err(failed)?;
    while pool.stats().ready < slots {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let each = ms(began) / slots as f64;
    let used = used_kib();
    pool.shutdown().await;
    let each_bytes = used?.saturating_sub(before) as f64 * 1024.0 / slots as f64;
    phases.extend([
        Phase::new("make a slot", Unit::Milliseconds, vec![each], None),
        Phase::new(
            "memory of 1,000 slots",
            Unit::Bytes,
            vec![each_bytes * 1000.0],
            None,
        ),
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

/// Memory of this machine that is in use.
fn used_kib() -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|e| Failure::from_error(&e))?;
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    match (field("MemTotal:"), field("MemAvailable:")) {
        (Some(all), Some(available)) => Ok(all.saturating_sub(available)),
        _ => Err(Failure::message("/proc/meminfo is not as proc(5) says")),
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
