//! What saving, forking and restoring a clone costs: figures to be read, and loose limits.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Template, console_line, folder, qcow2, vmm};
use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{Delta, DeltaPages, Machine, PageBuffer, Run, Vmm, create_overlay, state_file};

const SHAPE: Shape = Shape {
    vcpus: Vcpus(1),
    memory: MemoryMib(512),
};

/// Reads all pages as a writer would, without keeping them.
fn read_all(pages: &mut dyn DeltaPages) -> (u64, u64) {
    let (mut data, mut zero) = (0, 0);
    while let Some(run) = pages.next_run().unwrap() {
        match run {
            Run::Data { bytes, .. } => data += bytes.len() as u64 / 4096,
            Run::Zero(range) => zero += range.count,
        }
    }
    (data, zero)
}

#[tokio::test]
async fn saving_and_restoring_cost_what_was_written() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::shaped(&vmm, parent.path(), 10_150, None, SHAPE, "").await;
    for (name, id) in [("idle", "idle"), ("filled", "fill=100")] {
        let dir = folder(parent.path(), name);
        let spec = template.clone_spec(&vmm, &dir, 10_151, id);
        let machine = vmm.restore(spec).await.unwrap();
        machine.resume().await.unwrap();
        console_line(&machine, &format!("id={id} ")).await;
        // Five rounds, of which the best shows the cost and the others the neighbours.
        let mut best: Option<(Duration, Duration, Duration, Duration)> = None;
        let mut kept = None;
        for round in 0..5 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let next = dir.join(format!("layer{round}.qcow2"));
            create_overlay(&next, common::DISK_BYTES).unwrap();
            let began = Instant::now();
            let mut saved = machine.save_delta().await.unwrap();
            let stopped = began.elapsed();
            let switching = Instant::now();
            machine.switch_disk_layer(&next).await.unwrap();
            let switched = switching.elapsed();
            let reading = Instant::now();
            let (pages, read, counts) = tokio::task::spawn_blocking(move || {
                let counts = read_all(&mut saved.pages);
                (saved, reading.elapsed(), counts)
            })
            .await
            .unwrap();
            saved = pages;
            let frozen = began.elapsed();
            println!(
                "{name} {round}: {:?}, disk {switched:?}, {} + {} pages read in {read:?}, frozen {frozen:?}",
                saved.times, counts.0, counts.1
            );
            if best.is_none_or(|(least, ..)| frozen < least) {
                best = Some((frozen, stopped, switched, read));
            }
            if round == 4 {
                saved.pages.rewind();
                let buffer = PageBuffer::collect(&mut saved.pages).unwrap();
                kept = Some((saved.state, saved.firmware, Arc::new(buffer)));
            }
            machine.resume().await.unwrap();
        }
        let (frozen, stopped, switched, read) = best.unwrap();
        let (state, firmware, buffer) = kept.unwrap();
        let mib = buffer.data_bytes() >> 20;
        println!(
            "{name}: best frozen {frozen:?} (saved {stopped:?}, disk {switched:?}, read {read:?}) for {mib} MiB"
        );
        let aim = Duration::from_millis(40) + Duration::from_micros(700) * mib as u32;
        println!("{name}: the aim is {aim:?}");
        // Loose, since other work runs beside the tests.
        assert!(frozen < vmm.info().deadline(aim * 6));
        let mut taken = Vec::new();
        for round in 0..5 {
            let dir = folder(parent.path(), &format!("{name}{round}"));
            let mut spec = template.clone_spec(&vmm, &dir, 10_152, "restored");
            spec.machine.disk.layers = qcow2(&[
                template.layer.clone(),
                parent.path().join(name).join("disk.qcow2"),
            ]);
            spec.state = state_file(&state).unwrap();
            let delta = Delta {
                firmware: firmware.clone(),
                pages: buffer.stream(),
            };
            let began = Instant::now();
            let child: Arc<dyn Machine> = vmm.restore_delta(spec, delta).await.unwrap();
            child.resume().await.unwrap();
            taken.push(began.elapsed());
            child.kill().await.unwrap();
        }
        taken.sort();
        println!("{name}: restored and running, sorted: {taken:?}");
        machine.kill().await.unwrap();
    }
}
