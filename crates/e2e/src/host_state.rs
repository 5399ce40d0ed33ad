//! What a server and its sandboxes occupy on this host, so that before and after can be
//! compared.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::paths;

/// Counts by kind. Which machine waits in the pool, and so every name, changes all the
/// time; how many there are of each kind must not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostState(BTreeMap<String, usize>);

impl HostState {
    /// Looks at everything once.
    pub fn read(data_dir: &Path, server: Option<u32>) -> HostState {
        let mut state = HostState::default();
        // Of this data folder alone: another server may run, or have run, on this host.
        let prefix = wrenn_host::network_prefix(data_dir);
        let namespaces = names(Path::new("/run/netns"));
        state.add(
            "namespace",
            namespaces.iter().filter(|n| n.starts_with(&prefix)).count(),
        );
        state.count_links(&prefix);
        state.count_processes();
        state.count_mounts(data_dir, &prefix);
        state.count_loop_devices(data_dir);
        state.count_firewall_tables(&prefix);
        state.count_control_groups(&prefix);
        state.count_files(data_dir, data_dir);
        if let Some(pid) = server {
            state.count_open_files(pid);
        }
        state
    }

    /// By what they are: `socket`, `anon_inode:[pidfd]`, a path.
    fn count_open_files(&mut self, pid: u32) {
        let entries = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        for entry in entries.flatten() {
            // One that was closed meanwhile is none.
            let Ok(target) = fs::read_link(entry.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            let kind = match target.split_once(":[") {
                // An inode's number says nothing.
                Some((kind, _)) if kind != "anon_inode" => kind,
                _ => &target,
            };
            // Nor does the number of one server's log.
            let kind: String = kind.chars().filter(|c| !c.is_ascii_digit()).collect();
            self.add(format!("open file of the server: {kind}"), 1);
        }
    }

    /// Looks until nothing has changed for five seconds: the pool is full again, and what is
    /// taken down in the background is gone.
    pub async fn settled(data_dir: &Path, server: Option<u32>, patience: Duration) -> HostState {
        let start = Instant::now();
        let mut last = HostState::read(data_dir, server);
        let mut same_since = Instant::now();
        while same_since.elapsed() < Duration::from_secs(5) {
            assert!(
                start.elapsed() < patience,
                "the host does not come to rest:\n{last}"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = HostState::read(data_dir, server);
            if now != last {
                same_since = Instant::now();
                last = now;
            }
        }
        last
    }

    /// Waits until the host is as it was at `before`, and fails with the difference when
    /// it is not by the end of `patience`.
    pub async fn wait_for_return(
        before: &HostState,
        data_dir: &Path,
        server: Option<u32>,
        patience: Duration,
    ) {
        let start = Instant::now();
        loop {
            let now = HostState::read(data_dir, server);
            if now == *before {
                return;
            }
            assert!(
                start.elapsed() < patience,
                "not as before after {patience:?}:\n{}",
                before.difference(&now)
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// How many of a kind there are.
    pub fn count(&self, kind: &str) -> usize {
        self.0.get(kind).copied().unwrap_or(0)
    }

    /// Fails unless nothing runs or is configured: files may stay.
    #[track_caller]
    pub fn expect_nothing_alive(&self) {
        for kind in [
            "namespace",
            "link",
            "process wrenn",
            "process qemu",
            "mount",
            "loop device",
            "firewall table",
            "control group",
        ] {
            assert_eq!(self.count(kind), 0, "{kind} left over:\n{self}");
        }
    }

    /// One line for each kind that differs.
    pub fn difference(&self, other: &HostState) -> String {
        let kinds: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let differs = |kind: &&&String| self.count(kind) != other.count(kind);
        let lines = kinds.iter().filter(differs);
        lines
            .map(|kind| format!("  {kind}: {} → {}\n", self.count(kind), other.count(kind)))
            .collect()
    }

    fn add(&mut self, kind: impl Into<String>, n: usize) {
        if n > 0 {
            *self.0.entry(kind.into()).or_default() += n;
        }
    }

    /// Asked of the kernel: what `/sys` shows depends on where that was mounted.
    fn count_links(&mut self, prefix: &str) {
        let listed = output("ip", &["-oneline", "link", "show"]);
        // "7: wrenn-3@if2: <BROADCAST…"
        let links = listed
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1));
        self.add(
            "link",
            links.filter(|name| name.starts_with(prefix)).count(),
        );
    }

    /// The server, keepers and whatever a keeper started, known by their program's file.
    fn count_processes(&mut self) {
        let wrenn = paths::wrenn_binary()
            .canonicalize()
            .expect("the path of wrenn");
        let mut parents = Vec::new();
        let mut others = Vec::new();
        for name in names(Path::new("/proc")) {
            let Ok(pid) = name.parse::<u32>() else {
                continue;
            };
            // A process may end while it is looked at.
            let Ok(exe) = fs::read_link(format!("/proc/{pid}/exe")) else {
                continue;
            };
            // A binary that was built anew since it was started.
            let exe = exe
                .to_string_lossy()
                .trim_end_matches(" (deleted)")
                .to_owned();
            if Path::new(&exe) == wrenn {
                self.add("process wrenn", 1);
                parents.push(pid);
            } else {
                others.push((pid, exe.rsplit('/').next().unwrap_or_default().to_owned()));
            }
        }
        for (pid, program) in others {
            if parent(pid).is_some_and(|parent| parents.contains(&parent)) {
                let kind = if program.starts_with("qemu") {
                    "qemu"
                } else {
                    program.as_str()
                };
                self.add(format!("process {kind}"), 1);
            }
        }
    }

    fn count_mounts(&mut self, data_dir: &Path, prefix: &str) {
        let data_dir = data_dir.to_string_lossy().into_owned();
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").expect("the mounts of this process");
        let netns = format!("/netns/{prefix}");
        let ours = |line: &&str| line.contains(&data_dir) || line.contains(&netns);
        self.add("mount", mounts.lines().filter(ours).count());
    }

    fn count_loop_devices(&mut self, data_dir: &Path) {
        let data_dir = data_dir.to_string_lossy().into_owned();
        let blocks = Path::new("/sys/block");
        let backing =
            |name: String| fs::read_to_string(blocks.join(name).join("loop/backing_file")).ok();
        let files = names(blocks).into_iter().filter_map(backing);
        self.add(
            "loop device",
            files.filter(|file| file.contains(&data_dir)).count(),
        );
    }

    fn count_firewall_tables(&mut self, prefix: &str) {
        let tables = output("nft", &["list", "tables"]);
        let tables = tables
            .lines()
            .filter_map(|line| line.split_whitespace().last());
        self.add(
            "firewall table",
            tables.filter(|name| name.starts_with(prefix)).count(),
        );
    }

    /// Of machines, in whichever version this host has.
    fn count_control_groups(&mut self, prefix: &str) {
        let mounted = Path::new("/sys/fs/cgroup");
        for tree in ["", "cpu", "memory", "pids"] {
            let machines = names(&mounted.join(tree).join(prefix));
            let machines = machines.iter().filter(|name| name.starts_with("m-"));
            self.add("control group", machines.count());
        }
    }

    /// Every file by its place, ids and digests left out.
    fn count_files(&mut self, data_dir: &Path, folder: &Path) {
        let Ok(entries) = fs::read_dir(folder) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let place = path.strip_prefix(data_dir).unwrap_or(&path);
            // Packages and trees that image builds keep: many, and not a sandbox's.
            if place == Path::new("images/cache") {
                continue;
            }
            let shape: Vec<_> = place
                .iter()
                .map(|part| without_ids(&part.to_string_lossy()))
                .collect();
            self.add(format!("file {}", shape.join("/")), 1);
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.count_files(data_dir, &path);
            }
        }
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(kind, n)| writeln!(f, "  {kind}: {n}"))
    }
}

fn output(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets and may hold anything.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

/// `sb-0192f0c8-…` and `sha256-ab12…` become `sb-*` and `sha256-*`, numbers `*`.
fn without_ids(name: &str) -> String {
    let is_id = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_hexdigit())
            && (part.len() >= 4 || part.chars().all(|c| c.is_ascii_digit()))
    };
    let mut kept: Vec<&str> = Vec::new();
    for part in name.split('-') {
        let part = if is_id(part) { "*" } else { part };
        if !(part == "*" && kept.last() == Some(&"*")) {
            kept.push(part);
        }
    }
    kept.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_change_count_as_one_kind() {
        assert_eq!(
            without_ids("sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00"),
            "sb-*"
        );
        assert_eq!(without_ids("sha256-00ff00ff"), "sha256-*");
        assert_eq!(without_ids("12"), "*");
        for name in [
            "console.log",
            "qmp.sock",
            "wrenn.db-wal",
            "minimal",
            "names",
        ] {
            assert_eq!(without_ids(name), name);
        }
    }

    #[test]
    fn a_difference_is_said_by_kind() {
        let (mut before, mut after) = (HostState::default(), HostState::default());
        before.add("mount", 1);
        after.add("mount", 3);
        after.add("link", 1);
        before.add("namespace", 2);
        after.add("namespace", 2);
        assert_eq!(before.difference(&after), "  link: 0 → 1\n  mount: 1 → 3\n");
        assert_eq!(before.difference(&before), "");
    }

    #[test]
    fn files_of_a_folder_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("machines/sb-0192f0c8-6a3e")).unwrap();
        fs::create_dir_all(folder.path().join("images/cache/packages")).unwrap();
        fs::remove_dir(folder.path().join("images/cache/packages")).unwrap();
        let (before, mut after) = (HostState::default(), HostState::default());
        after.count_files(folder.path(), folder.path());
        let difference = before
            .difference(&after)
            .replace("  file images: 0 → 1\n", "");
        assert_eq!(
            difference,
            "  file machines: 0 → 1\n  file machines/sb-*: 0 → 1\n"
        );
    }
}
