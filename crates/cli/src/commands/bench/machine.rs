//! What sandboxes cost the host, read from `/proc` on the host itself.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

/// `vm/machine.json` in a machine's folder, as far as it is needed here.
#[derive(Debug, Deserialize)]
struct Machine {
    pids: Pids,
}

#[derive(Debug, Deserialize)]
struct Pids {
    keeper: Process,
    vmm: Process,
}

#[derive(Debug, Clone, Copy, Deserialize)]
struct Process {
    pid: u32,
}

/// `sandbox.json` beside it, which a machine of the pool has not.
#[derive(Debug, Deserialize)]
struct Owner {
    sandbox: String,
}

/// The processes behind one sandbox.
#[derive(Debug, Clone, Copy)]
pub(super) struct Processes([u32; 2]);

/// What they have used so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Use {
    /// Bytes of memory that no other process shares.
    pub(super) private_bytes: u64,
    /// Processor time in seconds.
    pub(super) cpu_seconds: f64,
}

/// The processes of these sandboxes; an error where this is not their host or not root.
pub(super) fn find(data_dir: &Path, sandboxes: &[String]) -> io::Result<Vec<Processes>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data_dir.join("machines"))? {
        let folder = entry?.path();
        let Ok(owner) = fs::read(folder.join("sandbox.json")) else {
            continue;
        };
        let owner: Owner = serde_json::from_slice(&owner)?;
        if sandboxes.contains(&owner.sandbox) {
            let machine: Machine =
                serde_json::from_slice(&fs::read(folder.join("vm/machine.json"))?)?;
            found.push(Processes([machine.pids.vmm.pid, machine.pids.keeper.pid]));
        }
    }
    if found.len() != sandboxes.len() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!(
                "{} of {} machines are in {}",
                found.len(),
                sandboxes.len(),
                data_dir.display()
            ),
        ));
    }
    Ok(found)
}

impl Processes {
    /// What they have used until now.
    pub(super) fn measure(self) -> io::Result<Use> {
        let mut used = Use {
            private_bytes: 0,
            cpu_seconds: 0.0,
        };
        for pid in self.0 {
            used.private_bytes +=
                private_bytes(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?);
            let ticks =
                cpu_ticks(&fs::read_to_string(format!("/proc/{pid}/stat"))?).ok_or_else(|| {
                    io::Error::other(format!("/proc/{pid}/stat is not as proc(5) says"))
                })?;
            used.cpu_seconds += ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        }
        Ok(used)
    }
}

fn private_bytes(smaps_rollup: &str) -> u64 {
    let kib: u64 = smaps_rollup
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    kib << 10
}

/// utime and stime, fields 14 and 15; the name in field 2 may hold anything, so they are
/// counted from its end.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Bytes of memory that the keeper of each machine of a data folder has for itself: it serves
/// the sandbox's resolver, too.
pub(super) fn keepers(data_dir: &Path) -> io::Result<Vec<f64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(data_dir.join("machines"))? {
        let machine = fs::read(entry?.path().join("vm/machine.json"))?;
        let machine: Machine = serde_json::from_slice(&machine)?;
        let pid = machine.pids.keeper.pid;
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        found.push(private_bytes(&rollup) as f64);
    }
    Ok(found)
}

/// A template's manifest, as far as it is needed here.
#[derive(Debug, Deserialize)]
struct Manifest {
    name: String,
    cold_boot_ms: u64,
}

/// How long the templates of this name took to boot cold, in milliseconds.
pub(super) fn cold_boots(data_dir: &Path, template: &str) -> io::Result<Vec<f64>> {
    let mut boots = Vec::new();
    for entry in fs::read_dir(data_dir.join("templates"))? {
        let Ok(text) = fs::read(entry?.path().join("manifest.json")) else {
            continue;
        };
        let manifest: Manifest = serde_json::from_slice(&text)?;
        if manifest.name == template {
            boots.push(manifest.cold_boot_ms as f64);
        }
    }
    Ok(boots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read_as_its_manual_says() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 12345 0 0";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("7 (x"), None);
        let rollup = "Rss: 9 kB\nPrivate_Clean:  4 kB\nPrivate_Dirty: 12 kB\nShared_Dirty: 5 kB\n";
        assert_eq!(private_bytes(rollup), 16 << 10);
        let me = Processes([std::process::id(); 2]).measure().unwrap();
        assert!(me.private_bytes > 0);
    }

    #[test]
    fn a_machine_is_found_by_its_owner_whatever_its_folder_is_called() {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("machines/pool-1");
        fs::create_dir_all(folder.join("vm")).unwrap();
        fs::write(
            folder.join("sandbox.json"),
            r#"{"version":1,"sandbox":"sb-1"}"#,
        )
        .unwrap();
        let machine = r#"{"version":1,"bootId":"x","pids":{"keeper":{"pid":2,"startTime":1},"vmm":{"pid":3,"startTime":1}}}"#;
        fs::write(folder.join("vm/machine.json"), machine).unwrap();
        fs::create_dir(data.path().join("machines/waiting")).unwrap();
        assert_eq!(
            find(data.path(), &["sb-1".to_owned()]).unwrap()[0].0,
            [3, 2]
        );
        assert!(find(data.path(), &["sb-2".to_owned()]).is_err());
    }
}
