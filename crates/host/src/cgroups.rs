//! Limits of a machine's processes: a control group each, in whichever version this host has.
//!
//! ```text
//! v2  /sys/fs/cgroup/wrenn/m-0123…/{cpu.max, memory.max, pids.max, io.max}
//! v1  /sys/fs/cgroup/{cpu, memory, pids, blkio}/wrenn/m-0123…/…
//! ```
//!
//! A group has its machine's folder's name, so that whoever finds one without a folder knows
//! that nobody needs it. Processes are moved in when the machine is loaded and before its guest
//! runs; what a monitor has allocated until then counts for the agent.
//!
//! The disk is limited where the operator says so ([`Cgroups::limit_disk`]).
//!
//! Files and their units: `Documentation/admin-guide/cgroup-v1/` and `cgroup-v2.rst` of Linux.

mod check;
mod disk;
mod reclaim;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access};
use wrenn_types::Shape;
use wrenn_vmm::DiskLimits;

pub use self::check::{disk_self_check, self_check};

/// Where control groups are mounted.
const MOUNTED: &str = "/sys/fs/cgroup";
/// The period of processor quotas, in microseconds; the kernel's own default.
const PERIOD: u64 = 100_000;
/// Processor time that a monitor may use beside that of its guest's processors, in percent of
/// one: its disk and network are served by other threads.
const MONITOR_PERCENT: u64 = 50;
/// Memory that a monitor may use beside its guest's, in bytes: the cache of translated code,
/// page tables, devices, buffers of its disk.
const MONITOR_BYTES: u64 = 512 << 20;
/// Threads and processes of a machine: processors, up to 64 threads for files, the keeper.
const TASKS: u64 = 160;
/// How long a group whose last process was just killed may take to be empty.
const EMPTY_WITHIN: Duration = Duration::from_secs(2);

/// The file that says which controllers the folders below have.
const PASSED_ON: &str = "cgroup.subtree_control";

/// The controllers that are used.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The one that limits a disk, in version 2 and in version 1.
const IO: &str = "io";
const BLKIO: &str = "blkio";

/// What a machine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Processor time, in percent of one processor.
    pub cpu_percent: u64,
    /// Memory in bytes.
    pub memory: u64,
    /// Processes and threads.
    pub tasks: u64,
}

impl Limits {
    /// Those of a machine of this shape.
    pub fn of(shape: Shape) -> Limits {
        Limits {
            cpu_percent: u64::from(shape.vcpus.0) * 100 + MONITOR_PERCENT,
            // A page that the guest writes to and the template has a hole at is filled there as
            // well, for all that come after; both are counted as the first one's.
            memory: 2 * shape.memory.bytes() + MONITOR_BYTES,
            tasks: TASKS,
        }
    }
}

/// Which control groups this host has.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Layout {
    /// One tree for all, and whether a disk can be limited in it.
    Unified { root: PathBuf, io: bool },
    /// A tree for each controller, of those that are there.
    PerController(Vec<(&'static str, PathBuf)>),
    /// None that can be used, and why.
    Missing(String),
}

/// The control groups of an agent's machines.
#[derive(Debug, Clone)]
pub struct Cgroups {
    layout: Layout,
    /// The folder of all groups of this agent.
    name: String,
    /// The device that is limited, and how.
    disk: Option<(String, DiskLimits)>,
}

impl Cgroups {
    /// Looks which ones this host has, and changes nothing. `name` is the folder for the groups of
    /// this agent.
    pub fn probe(name: &str) -> Cgroups {
        Cgroups::probe_at(Path::new(MOUNTED), name)
    }

    fn probe_at(mounted: &Path, name: &str) -> Cgroups {
        let layout = match fs::read_to_string(mounted.join("cgroup.controllers")) {
            Ok(controllers) => unified(mounted, &controllers),
            Err(_) => per_controller(mounted),
        };
        Cgroups {
            layout,
            name: name.to_owned(),
            disk: None,
        }
    }

    /// Limits what each machine may use of the disk that `folder` lies on, from now on and of
    /// machines that start. Asked for no limits it does nothing.
    ///
    /// # Errors
    /// Why that cannot be done here, as a sentence; then nothing of the disk is limited.
    pub fn limit_disk(&mut self, folder: &Path, limits: DiskLimits) -> Result<(), String> {
        if !limits.is_none() {
            self.disk = Some((self.disk_of(folder)?, limits));
        }
        Ok(())
    }

    /// The disk that `folder` lies on as it would be limited, `254:0`; or why it cannot be.
    pub fn disk_of(&self, folder: &Path) -> Result<String, String> {
        match &self.layout {
            Layout::Unified { io: true, .. } => {}
            Layout::Unified { io: false, .. } => {
                return Err("control groups v2 without the controller io".to_owned());
            }
            Layout::PerController(trees) if trees.iter().any(|(name, _)| *name == BLKIO) => {}
            Layout::PerController(_) => {
                return Err("control groups v1 without the controller blkio".to_owned());
            }
            Layout::Missing(why) => return Err(why.clone()),
        }
        disk::device_of(folder, Path::new(disk::DEVICES))
    }

    /// Whether what machines use of the disk is limited, also what they write.
    pub fn limits_disk(&self) -> bool {
        self.disk.is_some() && self.know_writers()
    }

    /// Whether they know whose a write is that goes through the kernel's cache of files.
    pub fn know_writers(&self) -> bool {
        matches!(self.layout, Layout::Unified { .. })
    }

    /// What is in use, for people: `v2`, `v1: cpu, memory, pids`, or why there is nothing.
    pub fn describe(&self) -> Result<String, String> {
        match &self.layout {
            Layout::Unified { .. } => Ok("v2: cpu, memory, pids".to_owned()),
            Layout::PerController(trees) => {
                let names = trees.iter().map(|(name, _)| *name);
                let names: Vec<&str> = names.filter(|name| *name != BLKIO).collect();
                Ok(format!("v1: {}", names.join(", ")))
            }
            Layout::Missing(why) => Err(why.clone()),
        }
    }

    /// The folders of a group, with the controllers that each has.
    fn folders(&self, machine: &str) -> Vec<(&'static str, PathBuf)> {
        match &self.layout {
            Layout::Unified { root, .. } => vec![("", root.join(&self.name).join(machine))],
            Layout::PerController(trees) => trees
                .iter()
                .map(|(controller, tree)| (*controller, tree.join(&self.name).join(machine)))
                .collect(),
            Layout::Missing(_) => Vec::new(),
        }
    }

    /// Puts processes into a group of their own with these limits. On a host without control
    /// groups it does nothing, which [`Cgroups::describe`] tells.
    pub fn confine(&self, machine: &str, limits: Limits, pids: &[u32]) -> io::Result<()> {
        if let Layout::Unified { root, .. } = &self.layout {
            self.pass_controllers_on(root)?;
        }
        for (controller, folder) in self.folders(machine) {
            let mut files = settings(controller, limits);
            if let Some((device, limits)) = &self.disk {
                files.extend(disk::settings(controller, device, *limits));
            }
            if files.is_empty() {
                continue;
            }
            fs::create_dir_all(&folder).map_err(|e| named("make", &folder, e))?;
            for (file, value) in files {
                write(&folder.join(file), &value)?;
            }
            for pid in pids {
                write(&folder.join("cgroup.procs"), &pid.to_string())?;
            }
        }
        Ok(())
    }

    /// In version 2 each folder from the root down has to pass the controllers on to those in it.
    fn pass_controllers_on(&self, root: &Path) -> io::Result<()> {
        let folder = root.join(&self.name);
        let controllers = match &self.disk {
            Some(_) => "+cpu +memory +pids +io",
            None => "+cpu +memory +pids",
        };
        write(&root.join(PASSED_ON), controllers)?;
        fs::create_dir_all(&folder).map_err(|e| named("make", &folder, e))?;
        write(&folder.join(PASSED_ON), controllers)
    }

    /// How many processes of the group the kernel has killed for want of memory; 0 where that is
    /// not known.
    pub fn oom_kills(&self, machine: &str) -> u64 {
        let folders = self.folders(machine);
        let counts = folders.iter().filter_map(|(controller, folder)| {
            let file = match *controller {
                "" => "memory.events",
                "memory" => "memory.oom_control",
                _ => return None,
            };
            let text = fs::read_to_string(folder.join(file)).ok()?;
            let count = text
                .lines()
                .find_map(|line| line.strip_prefix("oom_kill "))?;
            count.trim().parse::<u64>().ok()
        });
        counts.sum()
    }

    /// Removes a group once its processes have ended; none at all is no error.
    pub async fn remove(&self, machine: &str) -> io::Result<()> {
        for (_, folder) in self.folders(machine) {
            let began = std::time::Instant::now();
            loop {
                match fs::remove_dir(&folder) {
                    Ok(()) => break,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                    Err(error)
                        if error.kind() == io::ErrorKind::ResourceBusy
                            && began.elapsed() < EMPTY_WITHIN =>
                    {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(error) => return Err(named("remove", &folder, error)),
                }
            }
        }
        Ok(())
    }

    /// The machines that have a group.
    pub fn machines(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .folders("")
            .iter()
            // Of a folder that is not there nothing is left over.
            .filter_map(|(_, folder)| fs::read_dir(folder).ok())
            .flatten()
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// Removes the groups of machines that are not among `alive`, and what is empty then.
    /// Returns those it removed; one that has processes stays and is told to the log.
    pub async fn sweep(&self, alive: &[String]) -> Vec<String> {
        let mut removed = Vec::new();
        for machine in self.machines() {
            if alive.contains(&machine) {
                continue;
            }
            match self.remove(&machine).await {
                Ok(()) => removed.push(machine),
                Err(error) => tracing::warn!(%error, "a control group that nobody needs stays"),
            }
        }
        removed
    }

    /// Removes the folder of all groups, if none is left.
    pub fn close(&self) {
        for (_, folder) in self.folders("") {
            if let Err(error) = fs::remove_dir(&folder)
                && !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::ResourceBusy
                        | io::ErrorKind::DirectoryNotEmpty
                )
            {
                tracing::warn!(folder = %folder.display(), %error, "a control group stays");
            }
        }
    }
}

fn unified(mounted: &Path, controllers: &str) -> Layout {
    let has = |wanted: &&str| controllers.split_whitespace().any(|c| c == *wanted);
    if let Some(lacking) = CONTROLLERS.iter().find(|wanted| !has(wanted)) {
        return Layout::Missing(format!(
            "control groups v2 without the controller {lacking}"
        ));
    }
    match access(mounted, Access::WRITE_OK) {
        Ok(()) => Layout::Unified {
            root: mounted.to_owned(),
            io: has(&IO),
        },
        Err(error) => Layout::Missing(format!("control groups v2 cannot be written to: {error}")),
    }
}

fn per_controller(mounted: &Path) -> Layout {
    let mut trees = Vec::new();
    let mut why = "no control groups are mounted".to_owned();
    for controller in CONTROLLERS.into_iter().chain([BLKIO]) {
        let tree = mounted.join(controller);
        if !tree.join("cgroup.procs").exists() {
            continue;
        }
        match access(&tree, Access::WRITE_OK) {
            Ok(()) => trees.push((controller, tree)),
            Err(error) => why = format!("{} cannot be written to: {error}", tree.display()),
        }
    }
    // A disk alone that could be limited is not what is meant by limits.
    match trees.iter().any(|(controller, _)| *controller != BLKIO) {
        true => Layout::PerController(trees),
        false => Layout::Missing(why),
    }
}

/// The files that set limits, with what is written to them. `""` is the tree of version 2.
fn settings(controller: &str, limits: Limits) -> Vec<(&'static str, String)> {
    let quota = limits.cpu_percent * PERIOD / 100;
    let (memory, tasks) = (limits.memory.to_string(), limits.tasks.to_string());
    match controller {
        "" => vec![
            ("cpu.max", format!("{quota} {PERIOD}")),
            ("memory.max", memory),
            ("pids.max", tasks),
        ],
        "cpu" => vec![
            ("cpu.cfs_period_us", PERIOD.to_string()),
            ("cpu.cfs_quota_us", quota.to_string()),
        ],
        "memory" => vec![("memory.limit_in_bytes", memory)],
        "pids" => vec![("pids.max", tasks)],
        _ => Vec::new(),
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    // Not `fs::write`: these files are there, and must not be made.
    let mut file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|e| named("open", path, e))?;
    io::Write::write_all(&mut file, value.as_bytes())
        .map_err(|e| named(&format!("write `{value}` to"), path, e))
}

fn named(doing: &str, path: &Path, error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("cannot {doing} {}: {error}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g38_limits_follow_the_shape() {
        let limits = Limits::of(Shape::DEFAULT);
        assert_eq!(limits.cpu_percent, 150);
        assert_eq!(limits.memory, (1 << 30) + (512 << 20));
        let v2 = settings("", limits);
        assert_eq!(v2[0], ("cpu.max", "150000 100000".to_owned()));
    }

    #[tokio::test]
    async fn a_host_without_control_groups_says_so_and_confines_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::probe_at(dir.path(), "wrenn");
        assert!(cgroups.describe().is_err());
        cgroups
            .confine("m-1", Limits::of(Shape::DEFAULT), &[1])
            .unwrap();
        cgroups.remove("m-1").await.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn version_2_without_a_controller_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "cpu pids\n").unwrap();
        let why = Cgroups::probe_at(dir.path(), "wrenn")
            .describe()
            .unwrap_err();
        assert!(why.contains("memory"), "{why}");
    }
}
