//! A machine's memory as the guest sees it, told by QEMU: a second opinion on what the
//! driver reads and writes from outside.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use wrenn_types::Shape;

const PAGE: usize = 4096;

/// Everything the guest can read: its memory, with the firmware segment in it, and the
/// firmware at the top of the address space.
#[derive(PartialEq)]
pub struct View(Vec<u8>);

impl View {
    /// Of the stopped machine in `dir`, to which nobody may be connected.
    pub async fn of(dir: &Path, shape: Shape) -> View {
        let dir = dir.to_owned();
        // Elsewhere, since a connection that was dropped here is closed by this thread.
        let asking = tokio::task::spawn_blocking(move || View::ask(&dir, shape));
        asking.await.unwrap()
    }

    fn ask(dir: &Path, shape: Shape) -> View {
        let mut qmp = Qmp::connect(dir);
        let mut all = Vec::new();
        for (from, size) in [(0u64, shape.memory.bytes()), (0xFFFF_0000, 0x1_0000)] {
            // The jail's root is a folder of the machine's: what is made in it is in the jail
            // too. QEMU may make nothing there itself.
            let file = dir.join("jail/dump");
            fs::write(&file, b"").unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
            qmp.ask(&serde_json::json!({
                "execute": "pmemsave",
                "arguments": { "val": from, "size": size, "filename": "/dump" },
            }));
            let bytes = fs::read(&file).unwrap();
            fs::remove_file(&file).unwrap();
            assert_eq!(bytes.len() as u64, size);
            all.extend(bytes);
        }
        View(all)
    }

    /// Guest pages that differ; the firmware at the top follows the memory.
    pub fn differing(&self, other: &View) -> Vec<String> {
        assert_eq!(self.0.len(), other.0.len());
        let pages = self.0.chunks(PAGE).zip(other.0.chunks(PAGE)).enumerate();
        pages
            .filter(|(_, (ours, theirs))| ours != theirs)
            .map(|(page, _)| format!("{:#x}", page * PAGE))
            .collect()
    }

    pub fn page(&self, page: u64) -> &[u8] {
        &self.0[page as usize * PAGE..][..PAGE]
    }

    pub fn firmware(&self) -> &[u8] {
        &self.0[0xF0000..0x10_0000]
    }
}

/// The simplest client of QEMU's control socket.
pub struct Qmp {
    write: UnixStream,
    read: BufReader<UnixStream>,
}

impl Qmp {
    pub fn connect(dir: &Path) -> Qmp {
        let write = UnixStream::connect(dir.join("qmp.sock")).unwrap();
        let patience = Some(Duration::from_secs(20));
        write.set_read_timeout(patience).unwrap();
        let read = BufReader::new(write.try_clone().unwrap());
        let mut qmp = Qmp { write, read };
        qmp.ask(&serde_json::json!({ "execute": "qmp_capabilities" }));
        qmp
    }

    /// Runs a command and returns its answer.
    pub fn ask(&mut self, command: &serde_json::Value) -> serde_json::Value {
        writeln!(self.write, "{command}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.read.read_line(&mut line).unwrap() > 0, "closed");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert!(line.get("error").is_none(), "{line}");
            if let Some(answer) = line.get("return") {
                return answer.clone();
            }
        }
    }
}
