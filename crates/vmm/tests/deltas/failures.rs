//! What cannot be saved or restored is told, and leaves nothing.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wrenn_vmm::{
    Delta, DeltaError, DeltaPages, LoadSpec, PageBuffer, PageRange, Run, Vmm, VmmError, state_file,
};

use crate::common::{self, SHAPE, Template, console_line, folder, qcow2, tick, vmm};
use crate::saved::Saved;
use crate::view::Qmp;

/// First page and bytes of each; without bytes, one page of zeros.
type Runs = Vec<(u64, Option<Vec<u8>>)>;

/// A stream that hands out what it is given, and then fails.
struct Script {
    runs: Runs,
    next: usize,
    end: Option<DeltaError>,
}

impl DeltaPages for Script {
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
        let run = self.runs.get(self.next);
        self.next += 1;
        match (run, self.end.take_if(|_| run.is_none())) {
            (Some((first, Some(bytes))), _) => Ok(Some(Run::Data {
                first: *first,
                bytes,
            })),
            (Some((first, None)), _) => Ok(Some(Run::Zero(PageRange {
                first: *first,
                count: 1,
            }))),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }
}

#[tokio::test]
async fn what_cannot_be_saved_or_restored_is_named_and_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_130, None).await;
    let dir = folder(parent.path(), "clone");
    let spec = template.clone_spec(&vmm, &dir, 10_131, "clone");
    let machine = vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    let first = tick(&console_line(&machine, "id=clone ").await);
    let layers = vec![template.layer.clone(), dir.join("disk.qcow2")];
    let saved = Saved::of(&machine, layers).await;

    // Pages are only read while it is stopped.
    let mut again = machine.save_delta().await.unwrap();
    assert!(again.pages.next_run().unwrap().is_some());
    machine.resume().await.unwrap();
    let torn = loop {
        match again.pages.next_run() {
            Ok(Some(_)) => {}
            other => break other.map(|_| ()),
        }
    };
    assert!(matches!(torn, Err(DeltaError::Resumed)), "{torn:?}");
    console_line(&machine, &format!("TICK {} ", first + 3)).await;
    // And not after its end.
    let mut last = machine.save_delta().await.unwrap();
    machine.kill().await.unwrap();
    let error = PageBuffer::collect(&mut last.pages).unwrap_err();
    assert!(matches!(error, DeltaError::Ended { .. }), "{error:?}");
    let error = machine.save_delta().await.unwrap_err();
    assert!(matches!(error, VmmError::Ended { .. }), "{error:?}");

    // Damaged deltas.
    let pages = SHAPE.memory.bytes() / 4096;
    let data = |first, bytes| (first, Some(vec![1; bytes]));
    let cases: [(&str, Runs, Option<DeltaError>); 5] = [
        ("outside", vec![data(7, 4096), (pages, None)], None),
        ("outside", vec![data(pages - 1, 8192)], None),
        ("must ascend", vec![data(9, 4096), (8, None)], None),
        ("whole pages", vec![data(9, 4097)], None),
        (
            "cannot be had",
            vec![data(9, 4096)],
            Some(DeltaError::Source("the disk is gone".into())),
        ),
    ];
    for (index, (words, runs, end)) in cases.into_iter().enumerate() {
        let delta = Delta {
            firmware: saved.firmware.clone(),
            pages: Box::new(Script { runs, next: 0, end }),
        };
        let dir = folder(parent.path(), &format!("damaged{index}"));
        let error = saved
            .restore(&template, &vmm, &dir, 10_132, "x", delta)
            .await
            .err()
            .unwrap();
        assert!(matches!(error, VmmError::Delta { .. }), "{error:?}");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(words), "{cause}");
    }
    // A state that is cut.
    for cut in [0, 40, saved.state.len() / 2, saved.state.len() - 1] {
        let dir = folder(parent.path(), &format!("cut{cut}"));
        let mut spec = template.clone_spec(&vmm, &dir, 10_132, "x");
        spec.machine.disk.layers = qcow2(&saved.layers);
        spec.state = state_file(&saved.state[..cut]).unwrap();
        let error = vmm.restore_delta(spec, saved.delta()).await.err();
        assert!(
            matches!(error, Some(VmmError::State { .. } | VmmError::Ended { .. })),
            "cut at {cut}: {error:?}"
        );
    }
    // A monitor that stood by, for a layer that is not there, and one that has become a machine.
    let gone = Saved {
        layers: vec![template.layer.clone(), "/nonexistent".into()],
        pages: saved.pages.clone(),
        state: saved.state.clone(),
        firmware: saved.firmware.clone(),
        ranges: saved.ranges.clone(),
    };
    let dir = folder(parent.path(), "gone");
    let error = gone
        .restore_standby(&template, &vmm, &dir, 10_132, "x")
        .await;
    assert!(matches!(error.err(), Some(VmmError::File { .. })));
    let dir = folder(parent.path(), "twice");
    let once = saved
        .restore_standby(&template, &vmm, &dir, 10_132, "twice")
        .await;
    let once = once.unwrap();
    let again = LoadSpec {
        layers: Vec::new(),
        memory: template.memory.clone(),
        state: state_file(&saved.state).unwrap(),
        delta: None,
    };
    let error = once.load(again).await.unwrap_err();
    assert!(matches!(error, VmmError::Qmp { .. }), "{error:?}");
    once.resume().await.unwrap();
    console_line(&once, "id=twice ").await;
    once.kill().await.unwrap();
    // A machine that is killed while its memory is written.
    let dir = folder(parent.path(), "killed");
    let killer = Killer {
        dir: dir.clone(),
        inner: saved.pages.stream(),
    };
    let delta = Delta {
        firmware: saved.firmware.clone(),
        pages: Box::new(killer),
    };
    let error = saved
        .restore(&template, &vmm, &dir, 10_132, "x", delta)
        .await
        .err()
        .unwrap();
    assert!(matches!(error, VmmError::Ended { .. }), "{error:?}");
    // The same state and delta, whole, still restore.
    let dir = folder(parent.path(), "whole");
    let whole = saved
        .restore(&template, &vmm, &dir, 10_132, "whole", saved.delta())
        .await
        .unwrap();
    whole.resume().await.unwrap();
    console_line(&whole, "id=whole ").await;
    whole.kill().await.unwrap();
    let left = fs::read_dir("/proc").unwrap().filter(|entry| {
        let status = fs::read_to_string(entry.as_ref().unwrap().path().join("status"));
        status
            .is_ok_and(|status| status.contains("Uid:\t10132\t") && !status.contains("Z (zombie)"))
    });
    assert_eq!(left.count(), 0);
}

/// Kills the machine in `dir` before the first page.
struct Killer {
    dir: PathBuf,
    inner: Box<dyn DeltaPages>,
}

impl DeltaPages for Killer {
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
        let record = fs::read_to_string(self.dir.join("machine.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        let pid = record["pids"]["vmm"]["pid"].as_i64().unwrap();
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        // It is dead already at the second call.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        std::thread::sleep(Duration::from_millis(100));
        self.inner.next_run()
    }
}

#[tokio::test]
async fn a_machine_without_a_template_has_no_changes() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let dir = folder(parent.path(), "machine");
    let memory = Arc::new(wrenn_vmm::MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let machine = common::spec(&vmm, &dir, 10_140, "booted", Vec::new());
    let machine = vmm
        .boot(wrenn_vmm::BootSpec { machine, memory })
        .await
        .unwrap();
    console_line(&machine, "TICK 2 ").await;
    let error = machine.save_delta().await.unwrap_err();
    assert!(
        matches!(
            error,
            VmmError::Delta {
                source: DeltaError::NoTemplate { .. },
                ..
            }
        ),
        "{error:?}"
    );
    // It can go on all the same.
    machine.resume().await.unwrap();
    let line = tick(&console_line(&machine, "TICK").await);
    console_line(&machine, &format!("TICK {} ", line + 2)).await;

    // All RAM that QEMU has beside the memory is firmware, or data it offers by fw_cfg: if
    // a later version adds a block, a delta would lack it.
    drop(machine);
    let asked = dir.clone();
    let asking = tokio::task::spawn_blocking(move || {
        Qmp::connect(&asked).ask(&serde_json::json!({
            "execute": "human-monitor-command",
            "arguments": { "command-line": "info ramblock" },
        }))
    });
    let blocks = asking.await.unwrap();
    let blocks: Vec<&str> = blocks.as_str().unwrap().lines().skip(1).collect();
    for line in &blocks {
        let name = line.split_whitespace().next().unwrap();
        assert!(
            name == "mem" || name == "pc.bios" || name.starts_with("/rom@etc/"),
            "{blocks:#?}"
        );
    }
    let machine = vmm.adopt(&dir).await.unwrap().unwrap();
    machine.kill().await.unwrap();
}
