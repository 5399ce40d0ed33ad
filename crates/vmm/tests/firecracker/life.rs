//! How machines start, are found again, and end.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use wrenn_vmm::{BootSpec, ExitCause, MemoryFile, PageBuffer, RunState, Vmm, VmmError};

use crate::bed::{Bed, SHAPE, View, harness, rounds_of, settled_round};
use crate::gone::{alive, gone};

/// Mounts of this process that are below `dir`.
fn mounts_below(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dir = dir.to_str().unwrap();
    let below = mounts.lines().filter(|line| line.contains(dir));
    below.map(str::to_owned).collect()
}

fn status_field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_once(':').unwrap().1.trim().replace('\t', " ")
}

#[tokio::test]
async fn g38_a_machine_is_locked_in_and_ticks_pauses_and_resumes() {
    let Some(bed) = Bed::new() else { return };
    let (machine, _memory) = bed.boot("machine", 10_201).await;
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    rounds_of(&machine, 5).await;
    let pids = machine.pids();
    // Own user, no capability, no way to gain privileges, own session.
    for process in [pids.vmm, pids.keeper] {
        assert_eq!(status_field(process.pid, "Uid"), ["10201"; 4].join(" "));
        assert_eq!(status_field(process.pid, "Groups"), "");
        for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
            assert_eq!(status_field(process.pid, set), "0000000000000000", "{set}");
        }
        assert_eq!(status_field(process.pid, "NoNewPrivs"), "1");
    }
    let session = status_field(pids.vmm.pid, "NSsid");
    let keeper = pids.keeper.pid.to_string();
    assert_eq!(session.split(' ').next(), Some(keeper.as_str()));
    // The only process that it knows of.
    let numbers = status_field(pids.vmm.pid, "NSpid");
    assert_eq!(numbers, format!("{} 1", pids.vmm.pid));
    // Firecracker filters its own system calls.
    assert_eq!(status_field(pids.vmm.pid, "Seccomp:"), "2");
    // Namespaces of its own, and a root with nothing of the host's.
    for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pids.vmm.pid.to_string()), of("self"), "{namespace}");
        assert_eq!(of(&pids.keeper.pid.to_string()), of("self"), "{namespace}");
    }
    let root = format!("/proc/{}/root", pids.vmm.pid);
    let mut names: Vec<String> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("lib") && name != "usr")
        .collect();
    names.sort();
    assert_eq!(names, ["dev", "disk.img", "fd", "firecracker", "run"]);
    let devices = fs::read_dir(format!("{root}/dev")).unwrap();
    let mut devices: Vec<_> = devices.map(|entry| entry.unwrap().file_name()).collect();
    devices.sort();
    assert_eq!(devices, ["kvm", "urandom"]);
    assert_eq!(
        mounts_below(bed.path()),
        [""; 0],
        "the host sees its mounts"
    );

    machine.stop().await.unwrap();
    assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
    let round = settled_round(&machine).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(settled_round(&machine).await, round, "it runs on");
    View::of(pids).check(round);
    machine.stop().await.unwrap();
    machine.resume().await.unwrap();
    rounds_of(&machine, round + 5).await;

    let used = machine.memory_use().await.unwrap();
    println!(
        "{} KiB private, {} in its keeper",
        used.vmm >> 10,
        used.keeper >> 10
    );
    assert!(used.total() < 20 << 20, "{used:?}");
    let reason = machine.kill().await.unwrap();
    assert_eq!(reason.cause, ExitCause::Signal(9));
    assert_eq!(machine.kill().await.unwrap(), reason, "idempotent");
    gone(pids).await;
    assert!(!machine.console_tail(100).unwrap().is_empty());
}

#[tokio::test]
async fn g6_an_end_is_noticed_at_once_with_its_reason() {
    let Some(bed) = Bed::new() else { return };
    // By the guest.
    let mut machine = bed.spec(&bed.folder("reset"), 10_204);
    machine.boot.kernel = bed.path().join("resetting");
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let machine = bed.vmm.boot(BootSpec { machine, memory }).await.unwrap();
    let mut exited = machine.exited();
    let reason = tokio::time::timeout(Duration::from_secs(5), exited.wait_for(Option::is_some));
    let reason = reason.await.unwrap().unwrap().clone().unwrap();
    println!("{reason}");
    assert_eq!(reason.cause, ExitCause::Status(0));
    // Nothing answers any more, and that is told.
    let error = machine.resume().await.unwrap_err();
    assert!(matches!(error, VmmError::Ended { .. }), "{error:?}");
    assert_eq!(machine.kill().await.unwrap(), reason);

    // By a signal, while it is waited for.
    let (machine, _memory) = bed.boot("killed", 10_205).await;
    rounds_of(&machine, 2).await;
    let mut exited = machine.exited();
    let began = Instant::now();
    let pid = rustix::process::Pid::from_raw(machine.pids().vmm.pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::SEGV).unwrap();
    exited.wait_for(Option::is_some).await.unwrap();
    println!("noticed after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(2));
    let reason = exited.borrow().clone().unwrap();
    println!("{reason}");
    assert_ne!(reason.cause, ExitCause::Status(0));
    gone(machine.pids()).await;
}

#[tokio::test]
async fn a_machine_does_not_outlive_its_keeper() {
    let Some(bed) = Bed::new() else { return };
    let (machine, _memory) = bed.boot("machine", 10_292).await;
    rounds_of(&machine, 2).await;
    let pid = rustix::process::Pid::from_raw(machine.pids().keeper.pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut exited = machine.exited();
    let ended = tokio::time::timeout(Duration::from_secs(5), exited.wait_for(Option::is_some));
    let reason = ended.await.unwrap().unwrap().clone().unwrap();
    assert_eq!(reason.cause, ExitCause::Unseen);
    gone(machine.pids()).await;
}

#[tokio::test]
async fn g2_a_machine_outlives_its_agent_and_is_adopted() {
    let Some(bed) = Bed::new() else { return };
    let dir = bed.folder("machine");
    let mut agent = Command::new(harness())
        .arg("firecracker-agent")
        .args([bed.path(), &dir])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(agent.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "booted\n");
    agent.kill().unwrap();
    agent.wait().unwrap();
    let machine = bed.vmm.adopt(&dir).await.unwrap().unwrap();
    assert!(alive(machine.pids()));
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    let round = rounds_of(&machine, 1).await;
    rounds_of(&machine, round + 3).await;
    machine.kill().await.unwrap();
    gone(machine.pids()).await;
    assert!(bed.vmm.adopt(&dir).await.unwrap().is_none());
}

#[tokio::test]
async fn g2_an_adopted_machine_is_saved_as_if_nothing_had_happened() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_206, 5).await;
    let spec = template.clone_spec(&bed, "clone", 10_207);
    let dir = spec.machine.dir.clone();
    let machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    rounds_of(&machine, template.round + 20).await;
    // Saved once before, so that the monitor's dirty log has forgotten these pages.
    let first = machine.save_delta().await.unwrap().pages.ranges().to_vec();
    drop(machine);
    let machine = bed.vmm.adopt(&dir).await.unwrap().unwrap();
    assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
    machine.resume().await.unwrap();
    rounds_of(&machine, template.round + 30).await;
    let mut saved = machine.save_delta().await.unwrap();
    let frozen = View::of(machine.pids());
    for range in first {
        let covered = |page| {
            let mut ranges = saved.pages.ranges().iter();
            ranges.any(|range| (range.first..range.end()).contains(&page))
        };
        assert!((range.first..range.end()).all(covered));
    }
    // Unchanged pages are read from the template, which it still holds.
    let mut all = vec![0; SHAPE.memory.bytes() as usize];
    saved.pages.read(0, &mut all).unwrap();
    assert_eq!(frozen.differing(&View(all)).len(), 0);
    PageBuffer::collect(&mut saved.pages).unwrap();
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn machines_of_one_driver_are_not_adopted_by_the_other() {
    let Some(bed) = Bed::new() else { return };
    let (machine, _memory) = bed.boot("machine", 10_208).await;
    let dir = bed.path().join("machine");
    let record = fs::read_to_string(dir.join("machine.json")).unwrap();
    assert!(record.contains(r#""monitor":"firecracker""#), "{record}");
    let qemu = record.replace("firecracker", "qemu");
    fs::write(dir.join("machine.json"), qemu).unwrap();
    let error = bed.vmm.adopt(&dir).await.err().unwrap();
    assert!(
        error.to_string().contains("QEMU runs the machine"),
        "{error}"
    );
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_leaves_no_process_and_says_why() {
    let Some(bed) = Bed::new() else { return };
    let boot = |machine| {
        let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
        bed.vmm.boot(BootSpec { machine, memory })
    };
    let mut spec = bed.spec(&bed.folder("bzimage"), 10_209);
    let bzimage = bed.path().join("bzimage.kernel");
    fs::write(&bzimage, [0; 8192]).unwrap();
    spec.boot.kernel = bzimage;
    let error = boot(spec).await.err().unwrap();
    assert!(error.to_string().contains("vmlinux"), "{error}");

    let mut spec = bed.spec(&bed.folder("elf"), 10_209);
    let elf = bed.path().join("elf.kernel");
    fs::write(&elf, b"\x7fELF, but no more").unwrap();
    spec.boot.kernel = elf;
    let dir = spec.dir.clone();
    let error = boot(spec).await.err().unwrap();
    println!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(matches!(error, VmmError::Api { .. }), "{error:?}");
    assert!(bed.vmm.adopt(&dir).await.unwrap().is_none(), "it lives on");

    let spec = bed.spec(&bed.folder("disk"), 10_209);
    fs::remove_file(&spec.disk.top).unwrap();
    let error = boot(spec).await.err().unwrap();
    assert!(error.to_string().ends_with("disk.raw"), "{error}");
}

#[tokio::test]
async fn a_program_that_is_not_the_one_configured_is_refused() {
    let Some(bed) = Bed::with(|config| config.version = "1.15.1-other".into()) else {
        return;
    };
    let machine = bed.spec(&bed.folder("machine"), 10_209);
    let dir = machine.dir.clone();
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let error = bed
        .vmm
        .boot(BootSpec { machine, memory })
        .await
        .err()
        .unwrap();
    assert!(
        matches!(error, VmmError::UnusableMonitor { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("restart the agent"), "{error}");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(bed.vmm.adopt(&dir).await.unwrap().is_none(), "it lives on");

    // One that does not run at all, in words of the jail.
    let Some(bed) = Bed::with(|config| config.program = "/nonexistent/firecracker".into()) else {
        return;
    };
    let machine = bed.spec(&bed.folder("machine"), 10_209);
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let error = bed
        .vmm
        .boot(BootSpec { machine, memory })
        .await
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("/nonexistent/firecracker"),
        "{error}"
    );
}

#[tokio::test]
async fn a_restore_that_is_given_up_leaves_no_process() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_290, 2).await;
    let processes = || {
        let entries = fs::read_dir("/proc").unwrap();
        let status = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("status")).ok();
        entries
            .filter_map(|entry| status(entry.unwrap()))
            .filter(|status| status.contains("Uid:\t10291\t") && !status.contains("State:\tZ"))
            .count()
    };
    for millis in [1, 4, 8, 12, 16, 20, 25, 30, 40] {
        let spec = template.clone_spec(&bed, &format!("given-up{millis}"), 10_291);
        let limit = Duration::from_millis(millis);
        if let Ok(machine) = tokio::time::timeout(limit, bed.vmm.restore(spec)).await {
            machine.unwrap().kill().await.unwrap();
        }
        let began = Instant::now();
        while processes() > 0 || began.elapsed() < Duration::from_millis(200) {
            assert!(began.elapsed() < Duration::from_secs(5), "{millis} ms");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
