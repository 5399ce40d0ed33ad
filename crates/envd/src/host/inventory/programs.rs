//! The programs that run and the ports they listen on.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use crate::ports::table::Tables;

/// Characters of a command line that are told.
const COMMAND: usize = 1000;
/// `PF_KTHREAD` of the flags in `/proc/PID/stat`.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// What runs.
#[derive(Debug, Serialize)]
pub(super) struct Running {
    processes: Vec<Process>,
    ports: Vec<Port>,
}

#[derive(Debug, Serialize, PartialEq, Eq)]
struct Process {
    pid: u32,
    /// When it was started, in ticks of this kernel's life: with the pid it names the process.
    started: u64,
    uid: u32,
    command: String,
}

#[derive(Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
struct Port {
    port: u16,
    address: IpAddr,
}

/// What users have running: without the kernel's threads, init and this agent, and the sockets
/// it has itself.
pub(super) fn running(own_port: u16) -> io::Result<Running> {
    let me = std::process::id();
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if pid != 1 && pid != me {
            processes.extend(process(pid, &entry.path()));
        }
    }
    processes.sort_by_key(|process| process.pid);
    let own = own_sockets()?;
    let mut tables = Tables::default();
    let listeners = tables.read()?;
    let mut ports: Vec<Port> = listeners
        .filter(|one| one.address.port() != own_port && !own.contains(&one.inode))
        .map(|one| Port {
            port: one.address.port(),
            address: one.address.ip(),
        })
        .collect();
    ports.sort_unstable();
    ports.dedup();
    Ok(Running { processes, ports })
}

/// `None` for the kernel's, and for one that has ended.
fn process(pid: u32, dir: &Path) -> Option<Process> {
    let stat = fs::read(dir.join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (name, started) = name_and_start(&stat)?;
    let line = fs::read(dir.join("cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let line = line.trim_end_matches('\0').replace('\0', " ");
    let command = match line.is_empty() {
        true => format!("[{name}]"),
        false => line.chars().take(COMMAND).collect(),
    };
    Some(Process {
        pid,
        started,
        uid: fs::metadata(dir).ok()?.uid(),
        command,
    })
}

/// Of a line of `/proc/PID/stat`; see proc_pid_stat(5).
fn name_and_start(stat: &str) -> Option<(&str, u64)> {
    // The name may hold anything, blanks and parentheses included.
    let (before, rest) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let flags: u64 = fields.nth(5)?.parse().ok()?;
    let started = fields.nth(12)?.parse().ok()?;
    let of_users = flags & KERNEL_THREAD == 0 && !matches!(state, "Z" | "X");
    of_users.then_some((name, started))
}

/// Inodes of the sockets of this process, relays among them.
fn own_sockets() -> io::Result<HashSet<u64>> {
    let mut own = HashSet::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let Ok(target) = fs::read_link(entry?.path()) else {
            continue;
        };
        let inode: Option<u64> = target.to_str().and_then(|target| {
            let inode = target.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse().ok()
        });
        own.extend(inode);
    }
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_stat_line_is_read_whatever_the_name() {
        let line = |name: &str, state: &str, flags: u64| {
            format!("7 ({name}) {state} 1 7 7 0 -1 {flags} 1 2 3 4 5 6 7 8 20 0 1 0 4242 100 0")
        };
        let usual = line("a) (b", "S", 0x40);
        assert_eq!(name_and_start(&usual), Some(("a) (b", 4242)));
        assert_eq!(name_and_start(&line("kworker", "I", KERNEL_THREAD)), None);
        assert_eq!(name_and_start(&line("gone", "Z", 0)), None);
        assert_eq!(name_and_start("nonsense"), None);
    }

    #[test]
    fn what_runs_is_found_and_we_are_not() {
        let mut sleeping = Command::new("sleep")
            .arg("4321")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let own = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = own.local_addr().unwrap().port();
        let running = running(1).unwrap();
        let found = running
            .processes
            .iter()
            .find(|one| one.pid == sleeping.id());
        sleeping.kill().unwrap();
        sleeping.wait().unwrap();
        // Between fork and exec it still has our name.
        assert!(found.is_some_and(|one| one.started > 0 && !one.command.is_empty()));
        assert!(
            !running
                .processes
                .iter()
                .any(|one| one.pid == std::process::id())
        );
        assert!(!running.ports.iter().any(|one| one.port == port));
    }
}
