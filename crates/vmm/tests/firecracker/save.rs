//! What is saved is what was there, and comes back elsewhere: memory, state, disk.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wrenn_vmm::{
    Delta, DeltaError, DiskLimits, Machine, PageBuffer, PageRange, RunState, ServedSpec, Vmm,
    VmmError, state_file,
};

use crate::bed::{Bed, SHAPE, Template, View, first_round, raw, rounds_of, settled_round};
use crate::guest;
use crate::pages::PageServer;

/// A saved clone, held in memory.
pub struct Saved {
    pub state: Vec<u8>,
    pages: Arc<PageBuffer>,
    ranges: Vec<PageRange>,
    /// Its memory, as Firecracker had it.
    frozen: View,
    /// The rounds it had worked.
    pub round: u64,
}

impl Saved {
    pub async fn of(machine: &Arc<dyn Machine>) -> Saved {
        let began = Instant::now();
        let mut saved = machine.save_delta().await.unwrap();
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        let pages = PageBuffer::collect(&mut saved.pages).unwrap();
        println!(
            "saved in {:?}: {:?}, state {} bytes, {} pages in {} ranges, of which {} zero",
            began.elapsed(),
            saved.times,
            saved.state.len(),
            saved.pages.count(),
            saved.pages.ranges().len(),
            pages.zero_pages(),
        );
        assert_eq!(saved.pages.memory_pages() * 4096, SHAPE.memory.bytes());
        let frozen = View::of(machine.pids());
        let round = frozen.check(settled_round(machine).await);
        Saved {
            state: saved.state,
            pages: Arc::new(pages),
            ranges: saved.pages.ranges().to_vec(),
            frozen,
            round,
        }
    }

    pub fn delta(&self) -> Delta {
        Delta {
            firmware: Box::new([0; wrenn_vmm::FIRMWARE_BYTES]),
            pages: self.pages.stream(),
        }
    }

    async fn restore(
        &self,
        bed: &Bed,
        template: &Template,
        name: &str,
        uid: u32,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        let mut spec = template.clone_spec(bed, name, uid);
        spec.state = state_file(&self.state).unwrap();
        bed.vmm.restore_delta(spec, self.delta()).await
    }

    fn changed(&self, page: usize) -> bool {
        let page = page as u64;
        self.ranges
            .iter()
            .any(|range| (range.first..range.end()).contains(&page))
    }
}

/// What Firecracker itself changes of a memory while it loads a state: the machine's
/// generation identifier, and the page of the clock that tells the guest of it.
const CHANGED_BY_LOADING: usize = 2;

fn assert_same(before: &View, after: &View) {
    let differing = before.differing(after);
    println!("pages that loading changed: {differing:x?}");
    assert!(differing.len() <= CHANGED_BY_LOADING, "{differing:x?}");
    // In the last KiB below 1 MiB, where Firecracker's own tables are.
    assert!(
        differing.iter().all(|page| (0x80..0x100).contains(page)),
        "{differing:x?}"
    );
    for page in differing {
        let pages = [before, after].map(|view| view.page(page as u64));
        let bytes = pages[0]
            .iter()
            .zip(pages[1])
            .filter(|(one, other)| one != other);
        let count = bytes.count();
        assert!(count <= 24, "{count} bytes of page {page:#x} differ");
    }
}

#[tokio::test]
async fn g12_g20_a_saved_machine_goes_on_under_another_path() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_210, 70).await;
    let digest = template.memory.digest().unwrap();
    // Everything it was made with is elsewhere or gone.
    let moved = bed.path().join("elsewhere/deep/below");
    fs::create_dir_all(&moved).unwrap();
    let layer = moved.join("layer.raw");
    fs::rename(&template.layer, &layer).unwrap();
    fs::remove_dir_all(bed.path().join("template")).unwrap();
    for name in ["kernel", "initramfs", "base.img"] {
        fs::remove_file(bed.path().join(name)).unwrap();
    }
    let mut clones = Vec::new();
    for (index, folder) in ["elsewhere/one", "another/folder/that/is/quite/deep/two"]
        .iter()
        .enumerate()
    {
        let mut spec = template.clone_spec(&bed, folder, 10_211 + index as u32);
        spec.machine.disk.base = "/nonexistent".into();
        spec.machine.disk.layers = vec![raw(&layer)];
        let began = Instant::now();
        let machine = bed.vmm.restore(spec).await.unwrap();
        println!("restored in {:?}", began.elapsed());
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        assert_same(&template.frozen, &View::of(machine.pids()));
        machine.resume().await.unwrap();
        assert_eq!(*machine.run_state().borrow(), RunState::Running);
        clones.push(machine);
    }
    for machine in &clones {
        // It goes on counting where the template stopped, content with what it finds.
        let first = first_round(machine).await;
        assert!(
            (template.round..template.round + 3).contains(&first),
            "{first}"
        );
        rounds_of(machine, template.round + 70).await;
        machine.stop().await.unwrap();
        View::of(machine.pids()).check(settled_round(machine).await);
        machine.kill().await.unwrap();
    }
    // Clones share it, and nothing they did shows in it.
    assert_eq!(template.memory.digest().unwrap(), digest);
}

#[tokio::test]
async fn g20_no_path_of_the_host_is_in_a_state() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_215, 3).await;
    let spec = template.clone_spec(&bed, "clone", 10_216);
    let machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    rounds_of(&machine, template.round + 5).await;
    let saved = Saved::of(&machine).await;
    machine.kill().await.unwrap();
    let dir = bed.path().to_str().unwrap().as_bytes();
    for state in [fs::read(&template.state).unwrap(), saved.state] {
        let holds = |words: &[u8]| state.windows(words.len()).any(|window| window == words);
        assert!(holds(b"/disk.img"), "the state names its disk otherwise");
        assert!(!holds(dir) && !holds(b"/tmp") && !holds(b"/proc"));
    }
}

#[tokio::test]
async fn g12_g13_memory_is_the_same_through_generations_of_a_working_guest() {
    let Some(bed) = Bed::new() else { return };
    // Behind round 64, so that the template's pages are full and later rounds clear them.
    let template = bed.template("template", 10_220, 40).await;
    let spec = template.clone_spec(&bed, "generation0", 10_221);
    let mut machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    let mut round = template.round;
    let mut cleared = 0;
    for generation in 1..=4 {
        round = rounds_of(&machine, round + 25).await;
        let saved = Saved::of(&machine).await;
        machine.kill().await.unwrap();
        // All that differs is known as changed, and nothing was touched that was not.
        let mut template_pages = vec![0; SHAPE.memory.bytes() as usize];
        template.memory.read_at(0, &mut template_pages).unwrap();
        let differing = saved.frozen.differing(&View(template_pages));
        assert!(differing.iter().all(|page| saved.changed(*page)));
        let count: u64 = saved.ranges.iter().map(|range| range.count).sum();
        assert!(count < 200, "{count} pages count as changed");
        let work = guest::WORK_AT / 4096;
        cleared += (work..work + guest::WORK_PAGES)
            .filter(|page| saved.changed(*page as usize))
            .filter(|page| saved.frozen.page(*page) == [0; 4096])
            .count();
        let name = format!("generation{generation}");
        let began = Instant::now();
        machine = saved.restore(&bed, &template, &name, 10_221).await.unwrap();
        println!("restored in {:?}", began.elapsed());
        assert_same(&saved.frozen, &View::of(machine.pids()));
        machine.resume().await.unwrap();
        let next = first_round(&machine).await;
        assert!(
            (saved.round..saved.round + 3).contains(&next),
            "{} then {next}",
            saved.round
        );
    }
    machine.kill().await.unwrap();
    assert!(cleared > 20, "{cleared} pages that were cleared were saved");
}

#[tokio::test]
async fn a_clone_is_saved_again_and_again_while_it_goes_on() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_230, 5).await;
    let spec = template.clone_spec(&bed, "parent", 10_231);
    let machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    let mut saves = Vec::new();
    for index in 1..=3 {
        rounds_of(&machine, template.round + 20 * index).await;
        let saved = Saved::of(&machine).await;
        machine.resume().await.unwrap();
        saves.push(saved);
    }
    rounds_of(&machine, saves[2].round + 5).await;
    machine.kill().await.unwrap();
    // Each save holds all that changed since the template, not since the save before.
    for (index, saved) in saves.iter().enumerate().rev() {
        let name = format!("fork{index}");
        let fork = saved.restore(&bed, &template, &name, 10_232).await.unwrap();
        assert_same(&saved.frozen, &View::of(fork.pids()));
        fork.resume().await.unwrap();
        rounds_of(&fork, saved.round + 5).await;
        fork.kill().await.unwrap();
    }
}

#[tokio::test]
async fn g12_g20_a_page_server_supplies_the_memory() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_240, 70).await;
    let spec = template.clone_spec(&bed, "served", 10_241);
    let socket = bed.path().join("a page server's.sock");
    let server = PageServer::start(&socket, template.memory.clone());
    let began = Instant::now();
    let spec = ServedSpec {
        machine: spec.machine,
        socket,
        server: own_process(),
        state: spec.state,
    };
    let machine = bed.vmm.restore_served(spec).await.unwrap();
    println!(
        "restored in {:?}, {} pages served",
        began.elapsed(),
        server.served()
    );
    machine.resume().await.unwrap();
    let first = first_round(&machine).await;
    assert!(
        (template.round..template.round + 3).contains(&first),
        "{first}"
    );
    rounds_of(&machine, template.round + 70).await;
    let served = server.served();
    assert!((30..2000).contains(&served), "{served} pages served");

    // What has changed is told by the dirty log, though every page that was served is there.
    let mut saved = machine.save_delta().await.unwrap();
    let count = saved.pages.count();
    println!("{} pages served, {count} changed", server.served());
    assert!(count < 100, "{count} pages count as changed");
    let pages = PageBuffer::collect(&mut saved.pages).unwrap();
    // An unchanged page is not here.
    let elsewhere = saved.pages.read(0x1000, &mut [0; 4096]).unwrap_err();
    assert!(matches!(elsewhere, DeltaError::Elsewhere { page: 0x1000 }));
    let frozen = View::of_served(machine.pids(), &template.memory);
    let round = frozen.check(settled_round(&machine).await);
    machine.kill().await.unwrap();
    server.ended();

    // The changes make the same machine of a file, too.
    let saved = Saved {
        state: saved.state,
        pages: Arc::new(pages),
        ranges: saved.pages.ranges().to_vec(),
        frozen,
        round,
    };
    let machine = saved
        .restore(&bed, &template, "again", 10_242)
        .await
        .unwrap();
    assert_same(&saved.frozen, &View::of(machine.pids()));
    machine.resume().await.unwrap();
    rounds_of(&machine, saved.round + 5).await;
    machine.kill().await.unwrap();
}

/// The process whose thread serves the pages.
fn own_process() -> OwnedFd {
    let pid = rustix::process::getpid();
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
}

#[tokio::test]
async fn g21_a_machine_ends_with_the_process_that_serves_its_memory() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_243, 70).await;
    let spec = template.clone_spec(&bed, "served", 10_244);
    let socket = bed.path().join("pages.sock");
    let _server = PageServer::start(&socket, template.memory.clone());
    let mut process = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let pid = rustix::process::Pid::from_child(&process);
    let flags = rustix::process::PidfdFlags::empty();
    let spec = ServedSpec {
        machine: spec.machine,
        socket,
        server: rustix::process::pidfd_open(pid, flags).unwrap(),
        state: spec.state,
    };
    let machine = bed.vmm.restore_served(spec).await.unwrap();
    machine.resume().await.unwrap();
    rounds_of(&machine, template.round + 3).await;
    process.kill().unwrap();
    let mut exited = machine.exited();
    let ended = exited.wait_for(Option::is_some);
    let ended = tokio::time::timeout(std::time::Duration::from_secs(10), ended);
    let reason = ended.await.unwrap().unwrap().clone().unwrap().to_string();
    assert!(reason.contains("serves its memory has ended"), "{reason}");
    process.wait().unwrap();
}

#[tokio::test]
async fn a_machine_that_booted_is_saved_as_a_change_of_the_template() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_247, 20).await;
    let spec = bed.spec(&bed.folder("cold"), 10_248);
    let booted = bed.vmm.boot_private(spec, template.memory.clone());
    let machine = booted.await.unwrap();
    assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
    machine.resume().await.unwrap();
    rounds_of(&machine, 30).await;
    for _ in 0..2 {
        let saved = Saved::of(&machine).await;
        machine.resume().await.unwrap();
        rounds_of(&machine, saved.round + 3).await;
    }
    let saved = Saved::of(&machine).await;
    machine.kill().await.unwrap();
    let fork = saved.restore(&bed, &template, "fork", 10_249).await;
    let fork = fork.unwrap();
    assert_same(&saved.frozen, &View::of(fork.pids()));
    fork.resume().await.unwrap();
    rounds_of(&fork, saved.round + 5).await;
    fork.kill().await.unwrap();
}

#[tokio::test]
async fn a_missing_page_server_is_told() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_245, 2).await;
    let served = |name: &str, socket: PathBuf| {
        let spec = template.clone_spec(&bed, name, 10_246);
        ServedSpec {
            machine: spec.machine,
            socket,
            server: own_process(),
            state: spec.state,
        }
    };
    let socket = bed.path().join("nobody.sock");
    let spec = served("one", socket.clone());
    let error = bed.vmm.restore_served(spec).await.err().unwrap();
    assert!(error.to_string().contains("nobody.sock"), "{error}");
    // A socket behind which nobody is.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let spec = served("two", socket);
    let error = bed.vmm.restore_served(spec).await.err().unwrap();
    println!("{error}");
    assert!(matches!(error, VmmError::State { .. }), "{error:?}");
}

#[tokio::test]
async fn bad_states_are_refused_and_named() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_250, 2).await;
    let good = fs::read(&template.state).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    // The version of the format follows the magic number of 8 bytes.
    let mut other_version = good.clone();
    other_version[8] += 1;
    for (name, state) in [
        ("flipped", flipped),
        ("cut", good[..good.len() - 100].to_vec()),
        ("empty", Vec::new()),
        (
            "foreign",
            b"this is no state of a machine, but long enough".to_vec(),
        ),
        ("versioned", other_version),
    ] {
        let path = bed.path().join(format!("{name}.state"));
        fs::write(&path, state).unwrap();
        let mut spec = template.clone_spec(&bed, name, 10_251);
        spec.state = File::open(&path).unwrap();
        let dir = spec.machine.dir.clone();
        let error = bed.vmm.restore(spec).await.err().unwrap();
        println!("{error}");
        assert!(matches!(error, VmmError::State { .. }), "{error:?}");
        let words = error.to_string();
        assert!(words.contains(&format!("{name}.state")), "{words}");
        assert!(words.contains("start cold"), "{words}");
        assert!(bed.vmm.adopt(&dir).await.unwrap().is_none(), "it lives on");
    }
}

#[tokio::test]
async fn g11_another_shape_is_refused() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_255, 2).await;
    let mut spec = template.clone_spec(&bed, "memory", 10_256);
    spec.machine.shape.memory.0 *= 2;
    let error = bed.vmm.restore(spec).await.err().unwrap();
    assert!(matches!(error, VmmError::Spec(_)), "{error:?}");
    let mut spec = template.clone_spec(&bed, "vcpus", 10_256);
    spec.machine.shape.vcpus.0 = 2;
    let error = bed.vmm.restore(spec).await.err().unwrap();
    assert!(error.to_string().contains("2 processors"), "{error}");
}

#[tokio::test]
async fn disks_are_layers_and_are_switched_under_a_running_machine() {
    let Some(bed) = Bed::new() else { return };
    let template = bed.template("template", 10_260, 2).await;
    let read = |path: &PathBuf| fs::read(path).unwrap();
    assert!(read(&template.layer).starts_with(b"base"));
    // As if the guest had written something before it was frozen.
    let layer = File::options().write(true).open(&template.layer).unwrap();
    layer.write_all_at(b"template", 8192).unwrap();
    let mut spec = template.clone_spec(&bed, "clone", 10_261);
    // Its guest does not read or write, so this shows that such a limit is taken.
    spec.machine.disk_limits = DiskLimits {
        bytes_per_sec: Some(1_000_000),
        operations_per_sec: Some(100),
    };
    let dir = spec.machine.dir.clone();
    let machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    let old = dir.join("disk.raw");
    assert!(read(&old) == read(&template.layer));
    let opened = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", machine.pids().vmm.pid)).unwrap();
        let files = fds.filter_map(|fd| fs::metadata(fd.unwrap().path()).ok());
        files
            .map(|file| std::os::unix::fs::MetadataExt::ino(&file))
            .collect::<Vec<_>>()
    };
    let inode = |path: &PathBuf| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    assert!(opened().contains(&inode(&old)));

    let new = dir.join("second.raw");
    bed.vmm.create_layer(&new, crate::bed::DISK_BYTES).unwrap();
    machine.switch_disk_layer(&new).await.unwrap();
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    assert!(read(&new) == read(&template.layer));
    assert!(opened().contains(&inode(&new)) && !opened().contains(&inode(&old)));
    rounds_of(&machine, template.round + 5).await;

    // A layer that holds something is not overwritten, and one that is missing is named.
    let error = machine.switch_disk_layer(&old).await.unwrap_err();
    assert!(matches!(error, VmmError::DiskLayer { .. }), "{error:?}");
    let error = machine.switch_disk_layer(&dir.join("none")).await;
    assert!(error.unwrap_err().to_string().ends_with("none"));
    assert!(opened().contains(&inode(&new)));
    assert_eq!(*machine.run_state().borrow(), RunState::Running);

    // What is saved now still finds its disk by the same name.
    let saved = Saved::of(&machine).await;
    machine.kill().await.unwrap();
    let mut spec = template.clone_spec(&bed, "next", 10_262);
    spec.machine.disk.layers.push(raw(&new));
    spec.state = state_file(&saved.state).unwrap();
    let next = bed.vmm.restore_delta(spec, saved.delta()).await.unwrap();
    next.resume().await.unwrap();
    rounds_of(&next, saved.round + 5).await;
    next.kill().await.unwrap();
}

#[tokio::test]
async fn operations_that_make_no_sense_are_typed_errors() {
    let Some(bed) = Bed::new() else { return };
    let (machine, _memory) = bed.boot("booted", 10_270).await;
    rounds_of(&machine, 2).await;
    // There is no template that it could differ from.
    let error = machine.save_delta().await.unwrap_err();
    let VmmError::Delta { source, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(
        matches!(source, DeltaError::NoTemplate { .. }),
        "{source:?}"
    );
    machine.kill().await.unwrap();
    let template = bed.template("template", 10_271, 2).await;
    let spec = template.clone_spec(&bed, "clone", 10_272);
    let machine = bed.vmm.restore(spec).await.unwrap();
    let out = File::create(bed.path().join("out")).unwrap();
    let error = machine.save_state(out).await.unwrap_err();
    assert!(error.to_string().contains("save_delta"), "{error}");
    machine.kill().await.unwrap();
    // A saved machine's changes cannot be read once it runs again.
    let spec = template.clone_spec(&bed, "resumed", 10_272);
    let machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    rounds_of(&machine, template.round + 1).await;
    let mut saved = machine.save_delta().await.unwrap();
    machine.resume().await.unwrap();
    let error = PageBuffer::collect(&mut saved.pages).unwrap_err();
    assert!(matches!(error, DeltaError::Resumed), "{error:?}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    machine.kill().await.unwrap();
}
