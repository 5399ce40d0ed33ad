//! What the kernel, the data folder and the limits allow.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::{MemoryFile, kernel};

/// Whether something works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Measured {
    /// It was tried and works.
    Yes,
    /// It was tried and does not.
    No,
    /// It could not be tried.
    Unknown,
}

/// Something that Wrenn uses where it is there.
#[derive(Debug, Clone, Serialize)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// Whether it works.
    pub available: Measured,
    /// What it is for, or why it does not work.
    pub detail: String,
    /// Whether sandboxes cannot run without it.
    pub required: bool,
}

/// How much there is.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    /// Processors that this process may use.
    pub cpus: usize,
    /// Memory of the host in bytes.
    pub memory_bytes: u64,
    /// Memory that can be had without swapping.
    pub memory_available_bytes: u64,
    /// Open files of this process; `None` is no limit.
    pub open_files: Option<u64>,
    /// Processes of this user; `None` is no limit.
    pub processes: Option<u64>,
}

impl Limits {
    pub(super) fn probe() -> io::Result<Limits> {
        let memory = fs::read_to_string("/proc/meminfo")?;
        Ok(Limits {
            cpus: std::thread::available_parallelism()?.get(),
            memory_bytes: meminfo(&memory, "MemTotal"),
            memory_available_bytes: meminfo(&memory, "MemAvailable"),
            open_files: getrlimit(Resource::Nofile).current,
            processes: getrlimit(Resource::Nproc).current,
        })
    }
}

/// A value of `/proc/meminfo` in bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

pub(super) fn probe(data_dir: Option<&Path>) -> Vec<Feature> {
    let feature = |name, tried: Result<(), String>, purpose: &str, required| Feature {
        name,
        available: if tried.is_ok() {
            Measured::Yes
        } else {
            Measured::No
        },
        detail: match tried {
            Ok(()) => purpose.to_owned(),
            Err(why) => format!("{why}; for {purpose}"),
        },
        required,
    };
    let root = if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err("this process is not root".into())
    };
    let mut features = vec![
        feature("root", root, "namespaces and users of machines", true),
        feature(
            "memfd seals",
            seals(),
            "template memory that no machine can change",
            true,
        ),
        feature(
            "tun",
            opens("/dev/net/tun"),
            "network cards of guests",
            true,
        ),
        nftables(),
        cgroups(),
        feature(
            "userfaultfd",
            kernel::userfaultfd().map_err(|error| error.to_string()),
            "Firecracker's memory on demand",
            false,
        ),
        feature(
            "PAGEMAP_SCAN",
            pagemap_scan(),
            "fast pauses (Linux 6.7)",
            false,
        ),
        feature("overlayfs", file_system("overlay"), "image builds", false),
        feature(
            "device-mapper",
            opens("/dev/mapper/control"),
            "Firecracker's disks where there is no reflink",
            false,
        ),
    ];
    features.push(match data_dir {
        Some(dir) => feature("reflink", reflink(dir), "copies of disks in no time", false),
        None => Feature {
            name: "reflink",
            available: Measured::Unknown,
            detail: "no data folder was named".into(),
            required: false,
        },
    });
    features
}

fn opens(path: &str) -> Result<(), String> {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .map(drop)
        .map_err(|error| format!("{path}: {error}"))
}

fn seals() -> Result<(), String> {
    let memory = MemoryFile::create(4096).map_err(|error| error.to_string())?;
    memory.seal().map(drop).map_err(|error| error.to_string())
}

fn pagemap_scan() -> Result<(), String> {
    let pagemap = File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
    if kernel::knows_pagemap_scan(&pagemap) {
        Ok(())
    } else {
        Err("the kernel is older".into())
    }
}

fn file_system(name: &str) -> Result<(), String> {
    let known = fs::read_to_string("/proc/filesystems").map_err(|error| error.to_string())?;
    if known
        .lines()
        .any(|line| line.trim_start_matches("nodev").trim() == name)
    {
        Ok(())
    } else {
        Err(format!(
            "the kernel does not list it (try `modprobe {name}`)"
        ))
    }
}

/// nftables is reached by its own program, which also loads the kernel's module.
fn nftables() -> Feature {
    let tried = Command::new("nft")
        .args(["list", "tables"])
        .stdin(Stdio::null())
        .output();
    let (available, detail) = match tried {
        Ok(output) if output.status.success() => (
            Measured::Yes,
            "keeps guests from each other and the host".into(),
        ),
        Ok(output) => (
            Measured::No,
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => (
            Measured::Unknown,
            "nft is not installed, so it was not tried: install nftables".into(),
        ),
        Err(error) => (Measured::Unknown, format!("nft cannot be run: {error}")),
    };
    Feature {
        name: "nftables",
        available,
        detail,
        required: true,
    }
}

fn cgroups() -> Feature {
    let detail = match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers) => Some(format!("version 2: {}", controllers.trim())),
        Err(_) => fs::read_to_string("/proc/cgroups").ok().map(|table| {
            let names: Vec<&str> = table
                .lines()
                .filter(|line| !line.starts_with('#'))
                .filter_map(|line| line.split_ascii_whitespace().next())
                .collect();
            format!("version 1: {}", names.join(" "))
        }),
    };
    Feature {
        name: "cgroups",
        available: if detail.is_some() {
            Measured::Yes
        } else {
            Measured::No
        },
        detail: detail.unwrap_or_else(|| "not mounted; for limits of machines".into()),
        required: false,
    }
}

/// Clones a small file in `dir`. Both files are unnamed, so nothing can stay behind.
fn reflink(dir: &Path) -> Result<(), String> {
    let unnamed = || {
        rustix::fs::open(
            dir,
            rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
    };
    let clone = || -> rustix::io::Result<()> {
        let (from, to) = (unnamed()?, unnamed()?);
        rustix::io::write(&from, &[1; 4096])?;
        rustix::fs::ioctl_ficlone(&to, &from)
    };
    clone().map_err(|error| {
        format!(
            "the file system of {} cannot ({error}); btrfs and xfs can",
            dir.display()
        )
    })
}
