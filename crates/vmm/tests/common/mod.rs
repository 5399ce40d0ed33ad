//! A bed for machines: a kernel, a small guest that prints what it sees, and folders.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    BootFiles, BootSpec, DiskChain, DiskLayer, DiskLimits, IDENTITY_BYTES, Launcher, LayerFormat,
    Machine, MachineSpec, MemoryFile, QemuConfig, QemuVmm, RestoreSpec, SealedMemory, Vmm,
    create_overlay, probe,
};

/// In the order in which the kernel needs them.
const MODULES: [&str; 8] = [
    "virtio_ring",
    "virtio",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "qemu_fw_cfg",
];

/// Prints a line five times a second: how often, a random number, the identity it reads, its
/// network card, and what its disk holds, to which it adds the identity it finds changed.
///
/// With `workload` on its command line it also runs a round of work before each line: files
/// in memory are made, turned to zeros in place, freed and checked against the checksums of
/// all rounds before, and copied to the disk and read back from there; it tells of the round
/// as `LOAD n ok`. An identity of `fill=MIB` (a multiple of 5) has it write so much memory, and tell `FILLED`;
/// one of `eat` has it write 16 MiB to its disk, and tell how that went: `ATE 0`, or another status.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs d /dev; $b mount -t proc p /proc; $b mount -t sysfs s /sys
MODULES
$b mkdir -p /disk; $b mount -t ext4 -o rw /dev/vda /disk
$b mkdir -p /w; $b mount -t tmpfs w /w
exec >/dev/ttyS0 2>&1
work=; $b grep -q workload /proc/cmdline && work=1
round() {
  k=$(($1 % 7)); f=/w/f$k; bad=
  case $(($1 % 5)) in
    1) $b dd if=/dev/zero of=$f conv=notrunc bs=64k count=6 2>/dev/null ;;
    3) $b rm -f $f ;;
    *) $b dd if=/dev/urandom of=$f bs=64k count=$((1 + $1 * 5 % 23)) 2>/dev/null ;;
  esac
  cd /w
  if [ -e f$k ]; then $b sha1sum f$k >s$k; else $b rm -f s$k; fi
  for s in s*; do [ -e $s ] && { $b sha1sum -c -s $s || bad="$bad $s"; }; done
  if [ -e f$k ]; then
    $b dd if=f$k of=/disk/d$k bs=4k conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    $b cmp f$k /disk/d$k || bad="$bad disk"
  fi
  cd /
  if [ -z "$bad" ]; then echo "LOAD $1 ok."; else echo "LOAD $1 BAD$bad."; fi
}
was=; n=0
while true; do
  n=$((n+1))
  id=$($b tr -d '\0' </sys/firmware/qemu_fw_cfg/by_name/opt/wrenn/restore/raw)
  if [ "$id" != "$was" ]; then
    was=$id; echo "$id" >>/disk/seen; $b sync
    case $id in fill=*)
      $b dd if=/dev/urandom of=/w/seed bs=64k count=80 2>/dev/null
      for i in $($b seq $((${id#fill=} / 5))); do $b cat /w/seed >>/w/fill; done
      echo "FILLED." ;;
    eat)
      $b dd if=/dev/urandom of=/disk/eaten bs=64k count=256 conv=fsync 2>/dev/null
      echo "ATE $?." ;;
    esac
  fi
  [ -n "$work" ] && round $n
  mac=$($b cat /sys/class/net/eth0/address 2>/dev/null)
  rnd=$($b od -An -tx8 -N8 /dev/urandom | $b tr -d ' ')
  echo "TICK $n rnd=$rnd id=$id disk=$($b tr '\n' ',' </disk/seen) mac=$mac."
  $b sleep 0.2
done
"#;

/// The kernel and the guest, made once per run of the tests.
pub struct Assets {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub disk: PathBuf,
    _dir: TempDir,
}

pub const DISK_BYTES: u64 = 64 << 20;

pub fn assets() -> &'static Assets {
    static ASSETS: OnceLock<Assets> = OnceLock::new();
    ASSETS.get_or_init(|| {
        let (kernel, _) = kernel();
        let dir = tempfile::tempdir().unwrap();
        let initramfs = dir.path().join("initramfs.cpio");
        Guest {
            init: INIT,
            modules: &[],
            programs: &[],
        }
        .pack(&initramfs);
        let content = dir.path().join("disk");
        fs::create_dir(&content).unwrap();
        fs::write(content.join("seen"), "made\n").unwrap();
        let disk = dir.path().join("disk.ext4");
        fs::File::create(&disk)
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        run(Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&content)
            .arg(&disk));
        Assets {
            kernel,
            initramfs,
            disk,
            _dir: dir,
        }
    })
}

/// What a guest is made of besides its kernel, busybox and [`MODULES`].
pub struct Guest<'a> {
    /// The script that is its first process; its line `MODULES` loads all modules.
    pub init: &'a str,
    /// More modules, in the order in which the kernel needs them.
    pub modules: &'a [&'a str],
    /// Programs, and what they are called in `/bin`.
    pub programs: &'a [(&'a Path, &'a str)],
}

impl Guest<'_> {
    /// Writes its initial file system.
    pub fn pack(&self, initramfs: &Path) {
        let (_, modules) = kernel();
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path();
        for folder in ["bin", "dev", "proc", "sys", "mods"] {
            fs::create_dir_all(tree.join(folder)).unwrap();
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("install busybox-static");
        fs::copy(busybox, tree.join("bin/busybox")).unwrap();
        for (program, name) in self.programs {
            fs::copy(program, tree.join("bin").join(name)).unwrap();
        }
        let mut load = String::new();
        for module in MODULES.iter().chain(self.modules) {
            let file = format!("{module}.ko");
            fs::copy(find(&modules, &file), tree.join("mods").join(&file)).unwrap();
            load += &format!("$b insmod /mods/{file}\n");
        }
        let init = tree.join("init");
        fs::write(&init, self.init.replace("MODULES\n", &load)).unwrap();
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
        run(Command::new("sh").current_dir(tree).arg("-c").arg(format!(
            "find . | {busybox} cpio -o -H newc >{} 2>/dev/null",
            initramfs.display()
        )));
    }
}

fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn find(tree: &Path, name: &str) -> PathBuf {
    let mut folders = vec![tree.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else if entry.file_name() == name {
                return entry.path();
            }
        }
    }
    panic!("no {name} in {}", tree.display());
}

/// Kernel and modules: named by `WRENN_TEST_KERNEL` and `WRENN_TEST_MODULES`, else unpacked
/// once from Debian's package into `target/test-assets`.
fn kernel() -> (PathBuf, PathBuf) {
    if let (Some(kernel), Some(modules)) = (
        std::env::var_os("WRENN_TEST_KERNEL"),
        std::env::var_os("WRENN_TEST_MODULES"),
    ) {
        return (kernel.into(), modules.into());
    }
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-assets");
    let tree = assets.join("kernel");
    if !tree.exists() {
        fs::create_dir_all(&assets).unwrap();
        let work = tempfile::tempdir_in(&assets).unwrap();
        let script = "set -e
            package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \\(linux-image-[^ ]*\\).*/\\1/p' | head -1)
            apt-get download -q \"$package\"
            dpkg-deb -x linux-image-*.deb tree";
        run(Command::new("sh")
            .current_dir(work.path())
            .args(["-c", script]));
        // Another run may have been faster.
        if let Err(error) = fs::rename(work.path().join("tree"), &tree) {
            assert!(tree.exists(), "{error}");
        }
    }
    let boot = fs::read_dir(tree.join("boot")).unwrap();
    let kernel = boot
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("vmlinuz"))
        .unwrap();
    (kernel, tree.join("lib/modules"))
}

/// The program that tests start as keeper and as agent.
pub fn harness() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let built = this.parent().unwrap().parent().unwrap();
    built.join("examples/harness")
}

pub fn vmm() -> QemuVmm {
    if std::env::var_os("WRENN_TEST_LOG").is_some() {
        // Another test may have been first.
        let _ = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(std::io::stderr)
            .try_init();
    }
    static CONFIG: OnceLock<QemuConfig> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let report = probe::host(None).unwrap();
        let choice = probe::choose(&report, None).unwrap();
        let launcher = Launcher {
            program: harness(),
            args: vec!["keeper".into()],
        };
        QemuConfig::from_report(&report, choice, launcher).unwrap()
    });
    QemuVmm::new(config.clone())
}

pub fn cmdline(vmm: &QemuVmm) -> String {
    format!(
        "console=ttyS0 quiet panic=1 reboot=t tsc_early_khz={}",
        vmm.info().fingerprint.tsc_khz
    )
}

pub fn identity(text: &str) -> Box<[u8; IDENTITY_BYTES]> {
    let mut page = Box::new([0; IDENTITY_BYTES]);
    page[..text.len()].copy_from_slice(text.as_bytes());
    page
}

/// A machine's folder with its top layer in it.
pub fn folder(parent: &Path, name: &str) -> PathBuf {
    let dir = parent.join(name);
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
    create_overlay(&dir.join("disk.qcow2"), DISK_BYTES).unwrap();
    dir
}

pub const SHAPE: Shape = Shape {
    vcpus: Vcpus(1),
    memory: MemoryMib(256),
};

/// Layers as QEMU's are.
pub fn qcow2(paths: &[PathBuf]) -> Vec<DiskLayer> {
    let layer = |path: &PathBuf| DiskLayer::new(LayerFormat::Qcow2, path);
    paths.iter().map(layer).collect()
}

/// The specification of a machine in `dir` on the layers of `layers`.
pub fn spec(vmm: &QemuVmm, dir: &Path, uid: u32, id: &str, layers: Vec<PathBuf>) -> MachineSpec {
    let assets = assets();
    MachineSpec {
        dir: dir.to_owned(),
        uid,
        gid: uid,
        shape: SHAPE,
        boot: BootFiles {
            kernel: assets.kernel.clone(),
            initramfs: assets.initramfs.clone(),
            cmdline: cmdline(vmm),
        },
        disk: DiskChain {
            base: assets.disk.clone(),
            layers: qcow2(&layers),
            top: dir.join("disk.qcow2"),
        },
        tap: None,
        mac: [2, 0xfc, 0, 0, 0, 5],
        identity: identity(id),
        disk_limits: DiskLimits::default(),
        companions: Vec::new(),
    }
}

/// Waits for a console line that holds `words`, and returns the newest one.
pub async fn console_line(machine: &Arc<dyn Machine>, words: &str) -> String {
    let began = Instant::now();
    loop {
        let tail = String::from_utf8_lossy(&machine.console_tail(16 << 10).unwrap()).into_owned();
        let whole = tail.rsplit_once('\n').map_or("", |(lines, _)| lines);
        if let Some(line) = whole.lines().rev().find(|line| line.contains(words)) {
            return line.to_owned();
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "no {words:?} in {tail}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn tick(line: &str) -> u32 {
    let number = line.split_once("TICK ").unwrap().1.split(' ').next();
    number.unwrap().parse().unwrap()
}

/// A frozen machine.
pub struct Template {
    pub shape: Shape,
    pub memory: Arc<SealedMemory>,
    pub state: PathBuf,
    pub layer: PathBuf,
    pub tick: u32,
}

impl Template {
    /// Boots a machine until it has printed a few lines, and freezes it.
    pub async fn make(vmm: &QemuVmm, parent: &Path, uid: u32, tap: Option<OwnedFd>) -> Template {
        Template::shaped(vmm, parent, uid, tap, SHAPE, "").await
    }

    /// The same with another shape, and more on its command line.
    pub async fn shaped(
        vmm: &QemuVmm,
        parent: &Path,
        uid: u32,
        tap: Option<OwnedFd>,
        shape: Shape,
        words: &str,
    ) -> Template {
        let dir = folder(parent, "template");
        let memory = Arc::new(MemoryFile::create(shape.memory.bytes()).unwrap());
        let began = Instant::now();
        let mut machine = spec(vmm, &dir, uid, "template", Vec::new());
        machine.shape = shape;
        machine.boot.cmdline = format!("{} {words}", machine.boot.cmdline);
        machine.tap = tap;
        let boot = BootSpec {
            machine,
            memory: memory.clone(),
        };
        let machine = vmm.boot(boot).await.unwrap();
        let line = console_line(&machine, "TICK 3 ").await;
        println!("booted to its third line in {:?}: {line}", began.elapsed());
        assert!(line.contains("id=template disk=made,template,"), "{line}");
        assert!(memory.seal().is_err(), "sealed under a running machine");
        let state = dir.join("state");
        let out = fs::File::create_new(&state).unwrap();
        let saved = machine.save_state(out).await.unwrap();
        println!("saved {saved:?}");
        assert!(saved.bytes > 10_000 && saved.bytes < 1 << 20, "{saved:?}");
        let tick = tick(&console_line(&machine, "TICK").await);
        machine.kill().await.unwrap();
        Template {
            shape,
            memory: Arc::new(memory.seal().unwrap()),
            state,
            layer: dir.join("disk.qcow2"),
            tick,
        }
    }

    /// What restores a clone with its own top layer in `dir`.
    pub fn clone_spec(&self, vmm: &QemuVmm, dir: &Path, uid: u32, id: &str) -> RestoreSpec {
        let mut machine = spec(vmm, dir, uid, id, vec![self.layer.clone()]);
        machine.shape = self.shape;
        // A clone needs no kernel: it has one in its memory.
        machine.boot.kernel = "/nonexistent".into();
        machine.boot.initramfs = "/nonexistent".into();
        RestoreSpec {
            machine,
            memory: self.memory.clone(),
            state: fs::File::open(&self.state).unwrap(),
        }
    }
}
