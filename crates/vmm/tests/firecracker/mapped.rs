//! Machines whose disks are snapshots of the device mapper, where the host has one; what these
//! disks themselves promise is proved by `tests/mapped_disks.rs`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use wrenn_vmm::{
    CloneWay, DiskLayer, LayerFormat, RunState, Vmm, layers_in, left_layer, state_file,
};

use crate::bed::{Bed, DISK_BYTES, rounds_of};
use crate::save::Saved;

const BLOCK: usize = 4096;

fn bed() -> Option<Bed> {
    let bed = Bed::with(|_| {})?;
    if bed.vmm.info().layers != LayerFormat::DmSnapshot {
        println!("skipped: this host has no device mapper, or shares blocks between files");
        return None;
    }
    Some(bed)
}

/// The device that this monitor has open as its disk.
fn device(pid: u32) -> PathBuf {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let of = |fd: fs::DirEntry| {
        let file = fs::metadata(fd.path()).ok()?;
        let minor = file.rdev() & 0xff | (file.rdev() >> 12) & !0xff;
        let is_disk = file.file_type().is_block_device();
        is_disk.then(|| PathBuf::from(format!("/dev/dm-{minor}")))
    };
    fds.filter_map(|fd| of(fd.unwrap())).next().unwrap()
}

fn write(device: &Path, byte: u8, at: u64) {
    let device = File::options().write(true).open(device).unwrap();
    device.write_all_at(&[byte; BLOCK], at).unwrap();
    device.sync_data().unwrap();
}

fn read(device: &Path) -> Vec<u8> {
    let device = File::open(device).unwrap();
    let mut all = vec![0; DISK_BYTES as usize];
    device.read_exact_at(&mut all, 0).unwrap();
    all
}

fn gone(device: &Path) {
    let began = Instant::now();
    while device.exists() {
        assert!(began.elapsed() < Duration::from_secs(5), "{device:?} stays");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn a_mapped_disk_is_saved_restored_switched_and_found_again() {
    let Some(bed) = bed() else { return };
    let base = fs::read(bed.path().join("base.img")).unwrap();
    let template = bed.template("template", 10_280, 2).await;
    let mapped = |path: &Path| DiskLayer::new(LayerFormat::DmSnapshot, path);
    let mut spec = template.clone_spec(&bed, "clone", 10_281);
    spec.machine.disk.layers = vec![mapped(&template.layer)];
    let dir = spec.machine.dir.clone();
    let machine = bed.vmm.restore(spec).await.unwrap();
    machine.resume().await.unwrap();
    assert_eq!(layers_in(&dir).unwrap(), Some(LayerFormat::DmSnapshot));
    let disk = device(machine.pids().vmm.pid);
    assert!(read(&disk) == base);
    // As if the guest had done it.
    write(&disk, 1, 1 << 16);
    let (old, new) = (dir.join("disk.raw"), dir.join("second"));
    bed.vmm.create_layer(&new, DISK_BYTES).unwrap();
    let layers = [old.clone(), new.clone()];
    assert_eq!(machine.written_layer(&layers).unwrap(), 0);
    machine.switch_disk_layer(&new).await.unwrap();
    assert_eq!(*machine.run_state().borrow(), RunState::Running);
    assert_eq!(machine.written_layer(&layers).unwrap(), 1);
    write(&disk, 2, 1 << 17);
    rounds_of(&machine, template.round + 5).await;

    // The next agent finds it, and what it writes to.
    let pid = machine.pids().vmm.pid;
    drop(machine);
    let machine = bed.vmm.adopt(&dir).await.unwrap().unwrap();
    assert_eq!(machine.written_layer(&layers).unwrap(), 1);
    let third = dir.join("third");
    bed.vmm.create_layer(&third, DISK_BYTES).unwrap();
    machine.switch_disk_layer(&third).await.unwrap();
    write(&disk, 3, 1 << 18);
    let error = machine.switch_disk_layer(&old).await.unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
    assert_eq!(device(pid), disk);

    // Two go on from what was saved, and what came after is not theirs.
    let saved = Saved::of(&machine).await;
    let layers = [old, new.clone(), third];
    assert_eq!(machine.written_layer(&layers).unwrap(), 2);
    machine.kill().await.unwrap();
    assert_eq!(left_layer(&dir, &layers).unwrap(), 2);
    gone(&disk);
    let mut expected = base.clone();
    expected[1 << 16..][..BLOCK].fill(1);
    expected[1 << 17..][..BLOCK].fill(2);
    for (name, uid) in [("next", 10_282), ("another", 10_283)] {
        let mut spec = template.clone_spec(&bed, name, uid);
        spec.machine.disk.layers = vec![mapped(&template.layer), mapped(&new)];
        spec.state = state_file(&saved.state).unwrap();
        let next = bed.vmm.restore_delta(spec, saved.delta()).await.unwrap();
        next.resume().await.unwrap();
        rounds_of(&next, saved.round + 5).await;
        let disk = device(next.pids().vmm.pid);
        assert!(read(&disk) == expected, "{name}");
        write(&disk, 9, 0);
        next.kill().await.unwrap();
        gone(&disk);
    }
    assert!(fs::read(bed.path().join("base.img")).unwrap() == base);
}

#[tokio::test]
async fn a_mapped_disk_lies_on_a_raw_image_that_was_saved_before() {
    let Some(bed) = bed() else { return };
    let Some(before) = Bed::with(|config| config.cloning.way = CloneWay::Copy) else {
        return;
    };
    let template = before.template("template", 10_284, 2).await;
    let layer = File::options().write(true).open(&template.layer).unwrap();
    layer.write_all_at(b"template", 8192).unwrap();
    let spec = template.clone_spec(&bed, "clone", 10_285);
    let machine = bed.vmm.restore(spec).await.unwrap();
    let disk = device(machine.pids().vmm.pid);
    assert!(read(&disk) == fs::read(&template.layer).unwrap());
    machine.kill().await.unwrap();
    gone(&disk);
}
