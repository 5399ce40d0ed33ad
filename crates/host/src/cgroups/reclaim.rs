//! Asking memory back that machines hold and do not use.
//!
//! A guest's memory has no file behind it, so the kernel can take it only where there is swap. What
//! it can take without swap, its cache of files, counts as available anyway: then there is nothing
//! to gain, and this says so. Version 1 of control groups can only empty a group as a whole.

use std::fs;
use std::io;
use std::path::Path;

use super::{Cgroups, Layout, named};

/// The file to which is written how much is wanted back (Linux 5.19).
const FILE: &str = "memory.reclaim";
const MEMINFO: &str = "/proc/meminfo";

impl Cgroups {
    /// How much memory could be asked back at most, in bytes: the swap that is free. Or why none
    /// can be, as a sentence.
    pub fn reclaimable(&self) -> Result<u64, String> {
        self.reclaimable_by(Path::new(MEMINFO))
    }

    fn reclaimable_by(&self, meminfo: &Path) -> Result<u64, String> {
        match &self.layout {
            Layout::Unified { .. } => {}
            Layout::PerController(_) => {
                return Err("control groups v1 cannot give back a part of a group".to_owned());
            }
            Layout::Missing(why) => return Err(why.clone()),
        }
        let text = fs::read_to_string(meminfo);
        let text = text.map_err(|error| format!("cannot read {}: {error}", meminfo.display()))?;
        let free = text.lines().find_map(|line| line.strip_prefix("SwapFree:"));
        let kib = free.and_then(|free| free.split_whitespace().next()?.parse::<u64>().ok());
        match kib.unwrap_or(0) {
            0 => Err("there is no free swap".to_owned()),
            kib => Ok(kib << 10),
        }
    }

    /// Has the kernel take back so many bytes of a machine's memory, as far as it can. Blocks
    /// while they are written out.
    pub fn reclaim(&self, machine: &str, bytes: u64) -> io::Result<()> {
        for (_, folder) in self.folders(machine) {
            let file = folder.join(FILE);
            match fs::OpenOptions::new().write(true).open(&file) {
                Ok(mut open) => match io::Write::write_all(&mut open, bytes.to_string().as_bytes())
                {
                    // It could take less than that.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    written => written.map_err(|error| named("write to", &file, error))?,
                },
                Err(error) => return Err(named("open", &file, error)),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v2(root: &Path) -> Cgroups {
        fs::write(root.join("cgroup.controllers"), "cpu memory pids io\n").unwrap();
        Cgroups::probe_at(root, "wrenn")
    }

    #[test]
    fn where_there_is_no_swap_nothing_is_pretended() {
        let root = tempfile::tempdir().unwrap();
        let meminfo = root.path().join("meminfo");
        let cgroups = v2(root.path());
        fs::write(&meminfo, "MemFree: 9 kB\nSwapFree:       0 kB\n").unwrap();
        let why = cgroups.reclaimable_by(&meminfo).unwrap_err();
        assert!(why.contains("no free swap"), "{why}");
        fs::write(&meminfo, "SwapTotal: 9 kB\nSwapFree:       8 kB\n").unwrap();
        assert_eq!(cgroups.reclaimable_by(&meminfo), Ok(8 << 10));
    }

    #[test]
    fn version_1_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("memory")).unwrap();
        fs::write(root.path().join("memory/cgroup.procs"), "").unwrap();
        let why = Cgroups::probe_at(root.path(), "wrenn").reclaimable();
        assert!(why.unwrap_err().contains("v1"));
    }

    #[test]
    fn so_many_bytes_are_asked_of_the_machines_group() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("wrenn/m-1");
        fs::create_dir_all(&group).unwrap();
        let cgroups = v2(root.path());
        assert!(cgroups.reclaim("m-1", 4096).is_err(), "an older kernel");
        fs::write(group.join(FILE), "").unwrap();
        cgroups.reclaim("m-1", 1 << 20).unwrap();
        assert_eq!(fs::read_to_string(group.join(FILE)).unwrap(), "1048576");
    }
}
