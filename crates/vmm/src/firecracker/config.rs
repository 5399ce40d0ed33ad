//! What the driver needs to know, found out from the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Cloning;
use crate::VmmError;
use crate::keeper::Launcher;
use crate::probe::{HostReport, usable_firecracker};

/// Devices that not every machine needs. All machines of a host have the same, since a state
/// holds them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Devices {
    /// A balloon, empty at first, by which memory is taken back; see
    /// [`crate::FirecrackerMachine::set_balloon`].
    pub balloon: bool,
    /// A vsock, behind the socket [`crate::FirecrackerMachine::vsock_path`].
    pub vsock: bool,
}

/// What the driver needs to know.
#[derive(Debug, Clone)]
pub struct FirecrackerConfig {
    /// How keepers are started.
    pub launcher: Launcher,
    /// The program.
    pub program: PathBuf,
    /// Its version.
    pub version: String,
    /// Version of the states it writes, such as `10.0.0`.
    pub snapshot_format: String,
    /// Folders of shared libraries that the program needs; none for a static one, as
    /// Firecracker's own releases are.
    pub libraries: Vec<PathBuf>,
    /// The processor of this host: a state holds its features.
    pub cpu: String,
    /// Rate of the host's time stamp counter.
    pub tsc_khz: u32,
    /// How slow the host is; see [`crate::VmmInfo::slowness`].
    pub slowness: f64,
    /// Why Firecracker runs the machines, as a sentence.
    pub why: String,
    /// How disks are copied.
    pub cloning: Cloning,
    /// Devices beside disk, network card and entropy.
    pub devices: Devices,
    /// Whether memory can be served page by page here, userfaultfd(2).
    pub userfaultfd: bool,
}

impl FirecrackerConfig {
    /// The configuration that `report` suggests; machines and disks are in `data_dir`.
    /// Blocking: runs the program for a moment.
    pub fn from_report(
        report: &HostReport,
        why: String,
        launcher: Launcher,
        data_dir: &Path,
    ) -> Result<FirecrackerConfig, VmmError> {
        let version = usable_firecracker(report)?.to_owned();
        let tool = report.firecracker.as_ref();
        let tool = tool.ok_or(VmmError::NoFirecracker)?;
        let unusable = |why: String| VmmError::UnusableMonitor {
            path: tool.path.clone(),
            why,
        };
        if !report.kvm.creates_machines {
            return Err(VmmError::Accelerator {
                asked: crate::Accelerator::Kvm,
                why: report.kvm.why.clone(),
            });
        }
        let told = Command::new(&tool.path)
            .arg("--snapshot-version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| unusable(format!("it cannot be run: {error}")))?;
        let snapshot_format = String::from_utf8_lossy(&told.stdout)
            .lines()
            .next()
            .and_then(|line| line.strip_prefix('v'))
            .map(str::to_owned)
            .ok_or_else(|| unusable("it does not tell the version of its snapshots".into()))?;
        let dynamic = needs_loader(&tool.path).map_err(|source| VmmError::File {
            what: "cannot read",
            path: tool.path.clone(),
            source,
        })?;
        Ok(FirecrackerConfig {
            launcher,
            program: tool.path.clone(),
            version,
            snapshot_format,
            libraries: if dynamic {
                library_folders()
            } else {
                Vec::new()
            },
            cpu: format!("{} {}", report.cpu.vendor, report.cpu.model),
            tsc_khz: report.cpu.tsc_khz,
            slowness: report.cpu.slowness,
            why,
            cloning: Cloning::probe(data_dir),
            devices: Devices::default(),
            userfaultfd: report.has("userfaultfd"),
        })
    }
}

/// Where shared libraries are.
fn library_folders() -> Vec<PathBuf> {
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64"]
        .into_iter()
        .map(PathBuf::from)
        .filter(|folder| folder.is_dir())
        .collect()
}

/// Whether an ELF program names a loader for shared libraries (`PT_INTERP`), elf(5).
fn needs_loader(program: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let file = File::open(program)?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Err(io::Error::other("it is no 64-bit program"));
    }
    let short = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut table = [0; 8];
    table.copy_from_slice(&header[32..40]);
    let (table, size, count) = (u64::from_le_bytes(table), short(54), short(56));
    for entry in 0..count {
        let mut kind = [0; 4];
        let at = table.saturating_add(u64::from(entry) * u64::from(size));
        file.read_exact_at(&mut kind, at)?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe;

    #[test]
    fn programs_that_need_libraries_are_told_from_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        // Two program headers of 56 bytes: a segment to load, and what is tried.
        for (kind, dynamic) in [(3, true), (1, false)] {
            let mut program = vec![0; 64 + 2 * 56];
            program[..6].copy_from_slice(b"\x7fELF\x02\x01");
            (program[32], program[54], program[56]) = (64, 56, 2);
            (program[64], program[64 + 56]) = (1, kind);
            std::fs::write(&path, program).unwrap();
            assert_eq!(needs_loader(&path).unwrap(), dynamic);
        }
        std::fs::write(&path, [b'#'; 64]).unwrap();
        assert!(needs_loader(&path).is_err());
    }

    #[test]
    fn an_old_firecracker_is_refused_with_what_to_do() {
        let mut report = probe::host(None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = |report: &HostReport| {
            let launcher = Launcher::default();
            FirecrackerConfig::from_report(report, String::new(), launcher, dir.path())
        };
        report.firecracker = None;
        let error = config(&report).unwrap_err().to_string();
        assert!(error.contains("FIRECRACKER_BIN"), "{error}");
        let tool = |version: Option<&str>, usable| probe::Tool {
            path: "/opt/firecracker".into(),
            version: version.map(str::to_owned),
            minimum: probe::FIRECRACKER_MINIMUM,
            usable,
        };
        report.firecracker = Some(tool(Some("1.15.0"), false));
        let error = config(&report).unwrap_err().to_string();
        for words in ["/opt/firecracker", "1.15.0", "1.15.1", "upgrade"] {
            assert!(error.contains(words), "{error}");
        }
        report.firecracker = Some(tool(None, false));
        let error = config(&report).unwrap_err().to_string();
        assert!(error.contains("is it Firecracker?"), "{error}");
    }
}
