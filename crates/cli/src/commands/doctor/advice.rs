//! What to install or change, and what it gains.

use std::env;
use std::path::{Path, PathBuf};

use wrenn_vmm::probe::{HostReport, Measured};

/// A thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Advice {
    /// What it gains.
    pub(super) gain: String,
    /// What to do.
    pub(super) action: String,
}

/// A Debian package that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MissingPackage {
    /// Its name.
    pub(super) name: &'static str,
    /// Without it no sandbox runs; else only images cannot be built.
    pub(super) to_run: bool,
}

/// The package with QEMU, which another monitor makes needless.
pub(super) const QEMU_PACKAGE: &str = "qemu-system-x86";

/// A program, its package, and whether sandboxes cannot run without it.
const PROGRAMS: [(&str, &str, bool); 4] = [
    ("qemu-system-x86_64", QEMU_PACKAGE, true),
    ("nft", "nftables", true),
    ("mmdebstrap", "mmdebstrap", false),
    ("mke2fs", "e2fsprogs", false),
];
/// Where programs for root live, which an ordinary user's PATH leaves out.
const ROOT_PATHS: [&str; 2] = ["/usr/sbin", "/sbin"];
/// Names QEMU where it is not in PATH.
const QEMU_VARIABLE: &str = "WRENN_QEMU";

/// Which packages are not there.
pub(super) fn missing_packages() -> Vec<MissingPackage> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&path)
        .chain(ROOT_PATHS.map(PathBuf::from))
        .collect();
    let elsewhere =
        |program: &str| program.starts_with("qemu") && env::var_os(QEMU_VARIABLE).is_some();
    PROGRAMS
        .into_iter()
        .filter(|(program, ..)| !elsewhere(program) && !is_in(&folders, program))
        .map(|(_, name, to_run)| MissingPackage { name, to_run })
        .collect()
}

fn is_in(folders: &[PathBuf], program: &str) -> bool {
    folders
        .iter()
        .any(|folder| Path::join(folder, program).is_file())
}

/// What to do, the most urgent first.
pub(super) fn advise(report: &HostReport, missing: &[MissingPackage], runs: bool) -> Vec<Advice> {
    let mut all = Vec::new();
    let mut advise = |gain: &str, action: String| {
        all.push(Advice {
            gain: gain.to_owned(),
            action,
        })
    };
    let names = |to_run: bool| {
        let names: Vec<_> = missing
            .iter()
            .filter(|package| package.to_run == to_run)
            .map(|package| package.name)
            .collect();
        (!names.is_empty()).then(|| {
            format!(
                "sudo apt-get install --yes --no-install-recommends {}",
                names.join(" ")
            )
        })
    };
    if let Some(install) = names(true) {
        advise("to run sandboxes", install);
    } else if !runs {
        advise("to run sandboxes", "see the reason above".to_owned());
    }
    if let Some(install) = names(false) {
        advise("to build images", install);
    }
    if !report.kvm.usable {
        let cpu = &report.cpu;
        advise("to be many times faster", match (cpu.vmx || cpu.svm, report.kvm.present) {
            (true, false) => format!("load KVM: sudo modprobe {}", if cpu.vmx { "kvm_intel" } else { "kvm_amd" }),
            (true, true) => "KVM is there but does not work; the reason is above".to_owned(),
            (false, _) if cpu.virtual_host => {
                "use a host with nested virtualisation switched on, or one that is no virtual machine".to_owned()
            }
            (false, _) => "switch virtualisation (VT-x, AMD-V) on in the firmware's setup".to_owned(),
        });
    }
    let firecracker = report.firecracker.is_some() && report.kvm.usable;
    let mut features = report.features.iter();
    let no_reflink = features.any(|f| f.name == "reflink" && f.available == Measured::No);
    if firecracker && no_reflink {
        advise(
            "to save Firecracker's disks fastest",
            "put the data folder on btrfs or XFS (--data-dir)".to_owned(),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_packages_come_with_the_command_that_installs_them() {
        let mut report = wrenn_vmm::probe::host(None).unwrap();
        report.kvm.usable = true;
        report.features.clear();
        assert_eq!(advise(&report, &[], true), []);
        let missing = [
            MissingPackage {
                name: "qemu-system-x86",
                to_run: true,
            },
            MissingPackage {
                name: "mmdebstrap",
                to_run: false,
            },
        ];
        let advice = advise(&report, &missing, false);
        assert!(
            advice[0]
                .action
                .ends_with("apt-get install --yes --no-install-recommends qemu-system-x86")
        );
        assert!(advice[1].action.ends_with(" mmdebstrap"));
    }

    #[test]
    fn the_way_to_kvm_depends_on_the_host() {
        let mut report = wrenn_vmm::probe::host(None).unwrap();
        report.kvm.usable = false;
        report.features.clear();
        let mut action = |vmx, virtual_host, present| {
            (report.cpu.vmx, report.cpu.svm, report.cpu.virtual_host) = (vmx, false, virtual_host);
            report.kvm.present = present;
            advise(&report, &[], true).remove(0).action
        };
        assert!(action(true, false, false).contains("modprobe kvm_intel"));
        assert!(action(false, true, false).contains("nested"));
        assert!(action(false, false, false).contains("firmware"));
        assert!(action(true, false, true).contains("reason"));
    }

    #[test]
    fn programs_are_looked_for_where_they_are() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("nft"), "").unwrap();
        let folders = [folder.path().to_path_buf()];
        assert!(is_in(&folders, "nft"));
        assert!(!is_in(&folders, "mke2fs"));
    }
}
