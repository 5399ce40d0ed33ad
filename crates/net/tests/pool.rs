//! The pool on the real kernel: taking, giving back, adopting, sweeping, and leaving nothing.
#![allow(clippy::unwrap_used, clippy::print_stderr)]
mod common;

use std::time::Instant;

use common::{Bed, host_objects};
use wrenn_net::SlotPool;

#[tokio::test]
async fn a_hundred_tenants_leave_nothing() {
    let bed = Bed::new("nta", 1);
    let before = host_objects("nta");
    let pool = SlotPool::start(bed.config()).await.unwrap();
    let mut takes = Vec::new();
    let mut gives = Vec::new();
    for _ in 0..100 {
        let start = Instant::now();
        let slot = pool.take().await.unwrap();
        takes.push(start.elapsed());
        drop(slot.open_tap().await.unwrap());
        let start = Instant::now();
        pool.give_back(slot).await;
        gives.push(start.elapsed());
    }
    takes.sort();
    gives.sort();
    eprintln!("take: median {:?} max {:?}; give_back: median {:?} max {:?}", takes[50], takes[99], gives[50], gives[99]);
    assert_eq!(pool.stats().taken, 0);
    pool.shutdown().await;
    assert_eq!(host_objects("nta"), before);
}
