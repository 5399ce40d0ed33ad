//! What a guest can do to others by what it shares with them: memory and disk of the template.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use wrenn_e2e::Server;

/// What root in a guest tries: to write to the physical memory and to the ports of its devices,
/// to throw away and to overwrite what is on its disk, to have memory taken back, to fill all
/// the memory it has. Each may fail, and the last two end the guest.
const ATTACKS: &str = r#"
mknod /root/mem c 1 1; mknod /root/port c 1 4
python3 - <<'PY'
import os
def write(path, at, data):
    try:
        fd = os.open(path, os.O_RDWR)
        os.lseek(fd, at, os.SEEK_SET)
        os.write(fd, data)
        print('written', path, hex(at))
    except OSError as error:
        print(path, hex(at), error)
for at in (0, 0xf0000, 0x100000, 0x1000000, 0x1fff0000):
    write('/root/mem', at, b'\xee' * 4096)
# fw_cfg by its selector and its data register, then its DMA address.
for port in (0x510, 0x511, 0x514, 0x518):
    write('/root/port', port, b'\xee\xee\xee\xee')
for root, _, names in os.walk('/sys/firmware/qemu_fw_cfg'):
    for name in names:
        write(os.path.join(root, name), 0, b'\xee' * 64)
PY
for module in virtio_balloon virtio_mem virtio_pmem vhost_vsock; do modprobe $module; done
fstrim -v /; blkdiscard -f /dev/vda; blkdiscard -f -z -o 0 -l 1048576 /dev/vda
echo 3 > /proc/sys/vm/drop_caches
python3 -c "
hoard = []
try:
    for _ in range(56): hoard.append(bytearray(b'\xee' * (8 << 20)))
except MemoryError: pass
print(len(hoard), 'pieces of memory filled')"
dd if=/dev/zero of=/dev/vda bs=1M count=128 oflag=direct conv=notrunc
echo c > /proc/sysrq-trigger
"#;

pub(crate) async fn g43_a_hostile_guest_changes_nothing_that_others_share(server: &Server) {
    let api = server.api();
    let (hostile, other) = (api.create(&json!({})).await, api.create(&json!({})).await);
    let memory = shared_memory(server, &hostile);
    assert!(!memory.is_empty(), "a machine has its template's memory");
    let files = template_files(server.data_dir());
    let before = digests(memory.iter().chain(&files));

    let body = json!({
        "cmd": "sudo", "args": ["/bin/bash", "-c", ATTACKS], "timeout_sec": 40,
    });
    let path = format!("/v1/sandboxes/{hostile}/exec");
    // The guest does not live to its end.
    let attacked = tokio::time::timeout(Duration::from_secs(60), api.post(&path, &body)).await;
    eprintln!(
        "attacks: {}",
        attacked.map_or("no answer".into(), |answer| answer.describe())
    );

    // The other clone of the same memory and disk works on, and so does one that is new. The
    // template's memory is the same file in all of them: it is looked at through theirs.
    let fresh = api.create(&json!({})).await;
    for id in [&other, &fresh] {
        let said = api.exec(
            id,
            "python3",
            &["-c", "import json, subprocess; print(6 * 7)"],
        );
        assert_eq!(said.await["stdout"], "42\n");
        let memory = shared_memory(server, id);
        assert!(
            digests(memory.iter().chain(&files)) == before,
            "what is shared has changed"
        );
        api.destroy(id).await;
    }
    api.destroy(&hostile).await;
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
    paths.filter(is_memory).collect()
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
