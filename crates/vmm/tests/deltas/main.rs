//! Clones that are saved while they live: their changes against the template, through
//! several generations, forks and failures. Needs what `machines.rs` needs.

#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "../common/mod.rs"]
mod common;
mod failures;
mod saved;
#[path = "../common/view.rs"]
mod view;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{SHAPE, Template, console_line, folder, qcow2, vmm};
use saved::Saved;
use view::View;
use wrenn_vmm::{Machine, RunState, Vmm, VmmError, create_overlay, merge_layers};

/// The number of the newest round of the guest's work, after checking that none failed.
async fn rounds(machine: &Arc<dyn Machine>, at_least: u32) -> u32 {
    let began = Instant::now();
    loop {
        let console =
            String::from_utf8_lossy(&machine.console_tail(64 << 10).unwrap()).into_owned();
        assert!(!console.contains("BAD"), "{console}");
        let newest = console
            .lines()
            .filter_map(|line| line.split_once("LOAD ")?.1.strip_suffix(" ok."))
            .filter_map(|number| number.parse().ok())
            .next_back();
        if let Some(round) = newest.filter(|round| *round >= at_least) {
            return round;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "{console}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Descriptors that the process has open on `path`, and whether it may write through each.
fn descriptors_on(pid: u32, path: &Path) -> Vec<bool> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open = entries.filter(|entry| {
        let link = fs::read_link(entry.as_ref().unwrap().path());
        link.is_ok_and(|link| link == path)
    });
    open.map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        u32::from_str_radix(flags.unwrap().trim(), 8).unwrap() & 3 != 0
    })
    .collect()
}

fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[tokio::test]
async fn g12_g13_memory_is_the_same_through_generations_of_a_working_guest() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::shaped(&vmm, parent.path(), 10_110, None, SHAPE, "workload").await;
    let digest = template.memory.digest().unwrap();
    let dir = folder(parent.path(), "generation0");
    let mut spec = template.clone_spec(&vmm, &dir, 10_111, "generation0");
    spec.machine.disk.layers = qcow2(std::slice::from_ref(&template.layer));
    let mut machine = vmm.restore(spec).await.unwrap();
    let mut layers = vec![template.layer.clone()];
    let mut dir = dir;
    machine.resume().await.unwrap();
    let mut round = rounds(&machine, 1).await;
    let mut cleared = 0;
    for generation in 1..=4 {
        round = rounds(&machine, round + 5).await;
        layers.push(dir.join("disk.qcow2"));
        let saved = Saved::of(&machine, layers.clone()).await;
        let kept = rounds(&machine, 1).await;
        // What QEMU shows of the guest is what was read from outside.
        drop(machine);
        let before = View::of(&dir, SHAPE).await;
        assert!(before.firmware() == &saved.firmware[..]);
        machine = vmm.adopt(&dir).await.unwrap().unwrap();
        machine.kill().await.unwrap();
        // Pages that held something in the template and hold nothing now.
        let mut page = [0; 4096];
        cleared += saved
            .ranges
            .iter()
            .flat_map(|range| range.first..range.end())
            .filter(|number| before.page(*number) == [0; 4096])
            .filter(|number| {
                template.memory.read_at(number * 4096, &mut page).unwrap();
                page != [0; 4096]
            })
            .count();

        dir = folder(parent.path(), &format!("generation{generation}"));
        let id = format!("generation{generation}");
        let began = Instant::now();
        let standby = generation % 2 == 1;
        machine = saved
            .come_back(standby, &template, &vmm, &dir, 10_111, &id)
            .await;
        println!("restored in {:?}", began.elapsed());
        drop(machine);
        let after = View::of(&dir, SHAPE).await;
        assert_eq!(before.differing(&after), [""; 0]);
        machine = vmm.adopt(&dir).await.unwrap().unwrap();
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        machine.resume().await.unwrap();
        // It went on where it had stopped, and its disk holds all of the generations.
        let next = rounds(&machine, kept + 1).await;
        assert!(next < kept + 20, "{kept} then {next}");
        let line = console_line(&machine, &format!("id={id} ")).await;
        for earlier in 1..=generation {
            assert!(line.contains(&format!("generation{earlier},")), "{line}");
        }
    }
    machine.kill().await.unwrap();
    println!("{cleared} pages that the template fills were zero at a save");
    assert!(
        cleared > 0,
        "nothing proves that a cleared page stays clear"
    );
    assert_eq!(template.memory.digest().unwrap(), digest);
}

#[tokio::test]
async fn a_clone_is_saved_while_it_goes_on_and_forked_from_there() {
    let parent = tempfile::tempdir().unwrap();
    let vmm = vmm();
    let template = Template::shaped(&vmm, parent.path(), 10_120, None, SHAPE, "workload").await;
    let dir = folder(parent.path(), "parent");
    let spec = template.clone_spec(&vmm, &dir, 10_121, "parent");
    let machine = vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    console_line(&machine, "id=parent ").await;
    let pid = machine.pids().vmm.pid;
    let mut top = dir.join("disk.qcow2");
    let mut layers = vec![template.layer.clone()];
    let mut frozen = Vec::new();
    let mut opened = Vec::new();
    let mut children = Vec::new();
    for point in 0..3 {
        layers.push(top.clone());
        let next = dir.join(format!("disk{point}.qcow2"));
        create_overlay(&next, common::DISK_BYTES).unwrap();
        if point > 0 {
            // Another than the one in the end, which changes nothing.
            let other = dir.join(format!("other{point}.qcow2"));
            create_overlay(&other, common::DISK_BYTES).unwrap();
            machine.add_disk_layer(&other).await.unwrap();
            let mut opened = descriptors_on(pid, &other);
            opened.sort_unstable();
            assert_eq!(opened, [false, true, true]);
            if point == 2 {
                machine.forget_disk_layer(&next).await;
                assert!(descriptors_on(pid, &other).contains(&true));
                let files = open_files(pid);
                machine.forget_disk_layer(&other).await;
                assert!(descriptors_on(pid, &other).is_empty());
                // Three of its own, and one for writing to the top.
                assert_eq!(open_files(pid), files - 4);
            }
            machine.add_disk_layer(&next).await.unwrap();
            assert!(descriptors_on(pid, &other).is_empty());
        }
        let began = Instant::now();
        let saved = Saved::of(&machine, layers.clone()).await;
        let switching = Instant::now();
        machine.switch_disk_layer(&next).await.unwrap();
        let switched = switching.elapsed();
        machine.resume().await.unwrap();
        println!(
            "frozen for {:?}, {switched:?} of it for the disk",
            began.elapsed()
        );
        // The old layer can only be read from now on, and is never written again.
        assert_eq!(descriptors_on(pid, &next), [false, true]);
        let old = descriptors_on(pid, &top);
        assert!(!old.is_empty() && !old.contains(&true), "{old:?}");
        frozen.push((top.clone(), fs::read(&top).unwrap()));
        opened.push(open_files(pid));
        top = next;

        // A child goes on beside its parent.
        let child_dir = folder(parent.path(), &format!("child{point}"));
        let id = format!("child{point}");
        let began = Instant::now();
        let child = saved
            .come_back(point == 1, &template, &vmm, &child_dir, 10_122, &id)
            .await;
        child.resume().await.unwrap();
        println!("child runs after {:?}", began.elapsed());
        let line = console_line(&child, &format!("id={id} ")).await;
        assert!(
            line.contains(&format!("disk=made,template,parent,{id},")),
            "{line}"
        );
        children.push(child);
        let now = rounds(&machine, 1).await;
        rounds(&machine, now + 3).await;
    }
    // One that stood by is saved as any other.
    let child_dir = parent.path().join("child1");
    let next = child_dir.join("disk-next.qcow2");
    create_overlay(&next, common::DISK_BYTES).unwrap();
    Saved::of(&children[1], layers.clone()).await;
    children[1].switch_disk_layer(&next).await.unwrap();
    children[1].resume().await.unwrap();
    let child_pid = children[1].pids().vmm.pid;
    assert_eq!(descriptors_on(child_pid, &next), [false, true]);
    let old = descriptors_on(child_pid, &child_dir.join("disk.qcow2"));
    assert!(!old.is_empty() && !old.contains(&true), "{old:?}");
    for child in &children {
        let now = rounds(child, 1).await;
        rounds(child, now + 2).await;
        child.kill().await.unwrap();
    }
    let line = console_line(&machine, "TICK").await;
    assert!(line.contains("disk=made,template,parent, "), "{line}");
    for (path, content) in &frozen {
        assert!(&fs::read(path).unwrap() == content, "{path:?} was written");
    }
    // Two more for each new layer: it, and the same for reading only.
    assert_eq!(opened[2] - opened[1], 2, "{opened:?}");

    // On a running machine too, and by an agent that did not start it; also where that one had
    // got another layer ready and did not live to switch to it.
    let unused = dir.join("unused.qcow2");
    create_overlay(&unused, common::DISK_BYTES).unwrap();
    machine.add_disk_layer(&unused).await.unwrap();
    drop(machine);
    let machine = vmm.adopt(&dir).await.unwrap().unwrap();
    assert!(descriptors_on(pid, &unused).contains(&true));
    let next = dir.join("running.qcow2");
    create_overlay(&next, common::DISK_BYTES).unwrap();
    machine.switch_disk_layer(&next).await.unwrap();
    assert!(descriptors_on(pid, &unused).is_empty());
    assert_eq!(descriptors_on(pid, &next), [false, true]);
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    assert!(!descriptors_on(pid, &top).contains(&true));
    let content = fs::read(&top).unwrap();
    let now = rounds(&machine, 1).await;
    rounds(&machine, now + 3).await;
    assert!(fs::read(&top).unwrap() == content);

    // Merged, they are the same disk.
    layers.push(top.clone());
    let merged = dir.join("merged.qcow2");
    let replaced = &layers[1..];
    let open: Vec<_> = replaced
        .iter()
        .map(|it| fs::File::open(it).unwrap())
        .collect();
    let open: Vec<_> = open.iter().collect();
    merge_layers(&open, &merged, &mut |_| true).unwrap();
    let files = open_files(pid);
    for (count, kept) in [(replaced.len() - 1, 2), (replaced.len(), 1), (0, 0)] {
        let wrong = machine
            .replace_layers(count, kept, std::slice::from_ref(&merged))
            .await;
        let wrong = wrong.unwrap_err().to_string();
        assert!(
            wrong.contains("has 7 layers") && wrong.contains("as it was"),
            "{wrong}"
        );
    }
    assert_eq!(open_files(pid), files);
    let other = [dir.join("small.qcow2"), dir.join("missing.qcow2")];
    create_overlay(&other[0], common::DISK_BYTES).unwrap();
    let missing = machine.replace_layers(replaced.len(), 2, &other).await;
    assert!(matches!(missing, Err(VmmError::File { .. })), "{missing:?}");
    fs::remove_file(&other[0]).unwrap();
    assert_eq!(open_files(pid), files);
    let replacing = machine.replace_layers(replaced.len(), 2, std::slice::from_ref(&merged));
    replacing.await.unwrap();
    assert!(open_files(pid) < files);
    for layer in replaced {
        assert!(
            descriptors_on(pid, layer).is_empty(),
            "{layer:?} is still open"
        );
    }
    assert!(!descriptors_on(pid, &merged).contains(&true));
    let now = rounds(&machine, 1).await;
    rounds(&machine, now + 3).await;

    // A layer that cannot be used changes nothing.
    let files = open_files(pid);
    let (text, small) = (dir.join("text.qcow2"), dir.join("small.qcow2"));
    fs::write(&text, b"no layer").unwrap();
    create_overlay(&small, 1 << 20).unwrap();
    let broken = dir.join("broken.qcow2");
    create_overlay(&broken, common::DISK_BYTES).unwrap();
    let mut bytes = fs::read(&broken).unwrap();
    bytes[7] = 9; // version
    fs::write(&broken, bytes).unwrap();
    for layer in [text, small, broken] {
        let error = machine.switch_disk_layer(&layer).await.unwrap_err();
        assert!(matches!(error, VmmError::DiskLayer { .. }), "{error:?}");
        assert!(error.to_string().contains("as it was"), "{error}");
        let ahead = machine.add_disk_layer(&layer).await.unwrap_err();
        assert_eq!(ahead.to_string(), error.to_string());
    }
    let missing = machine.switch_disk_layer(Path::new("/nonexistent")).await;
    assert!(matches!(missing, Err(VmmError::File { .. })));
    assert_eq!(open_files(pid), files);
    let now = rounds(&machine, 1).await;
    rounds(&machine, now + 2).await;
    machine.kill().await.unwrap();
}
