//! Whether the processes of a machine have ended.

use std::fs;
use std::time::{Duration, Instant};

use wrenn_vmm::MachinePids;

/// Whether any of them lives.
pub fn alive(pids: MachinePids) -> bool {
    [pids.keeper, pids.vmm].iter().any(|process| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    })
}

/// Waits until none is left.
pub async fn gone(pids: MachinePids) {
    let began = Instant::now();
    while alive(pids) {
        assert!(began.elapsed() < Duration::from_secs(5), "{pids:?} live on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
