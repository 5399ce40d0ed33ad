//! Real machines: boot, freeze, clone, adopt, end. Needs root and Debian's packages
//! qemu-system-x86, busybox-static and e2fsprogs.

#![allow(clippy::unwrap_used)]

mod common;
mod gone;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    SHAPE, Template, assets, cmdline, console_line, folder, harness, identity, spec, tick, vmm,
};
use gone::{alive, gone};
use wrenn_vmm::{
    BootSpec, Delta, DeltaError, DeltaPages, DiskLimits, ExitCause, Machine, MemoryFile,
    RestoreSpec, Run, RunState, SealedMemory, Vmm, VmmError, state_file,
};

fn status_field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_once(':').unwrap().1.trim().replace('\t', " ")
}

#[tokio::test]
async fn g43_clones_run_side_by_side_and_leave_their_template_untouched() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_010, None).await;
    let before = template.memory.digest().unwrap();
    let layer_before = fs::read(&template.layer).unwrap();
    println!("template holds {} MiB", before.data_bytes >> 20);

    let mut clones: Vec<Arc<dyn Machine>> = Vec::new();
    for index in 0..3 {
        let dir = folder(parent.path(), &format!("clone{index}"));
        let spec = template.clone_spec(&vmm, &dir, 10_011 + index, &format!("clone{index}"));
        let began = Instant::now();
        let machine = vmm.restore(spec).await.unwrap();
        let loaded = began.elapsed();
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        machine.resume().await.unwrap();
        println!(
            "clone {index}: loaded {loaded:?}, running {:?}",
            began.elapsed()
        );
        assert_eq!(*machine.run_state().borrow(), RunState::Running);
        clones.push(machine);
    }
    for (index, machine) in clones.iter().enumerate() {
        // It went on counting where the template stopped, reads its own identity, and its
        // disk holds what the template wrote and its own line, but no other clone's.
        let line = console_line(machine, "TICK").await;
        let first = tick(&line);
        assert!(
            first > template.tick && first < template.tick + 60,
            "{line}"
        );
        let line = console_line(machine, &format!("id=clone{index} ")).await;
        assert!(
            line.contains(&format!("disk=made,template,clone{index},")),
            "{line}"
        );
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for (index, machine) in clones.iter().enumerate() {
        let used = machine.memory_use().await.unwrap();
        println!(
            "clone {index}: {} KiB private in QEMU, {} KiB in its keeper",
            used.vmm >> 10,
            used.keeper >> 10
        );
        assert!(used.total() < 50 << 20, "{used:?}");
        // Own user, no capability, filtered system calls, no way to gain privileges.
        let uid = (10_011 + index).to_string();
        for process in [machine.pids().vmm, machine.pids().keeper] {
            assert_eq!(
                status_field(process.pid, "Uid"),
                [uid.as_str(); 4].join(" ")
            );
            assert_eq!(status_field(process.pid, "Groups"), "");
            for set in ["CapEff", "CapPrm", "CapBnd", "CapAmb"] {
                assert_eq!(status_field(process.pid, set), "0000000000000000", "{set}");
            }
            assert_eq!(status_field(process.pid, "NoNewPrivs"), "1");
        }
        assert_eq!(status_field(machine.pids().vmm.pid, "Seccomp:"), "2");
    }
    for machine in &clones {
        let reason = machine.kill().await.unwrap();
        assert_eq!(reason.cause, ExitCause::Signal(9));
        assert_eq!(machine.kill().await.unwrap(), reason, "idempotent");
        gone(machine.pids()).await;
        assert!(!machine.console_tail(100).unwrap().is_empty());
    }
    assert_eq!(template.memory.digest().unwrap(), before);
    assert!(fs::read(&template.layer).unwrap() == layer_before);
}

#[tokio::test]
async fn a_boot_over_a_templates_memory_is_a_machine_like_its_clones() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_025, None).await;
    let before = template.memory.digest().unwrap();
    let dir = folder(parent.path(), "booted");
    let layers = vec![template.layer.clone()];
    let machine = spec(&vmm, &dir, 10_026, "booted", layers.clone());
    let machine = vmm
        .boot_private(machine, template.memory.clone())
        .await
        .unwrap();
    assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
    machine.resume().await.unwrap();
    // It counts from the beginning, on the template's disk.
    let line = console_line(&machine, "TICK 2 ").await;
    assert!(line.contains("disk=made,template,booted,"), "{line}");

    // What differs from the template's memory is all that another needs to go on there.
    let saved = machine.save_delta().await.unwrap();
    let at = tick(&console_line(&machine, "TICK").await);
    let mut pages = Vec::new();
    let mut taken = saved.pages;
    while let Some(run) = taken.next_run().unwrap() {
        match run {
            Run::Zero(range) => pages.push((range.first, vec![0; range.count as usize * 4096])),
            Run::Data { first, bytes } => pages.push((first, bytes.to_vec())),
        }
    }
    let top = folder(parent.path(), "top").join("disk.qcow2");
    machine.switch_disk_layer(&top).await.unwrap();
    machine.kill().await.unwrap();
    let next = folder(parent.path(), "next");
    let layers = layers.into_iter().chain([dir.join("disk.qcow2")]).collect();
    let mut machine = spec(&vmm, &next, 10_027, "next", layers);
    machine.boot.kernel = "/nonexistent".into();
    let spec = RestoreSpec {
        machine,
        memory: template.memory.clone(),
        state: state_file(&saved.state).unwrap(),
    };
    let delta = Delta {
        firmware: saved.firmware,
        pages: Box::new(Pages(pages.into_iter(), Vec::new())),
    };
    let machine = vmm.restore_delta(spec, delta).await.unwrap();
    machine.resume().await.unwrap();
    let line = console_line(&machine, "id=next ").await;
    assert!(line.contains("disk=made,template,booted,next,"), "{line}");
    assert!((at + 1..at + 60).contains(&tick(&line)), "{at}: {line}");
    machine.kill().await.unwrap();
    assert_eq!(template.memory.digest().unwrap(), before);
}

/// Pages that were read before.
struct Pages(std::vec::IntoIter<(u64, Vec<u8>)>, Vec<u8>);

impl DeltaPages for Pages {
    fn next_run(&mut self) -> Result<Option<Run<'_>>, DeltaError> {
        let Some((first, bytes)) = self.0.next() else {
            return Ok(None);
        };
        self.1 = bytes;
        Ok(Some(Run::Data {
            first,
            bytes: &self.1,
        }))
    }
}

/// A small file system of its own, for as long as it is held.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: std::path::PathBuf) -> SmallDisk {
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m,mode=0755", "small"])
            .arg(&at)
            .status();
        assert!(mounted.unwrap().success());
        SmallDisk(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: what a failed test leaves running may still hold a file in it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_host_is_an_error_in_the_guest_and_no_frozen_machine() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let small = SmallDisk::mount(parent.path().join("small"));
    let dir = folder(&small.0, "machine");
    let machine = spec(&vmm, &dir, 10_028, "eat", Vec::new());
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let machine = vmm.boot(BootSpec { machine, memory }).await.unwrap();
    let line = console_line(&machine, "ATE ").await;
    assert!(!line.contains("ATE 0."), "16 MiB fit into 4: {line}");
    console_line(&machine, "TICK 5 ").await;
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn what_a_guest_does_with_its_disk_is_limited_by_its_monitor() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_026, None).await;
    let limited = DiskLimits {
        bytes_per_sec: Some(8_000_000),
        operations_per_sec: None,
    };
    for (name, disk_limits) in [("free", DiskLimits::default()), ("limited", limited)] {
        let dir = folder(parent.path(), name);
        let mut spec = template.clone_spec(&vmm, &dir, 10_027, "eat");
        spec.machine.disk_limits = disk_limits;
        let machine = vmm.restore(spec).await.unwrap();
        let began = Instant::now();
        machine.resume().await.unwrap();
        // It writes 16 MiB.
        let line = console_line(&machine, "ATE ").await;
        let took = began.elapsed();
        println!("{name}: {took:?}");
        assert!(line.contains("ATE 0."), "{line}");
        assert!(
            disk_limits.is_none() || took > Duration::from_millis(1800),
            "{took:?}"
        );
        machine.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_template_survives_its_way_through_a_file() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_020, None).await;
    let path = parent.path().join("memory");
    let began = Instant::now();
    let saved = template.memory.save_sparse(&path).unwrap();
    println!(
        "saved {} MiB in {:?}",
        saved.data_bytes >> 20,
        began.elapsed()
    );
    let began = Instant::now();
    let loaded = SealedMemory::load(&path, saved.digest).unwrap();
    println!("loaded in {:?}", began.elapsed());
    let template = Template {
        memory: Arc::new(loaded),
        ..template
    };
    let dir = folder(parent.path(), "clone");
    let spec = template.clone_spec(&vmm, &dir, 10_021, "again");
    let machine = vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    console_line(&machine, "id=again ").await;
    machine.kill().await.unwrap();

    // A state that is cut is refused with QEMU's words, and nothing stays behind.
    let state = fs::read(&template.state).unwrap();
    fs::write(&template.state, &state[..state.len() / 2]).unwrap();
    let spec = template.clone_spec(&vmm, &folder(parent.path(), "cut"), 10_022, "cut");
    let error = vmm.restore(spec).await.err().unwrap();
    assert!(matches!(error, VmmError::State { .. }), "{error:?}");
    println!("{error}");
    assert!(!error.to_string().contains("without a word"), "{error}");
    let spec = template.clone_spec(&vmm, &folder(parent.path(), "small"), 10_022, "small");
    let small = MemoryFile::create(4096).unwrap().seal().unwrap();
    let spec = wrenn_vmm::RestoreSpec {
        memory: Arc::new(small),
        ..spec
    };
    let error = vmm.restore(spec).await.err().unwrap();
    assert!(matches!(error, VmmError::Spec(_)), "{error:?}");
}

#[tokio::test]
async fn g2_a_machine_outlives_its_handle_and_is_adopted() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    assert!(vmm.adopt(parent.path()).await.unwrap().is_none());
    let template = Template::make(&vmm, parent.path(), 10_030, None).await;
    let dir = folder(parent.path(), "clone");
    let mut spec = template.clone_spec(&vmm, &dir, 10_031, "kept");
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    spec.machine.companions.push(theirs.into());
    let machine = vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    let first = tick(&console_line(&machine, "id=kept ").await);
    let pids = machine.pids();
    drop(machine);

    let machine = vmm.adopt(&dir).await.unwrap().unwrap();
    assert_eq!(machine.pids(), pids);
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    console_line(&machine, &format!("TICK {} ", first + 3)).await;
    machine.stop().await.unwrap();
    let stopped = console_line(&machine, "TICK").await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(console_line(&machine, "TICK").await, stopped);
    machine.resume().await.unwrap();

    // The keeper's companion answers throughout.
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    ours.send(b"question").unwrap();
    let mut answer = [0; 64];
    let count = ours.recv(&mut answer).unwrap();
    assert_eq!(&answer[..count], b"kept: question");

    // Killed from outside: noticed at once, and nothing of it is left.
    let mut exited = machine.exited();
    assert!(exited.borrow().is_none());
    let began = Instant::now();
    let pid = rustix::process::Pid::from_raw(pids.vmm.pid as i32).unwrap();
    // The first process of a process namespace gets no other signal from outside.
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let reason = exited.wait_for(Option::is_some).await.unwrap().clone();
    println!(
        "noticed after {:?}: {}",
        began.elapsed(),
        reason.clone().unwrap()
    );
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(reason.unwrap().cause, ExitCause::Signal(9));
    gone(pids).await;
    assert!(vmm.adopt(&dir).await.unwrap().is_none());
    let error = machine.resume().await.unwrap_err();
    assert!(matches!(error, VmmError::Ended { .. }), "{error:?}");
}

#[tokio::test]
async fn a_machine_does_not_outlive_its_keeper() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let machine = boot(&vmm, parent.path(), 10_040).await.unwrap();
    let keeper = machine.pids().keeper.pid as i32;
    let keeper = rustix::process::Pid::from_raw(keeper).unwrap();
    let stalled = machine.stalled(Duration::from_secs(1));
    assert!(matches!(stalled, VmmError::BootStalled { .. }));
    rustix::process::kill_process(keeper, rustix::process::Signal::KILL).unwrap();
    let mut exited = machine.exited();
    let ended = tokio::time::timeout(Duration::from_secs(5), exited.wait_for(Option::is_some));
    let reason = ended.await.unwrap().unwrap().clone().unwrap();
    assert_eq!(reason.cause, ExitCause::Unseen);
    gone(machine.pids()).await;
}

#[tokio::test]
async fn g2_the_death_of_the_agent_ends_no_machine() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let dir = folder(parent.path(), "machine");
    let mut agent = Command::new(harness())
        .arg("agent")
        .arg(&dir)
        .arg(&assets().kernel)
        .arg(&assets().initramfs)
        .arg(cmdline(&vmm))
        .arg(&assets().disk)
        .arg(dir.join("disk.qcow2"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(agent.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "booted\n");
    agent.kill().unwrap();
    agent.wait().unwrap();
    let machine = vmm.adopt(&dir).await.unwrap().unwrap();
    let pids = machine.pids();
    assert!(alive(pids));
    console_line(&machine, "TICK 3 ").await;
    // In a session of its own, away from the agent's terminal.
    let session = fs::read_to_string(format!("/proc/{}/stat", pids.vmm.pid)).unwrap();
    let session = session
        .rsplit_once(") ")
        .unwrap()
        .1
        .split(' ')
        .nth(3)
        .unwrap()
        .to_owned();
    assert_eq!(session, pids.keeper.pid.to_string());
    machine.kill().await.unwrap();
    gone(pids).await;
}

#[tokio::test]
async fn a_machine_that_could_not_be_recorded_does_not_live() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let dir = parent.path().join("machine");
    // A folder where the record's temporary file should be.
    let blocked = dir.join("machine.json.new");
    let booting = async {
        let dir = folder(parent.path(), "machine");
        fs::create_dir(&blocked).unwrap();
        let memory = MemoryFile::create(SHAPE.memory.bytes()).unwrap();
        let memory = Arc::new(memory);
        let machine = spec(&vmm, &dir, 10_050, "x", Vec::new());
        let spec = BootSpec {
            machine,
            memory: memory.clone(),
        };
        (vmm.boot(spec).await.err().unwrap(), memory)
    };
    let (error, memory) = booting.await;
    assert!(matches!(error, VmmError::File { .. }), "{error:?}");
    // Its memory can be sealed only once no process has it mapped.
    tokio::time::sleep(Duration::from_millis(200)).await;
    memory.seal().unwrap();
    assert!(
        fs::read_to_string(dir.join("exit.json"))
            .unwrap()
            .contains("signal")
    );
}

/// Processes of this user.
fn processes_of(uid: u32) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path().join("status")).ok())
        .filter(|status| status.contains(&format!("Uid:\t{uid}\t")))
        .filter(|status| !status.contains("State:\tZ"))
        .collect()
}

#[tokio::test]
async fn a_restore_that_is_given_up_leaves_no_process() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::make(&vmm, parent.path(), 10_080, None).await;
    for millis in [1, 4, 8, 12, 16, 20, 25, 30, 35, 40, 50] {
        let dir = folder(parent.path(), &format!("given-up{millis}"));
        let spec = template.clone_spec(&vmm, &dir, 10_081, "x");
        let given = tokio::time::timeout(Duration::from_millis(millis), vmm.restore(spec)).await;
        if let Ok(machine) = given {
            machine.unwrap().kill().await.unwrap();
        }
        let began = Instant::now();
        loop {
            let left = processes_of(10_081);
            if left.is_empty() && began.elapsed() > Duration::from_millis(300) {
                break;
            }
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "{millis} ms: {left:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn errors_name_what_failed() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let dir = folder(parent.path(), "machine");
    fs::write(dir.join("disk.qcow2"), b"not a disk").unwrap();
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes()).unwrap());
    let machine = spec(&vmm, &dir, 10_060, "x", Vec::new());
    let error = vmm
        .boot(BootSpec {
            machine,
            memory: memory.clone(),
        })
        .await
        .err()
        .unwrap();
    println!("{error}");
    assert!(error.to_string().contains("qcow2"), "{error}");

    fs::remove_file(dir.join("disk.qcow2")).unwrap();
    let machine = spec(&vmm, &dir, 10_060, "x", Vec::new());
    let error = vmm.boot(BootSpec { machine, memory }).await.err().unwrap();
    assert!(matches!(&error, VmmError::File { path, .. } if path.ends_with("disk.qcow2")));
}

async fn boot(
    vmm: &wrenn_vmm::QemuVmm,
    parent: &Path,
    uid: u32,
) -> Result<Arc<dyn Machine>, VmmError> {
    let dir = folder(parent, "machine");
    let memory = Arc::new(MemoryFile::create(SHAPE.memory.bytes())?);
    let mut machine = spec(vmm, &dir, uid, "", Vec::new());
    machine.identity = identity("booted");
    vmm.boot(BootSpec { machine, memory }).await
}
