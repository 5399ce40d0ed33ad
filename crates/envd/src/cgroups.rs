//! The guest's control groups: who gets how much, and what a freeze stops.
//!
//! `ptys` and `user` hold what people start, `forwarders` what we need beside ourselves.
//! A child is born in its group (see [`crate::sys`]). Without cgroup v2 every operation is
//! a no-op that was logged once.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Where init mounts cgroup v2.
pub const ROOT: &str = "/sys/fs/cgroup";
/// What people do in a sandbox should be frozen well within this time.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// Where a program belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Programs with a terminal: people wait for them.
    Ptys,
    /// Our own helpers.
    Forwarders,
    /// All other programs.
    User,
}

impl Group {
    const ALL: [Group; 3] = [Group::Ptys, Group::Forwarders, Group::User];
    /// The groups that a freeze stops.
    const FROZEN: [Group; 2] = [Group::Ptys, Group::User];

    fn name(self) -> &'static str {
        match self {
            Group::Ptys => "ptys",
            Group::Forwarders => "forwarders",
            Group::User => "user",
        }
    }

    /// Files and values; `memory_total` in bytes.
    fn limits(self, memory_total: u64) -> Vec<(&'static str, String)> {
        match self {
            Group::Ptys => vec![("cpu.weight", "200".into())],
            Group::Forwarders => vec![
                ("cpu.weight", "150".into()),
                ("memory.min", (5u64 << 20).to_string()),
                ("memory.low", (8u64 << 20).to_string()),
            ],
            Group::User => {
                let spare = (memory_total / 8).min(128 << 20);
                vec![
                    ("cpu.weight", "50".into()),
                    (
                        "memory.high",
                        memory_total.saturating_sub(spare).to_string(),
                    ),
                ]
            }
        }
    }
}

/// Why the groups could not be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A control file.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Some task does not stop, most likely in uninterruptible I/O.
    #[error("control group {0} did not freeze within {FREEZE_LIMIT:?}")]
    Slow(&'static str),
}

/// The groups, or none.
#[derive(Debug, Default)]
pub struct Cgroups {
    groups: Vec<(Group, PathBuf, File)>,
}

impl Cgroups {
    /// No groups: outside a VM.
    pub fn none() -> Cgroups {
        Cgroups::default()
    }

    /// Makes the groups below `root` and sets their limits. What the kernel does not offer
    /// is logged and left out.
    pub fn set_up(root: &Path) -> Cgroups {
        if !root.join("cgroup.controllers").exists() {
            tracing::warn!(root = %root.display(), "no cgroup v2: programs run without groups");
            return Cgroups::none();
        }
        for controller in ["+cpu", "+memory", "+io", "+pids"] {
            if let Err(error) = fs::write(root.join("cgroup.subtree_control"), controller) {
                tracing::warn!(controller, %error, "cannot enable a cgroup controller");
            }
        }
        let memory = memory_total();
        let mut groups = Vec::new();
        for group in Group::ALL {
            let path = root.join(group.name());
            let made = match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                _ => File::open(&path),
            };
            match made {
                Ok(folder) => {
                    for (file, value) in group.limits(memory) {
                        if let Err(error) = fs::write(path.join(file), &value) {
                            tracing::warn!(group = group.name(), file, %error, "cannot set a cgroup limit");
                        }
                    }
                    groups.push((group, path, folder));
                }
                Err(error) => tracing::warn!(group = group.name(), %error, "cannot make a cgroup"),
            }
        }
        Cgroups { groups }
    }

    /// The folder of a group, for a child to be born in.
    pub fn folder(&self, group: Group) -> Option<BorrowedFd<'_>> {
        self.groups
            .iter()
            .find(|(g, ..)| *g == group)
            .map(|(.., folder)| folder.as_fd())
    }

    /// Stops all that people have started, and waits until it stands.
    ///
    /// # Errors
    /// A control file cannot be written, or a task does not stop in time; some groups may
    /// be frozen then.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        let until = Instant::now() + FREEZE_LIMIT;
        let mut waiting = Vec::new();
        for (group, path, _) in self.frozen() {
            let events = path.join("cgroup.events");
            let file = File::open(&events).map_err(|source| CgroupError::Write {
                path: events,
                source,
            })?;
            set(path, "1")?;
            waiting.push((*group, file));
        }
        for (group, file) in waiting {
            wait_frozen(file, until).map_err(|_| CgroupError::Slow(group.name()))?;
        }
        Ok(())
    }

    /// Lets it all go on.
    ///
    /// # Errors
    /// A control file cannot be written.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.frozen().try_for_each(|(_, path, _)| set(path, "0"))
    }

    fn frozen(&self) -> impl Iterator<Item = &(Group, PathBuf, File)> {
        self.groups
            .iter()
            .filter(|(group, ..)| Group::FROZEN.contains(group))
    }
}

fn set(path: &Path, value: &str) -> Result<(), CgroupError> {
    let path = path.join("cgroup.freeze");
    fs::write(&path, value).map_err(|source| CgroupError::Write { path, source })
}

/// Waits for `frozen 1`; the kernel says by POLLPRI when the file has changed.
fn wait_frozen(mut file: File, until: Instant) -> io::Result<()> {
    loop {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_string(&mut text)?;
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        rustix::event::poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&timeout))?;
    }
}

/// The machine's memory in bytes; 0 where `/proc/meminfo` does not say.
pub(crate) fn memory_total() -> u64 {
    meminfo("MemTotal:").unwrap_or(0)
}

/// A line of `/proc/meminfo` in bytes.
pub(crate) fn meminfo(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_leave_room_for_the_agent() {
        let high = |total: u64| Group::User.limits(total)[1].1.parse::<u64>().unwrap();
        assert_eq!(high(512 << 20), 448 << 20);
        assert_eq!(high(8 << 30), (8 << 30) - (128 << 20));
    }

    #[test]
    fn without_cgroup_v2_everything_is_a_no_op() {
        let groups = Cgroups::set_up(Path::new("/proc/self"));
        assert!(groups.folder(Group::User).is_none());
        groups.freeze().unwrap();
        groups.thaw().unwrap();
        assert!(memory_total() > 0);
    }
}
