//! How long a restore takes, with a network card: the figure that a create depends on.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
mod common;
mod tap;

use std::time::{Duration, Instant};

use common::{Template, console_line, folder, vmm};
use wrenn_vmm::Vmm;

#[tokio::test]
async fn restoring_takes_tens_of_milliseconds() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_070, Some(tap::open("tap0"))).await;
    let mut taken = Vec::new();
    for round in 0..12 {
        let dir = folder(parent.path(), &format!("clone{round}"));
        let mut spec = template.clone_spec(&vmm, &dir, 10_071, "fast");
        spec.machine.tap = Some(tap::open("tap0"));
        let began = Instant::now();
        let machine = vmm.restore(spec).await.unwrap();
        let loaded = began.elapsed();
        machine.resume().await.unwrap();
        taken.push((loaded, began.elapsed() - loaded));
        if round == 0 {
            let line = console_line(&machine, "id=fast ").await;
            assert!(line.contains("mac=02:fc:00:00:00:05."), "{line}");
        }
        machine.kill().await.unwrap();
    }
    let loaded: Vec<Duration> = taken.iter().map(|(loaded, _)| *loaded).collect();
    let resumed: Vec<Duration> = taken.iter().map(|(_, resumed)| *resumed).collect();
    println!("loaded: median {:?}, all {loaded:?}", median(&loaded));
    println!("resumed: median {:?}", median(&resumed));
    // Loose, since other work runs beside the tests; `wrenn bench start` has the real figure.
    assert!(median(&loaded) < vmm.info().deadline(Duration::from_millis(500)));
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}
