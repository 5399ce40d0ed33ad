//! Disks of the device mapper, tried in a guest whose kernel has one.

use std::convert::Infallible;
use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use wrenn_vmm::{CloneWay, Cloning, MappedDisk};

const MIB: u64 = 1 << 20;
const IMAGE: u64 = 8 * MIB;
const BLOCK: usize = 4096;

type Tried = Result<(), Box<dyn Error>>;

fn expect(right: bool, what: &str) -> Tried {
    match right {
        true => Ok(()),
        false => Err(what.into()),
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

/// The first byte of the block there.
fn byte(disk: &File, at: u64) -> std::io::Result<u8> {
    let mut block = [0; BLOCK];
    disk.read_exact_at(&mut block, at)?;
    Ok(block[0])
}

/// In a folder whose file system shares no blocks.
pub fn try_all(folder: &Path) -> Tried {
    let cloning = Cloning::probe(folder);
    println!("{cloning:?}");
    expect(
        cloning.way == CloneWay::DeviceMapper,
        "another way was chosen",
    )?;
    let path = |name: &str| folder.join(name);
    let image = open(&path("image"))?;
    for block in 0..IMAGE / BLOCK as u64 {
        image.write_all_at(&[7; BLOCK], block * BLOCK as u64)?;
    }
    let first = open(&path("first"))?;
    MappedDisk::create_layer(IMAGE, &first)?;
    gone_is_gone(&path, &image)?;
    layers(&path)?;
    killed(&path)?;
    full(&path)
}

/// What is written goes to the layer alone, and the device goes with its last user.
fn gone_is_gone(path: &impl Fn(&str) -> PathBuf, image: &File) -> Tried {
    let (disk, used) = MappedDisk::attach("tried", &path("image"), &path("first"))?;
    used.write_all_at(&[1; BLOCK], MIB)?;
    disk.sync()?;
    expect(
        byte(&used, MIB)? == 1 && byte(&used, 0)? == 7,
        "it reads wrong",
    )?;
    expect(byte(image, MIB)? == 7, "the image below was written to")?;
    expect(disk.layer()? == path("first"), "another layer is told")?;
    expect(MappedDisk::find("tried")?.is_some(), "it is not found")?;
    drop(used);
    await_gone("tried")
}

/// A layer that was switched away from stays as it was, and each goes on from its own.
fn layers(path: &impl Fn(&str) -> PathBuf) -> Tried {
    let (disk, used) = MappedDisk::attach("tried", &path("image"), &path("first"))?;
    expect(byte(&used, MIB)? == 1, "what was written is lost")?;
    used.write_all_at(&[2; BLOCK], 2 * MIB)?;
    disk.sync()?;
    MappedDisk::copy_layer(&File::open(path("first"))?, &open(&path("second"))?)?;
    disk.switch(&path("second"))?;
    used.write_all_at(&[3; BLOCK], 3 * MIB)?;
    disk.sync()?;
    expect(disk.layer()? == path("second"), "it was not switched")?;
    let seen = [
        byte(&used, MIB)?,
        byte(&used, 2 * MIB)?,
        byte(&used, 3 * MIB)?,
    ];
    expect(seen == [1, 2, 3], "a switch changed what is read")?;
    // Beside the machine that goes on, another from the layer it has left.
    let (_, other) = MappedDisk::attach("other", &path("image"), &path("first"))?;
    let seen = [
        byte(&other, MIB)?,
        byte(&other, 2 * MIB)?,
        byte(&other, 3 * MIB)?,
    ];
    expect(seen == [1, 2, 7], "the layer that was left is another")?;
    let error = disk.switch(&path("missing")).err();
    expect(error.is_some(), "a layer that is not there was taken")?;
    expect(
        disk.layer()? == path("second"),
        "a failed switch changed it",
    )?;
    drop((used, other));
    await_gone("tried")?;
    await_gone("other")
}

/// The device of a machine that is killed goes, whoever made it.
fn killed(path: &impl Fn(&str) -> PathBuf) -> Tried {
    let mut holder = Command::new(std::env::current_exe()?)
        .arg("hold")
        .args([path("image"), path("second")])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    let told = holder.stdout.take().ok_or("it has no output")?;
    BufReader::new(told).read_line(&mut line)?;
    expect(line == "held\n", &line)?;
    expect(MappedDisk::find("held")?.is_some(), "it is not held")?;
    holder.kill()?;
    holder.wait()?;
    await_gone("held")
}

/// Uses a disk until it is killed.
pub fn hold(image: &Path, layer: &Path) -> Result<Infallible, Box<dyn Error>> {
    let (_disk, _used) = MappedDisk::attach("held", image, layer)?;
    println!("held");
    std::io::stdout().flush()?;
    loop {
        std::thread::park();
    }
}

/// A disk whose host is full fails, and holds afterwards what it had before.
fn full(path: &impl Fn(&str) -> PathBuf) -> Tried {
    let (disk, used) = MappedDisk::attach("tried", &path("image"), &path("second"))?;
    let filler = open(&path("filler"))?;
    let mut length = 0;
    while filler.write_all_at(&[9; BLOCK], length).is_ok() {
        length += BLOCK as u64;
    }
    let mut written = 0;
    let failed = loop {
        let block = used.write_all_at(&[4; BLOCK], 4 * MIB + written);
        if let Some(error) = block.and_then(|()| disk.sync()).err() {
            break error;
        }
        written += BLOCK as u64;
        expect(written < 4 * MIB, "a full disk was written to")?;
    };
    println!("full: {failed}");
    drop((used, filler));
    await_gone("tried")?;
    fs::remove_file(path("filler"))?;
    MappedDisk::copy_layer(&File::open(path("second"))?, &open(&path("third"))?)?;
    let (_, used) = MappedDisk::attach("tried", &path("image"), &path("third"))?;
    let seen = [
        byte(&used, MIB)?,
        byte(&used, 2 * MIB)?,
        byte(&used, 3 * MIB)?,
    ];
    expect(
        seen == [1, 2, 3],
        "what was there before the disk was full is lost",
    )?;
    used.write_all_at(&[5; BLOCK], 5 * MIB)?;
    used.sync_data()?;
    drop(used);
    await_gone("tried")
}

/// Waits until a device is gone, and with it the devices that it was made of.
fn await_gone(name: &str) -> Tried {
    let began = Instant::now();
    let others = ["tried", "other", "held"];
    while MappedDisk::find(name)?.is_some() {
        expect(began.elapsed() < Duration::from_secs(10), "a device stays")?;
        std::thread::sleep(Duration::from_millis(10));
    }
    for other in others {
        if MappedDisk::find(other)?.is_some() {
            return Ok(());
        }
    }
    loop {
        let loops = fs::read_dir("/sys/block")?.filter_map(Result::ok);
        let used = loops.filter(|device| device.path().join("loop/backing_file").exists());
        if used.count() == 0 {
            return Ok(());
        }
        expect(
            began.elapsed() < Duration::from_secs(10),
            "a loop device stays",
        )?;
        std::thread::sleep(Duration::from_millis(10));
    }
}
