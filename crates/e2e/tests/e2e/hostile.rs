//! What a guest can do to others by what it shares with them: memory and disk of the template.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use wrenn_e2e::Server;

/// What root in a guest tries: to write to the physical memory and to the ports of its devices,
/// to throw away and to overwrite what is on its disk, to fill the memory it has, and in the end to
/// bring down its kernel.
const ATTACKS: &str = r#"
mknod /root/mem c 1 1; mknod /root/port c 1 4
python3 - <<'PY'
import os
written = []
def write(path, at, data):
    try:
        fd = os.open(path, os.O_RDWR)
        os.lseek(fd, at, os.SEEK_SET)
        os.write(fd, data)
        written.append(f'{path}:{at:x}')
    except OSError:
        pass
for at in (0, 0xf0000, 0x100000, 0x1000000, 0x1fff0000):
    write('/root/mem', at, b'\xee' * 4096)
# fw_cfg by its selector and its data register, then its DMA address.
for port in (0x510, 0x511, 0x514, 0x518):
    write('/root/port', port, b'\xee\xee\xee\xee')
for root, _, names in os.walk('/sys/firmware/qemu_fw_cfg'):
    for name in names:
        write(os.path.join(root, name), 0, b'\xee' * 64)
print('written', *written)
hoard = [bytearray(b'\xee' * (8 << 20)) for _ in range(40)]
print(len(hoard), 'pieces of memory filled')
PY
fstrim -v /; blkdiscard -f /dev/vda; echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/zero of=/dev/vda bs=1M count=128 oflag=direct conv=notrunc && echo disk overwritten
(sleep 5; echo c > /proc/sysrq-trigger) < /dev/null > /dev/null 2>&1 &
"#;

pub(crate) async fn g43_a_hostile_guest_changes_nothing_that_others_share(server: &Server) {
    let api = server.api();
    let (hostile, other) = (api.create(&json!({})).await, api.create(&json!({})).await);
    let memory = shared_memory(server, &hostile);
    assert!(!memory.is_empty(), "a machine has its template's memory");
    let files = template_files(server.data_dir());
    let before = digests(memory.iter().chain(&files));

    // Its machine dies before the program has ended, and that is told at once.
    let attack = [
        "sandbox",
        "exec",
        &hostile,
        "--",
        "sudo",
        "/bin/bash",
        "-c",
        ATTACKS,
    ];
    let attacked = server.cli().run(&attack).await;
    let attacked = attacked.expect_code(125);
    let attacked = attacked.expect_stderr(&["died while this was under way", "sandbox why"]);
    let said = &attacked.stdout;
    // What is below 1 MiB can be written, the firmware's copy with it.
    for done in [
        "/root/mem:f0000",
        "40 pieces of memory filled",
        "trimmed",
        "disk overwritten",
    ] {
        assert!(said.contains(done), "`{done}` was not done: {attacked:?}");
    }
    let until = Instant::now() + Duration::from_secs(30);
    while api.is_running(&hostile).await {
        assert!(Instant::now() < until, "the hostile guest runs on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // The template's memory is the same file in all its clones: it is looked at through another's.
    let memory = shared_memory(server, &other);
    let after = digests(memory.iter().chain(&files));
    assert!(after == before, "what is shared has changed");
    // That clone works on, and so does one that is new.
    let fresh = api.create(&json!({})).await;
    for id in [&other, &fresh] {
        let said = api.exec(
            id,
            "python3",
            &["-c", "import json, subprocess; print(6 * 7)"],
        );
        assert_eq!(said.await["stdout"], "42\n");
        api.destroy(id).await;
    }
}

/// The memory files that a sandbox's machine has mapped.
fn shared_memory(server: &Server, sandbox: &str) -> Vec<PathBuf> {
    let folder = server.machine_folder(sandbox).expect("a machine");
    let record = fs::read(folder.join("vm/machine.json")).expect("its processes");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    let vmm = record["pids"]["vmm"]["pid"].as_u64().expect("its monitor");
    let descriptors = fs::read_dir(format!("/proc/{vmm}/fd")).expect("its descriptors");
    let paths = descriptors.map(|entry| entry.expect("a descriptor").path());
    let is_memory = |path: &PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:wrenn-memory")
    };
    // QEMU has it open more than once.
    paths.filter(is_memory).take(1).collect()
}

/// What templates consist of.
fn template_files(data_dir: &Path) -> Vec<PathBuf> {
    let templates = fs::read_dir(data_dir.join("templates")).expect("templates");
    let folders = templates.map(|entry| entry.expect("a template").path());
    let mut files: Vec<_> = folders
        .flat_map(|folder| fs::read_dir(folder).expect("its files"))
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    assert!(files.len() >= 4, "{files:?}");
    files
}

fn digests<'a>(files: impl Iterator<Item = &'a PathBuf>) -> Vec<[u8; 32]> {
    files.map(|file| digest(file)).collect()
}

fn digest(file: &Path) -> [u8; 32] {
    let mut file = File::open(file).expect("a file");
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).expect("its bytes") {
            0 => return hasher.finalize().into(),
            count => hasher.update(&buffer[..count]),
        }
    }
}
