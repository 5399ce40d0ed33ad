//! What network slots cost, as a table of medians: taking one, changing its policy, giving it
//! back, making one, and the memory of a thousand. Needs root; `cargo bench --bench slots`.
//! `WRENN_BENCH_SLOTS` is how many are made, 200 if not set.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::time::{Duration, Instant};

use wrenn_net::{NetConfig, NetworkPolicy, SlotPool};

/// Of what is quick.
const ROUNDS: usize = 100;

fn used_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let field = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    field("MemTotal:") - field("MemAvailable:")
}

fn row(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{what:<34} {:>10.3} ms {:>10.3} ms {:>6}",
        median.as_secs_f64() * 1e3,
        worst.as_secs_f64() * 1e3,
        times.len()
    );
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let slots: usize = std::env::var("WRENN_BENCH_SLOTS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(200);
    let folder = tempfile::tempdir().unwrap();
    let mut config = NetConfig::new(folder.path());
    config.name_prefix = "nbench".to_owned();
    config.subnet = "10.248.0.0/16".parse().unwrap();
    (config.ready, config.max_slots) = (1, slots + 8);
    let small = SlotPool::start(config.clone()).await.unwrap();
    println!("{:<34} {:>13} {:>13} {:>6}", "", "median", "worst", "times");

    let (mut take, mut change, mut names, mut list, mut back) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut timed = Instant::now();
        let mut lap = |times: &mut Vec<Duration>| {
            times.push(timed.elapsed());
            timed = Instant::now();
        };
        let slot = small.take().await.unwrap();
        lap(&mut take);
        let deny = NetworkPolicy::read(true, &["1.1.1.1"], &["9.9.9.0/24"]).unwrap();
        slot.set_policy(&deny).await.unwrap();
        lap(&mut change);
        let many: Vec<String> = (0..500)
            .map(|n| format!("9.{}.{}.7", n / 250, n % 250))
            .collect();
        let many = NetworkPolicy::read(true, &["pypi.org"], &many).unwrap();
        slot.set_policy(&many).await.unwrap();
        lap(&mut names);
        slot.denials().await.unwrap();
        lap(&mut list);
        small.give_back(slot).await;
        lap(&mut back);
    }
    row("take a ready slot", take);
    row("change its policy", change);
    row("the same, 500 entries", names);
    row("list its denials", list);
    row("give it back, recycled", back);
    small.shutdown().await;

    config.ready = slots;
    let before = used_kib();
    let start = Instant::now();
    let pool = SlotPool::start(config).await.unwrap();
    while pool.stats().ready < slots {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let each = start.elapsed() / u32::try_from(slots).unwrap();
    println!(
        "{:<34} {:>10.3} ms (mean of {slots})",
        "make a slot",
        each.as_secs_f64() * 1e3
    );
    let kib = used_kib().saturating_sub(before);
    println!(
        "{:<34} {:>10} KiB, {} MiB for 1,000",
        "memory of a ready slot",
        kib / slots as u64,
        kib * 1000 / slots as u64 / 1024
    );
    pool.shutdown().await;
}
