//! Whether KVM works, which its device file alone does not tell: there are hosts whose KVM
//! only runs paravirtual guests.

use std::io;

use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use super::Cpu;
use crate::kernel::kvm_create_machine;

const DEVICE: &str = "/dev/kvm";

/// What is known of KVM on this host.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kvm {
    /// `/dev/kvm` exists.
    pub present: bool,
    /// It can be opened by this process.
    pub openable: bool,
    /// It made a machine with a processor.
    pub creates_machines: bool,
    /// Ordinary guests run on it.
    pub usable: bool,
    /// Why or why not, as a sentence, and what to do about it.
    pub why: String,
}

impl Kvm {
    pub(super) fn probe(cpu: &Cpu) -> Kvm {
        let opened = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let created = match &opened {
            Ok(device) => kvm_create_machine(device),
            Err(error) => Err((*error).into()),
        };
        Kvm::judge(opened.map(drop).map_err(io::Error::from), created, cpu)
    }

    /// The verdict from what was tried. Pure.
    fn judge(opened: io::Result<()>, created: io::Result<()>, cpu: &Cpu) -> Kvm {
        let hardware = cpu.vmx || cpu.svm;
        let present = !matches!(&opened, Err(error) if error.kind() == io::ErrorKind::NotFound);
        let why = match (&opened, &created) {
            (Err(_), _) if !present && !hardware && cpu.virtual_host => {
                "this host is a virtual machine without nested virtualisation: enable that where it runs, or use a bare-metal host".into()
            }
            (Err(_), _) if !present && !hardware => {
                "the processor shows no hardware virtualisation: enable VT-x or AMD-V in the firmware".into()
            }
            (Err(_), _) if !present => {
                format!("there is no {DEVICE}: load the module kvm_intel or kvm_amd")
            }
            (Err(error), _) => {
                format!("{DEVICE} cannot be opened ({error}): run as root or join the group kvm")
            }
            (_, Err(error)) => format!("{DEVICE} makes no machine: {error}"),
            (_, Ok(())) if !hardware => format!(
                "{DEVICE} answers, but the processor shows neither vmx nor svm: this KVM only runs paravirtual guests; use a host with hardware virtualisation"
            ),
            (_, Ok(())) => format!(
                "the processor has {} and {DEVICE} made a machine",
                if cpu.vmx { "vmx" } else { "svm" }
            ),
        };
        Kvm {
            present,
            openable: opened.is_ok(),
            creates_machines: created.is_ok(),
            usable: hardware && opened.is_ok() && created.is_ok(),
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(svm: bool, virtual_host: bool) -> Cpu {
        Cpu {
            vendor: "AuthenticAMD".into(),
            model: "x".into(),
            vmx: false,
            svm,
            virtual_host,
            tsc_khz: 1,
            slowness: 1.0,
        }
    }

    fn error(kind: io::ErrorKind) -> io::Error {
        io::Error::from(kind)
    }

    #[test]
    fn a_device_that_opens_proves_nothing() {
        let kvm = Kvm::judge(Ok(()), Ok(()), &cpu(false, true));
        assert!(kvm.creates_machines && !kvm.usable);
        assert!(kvm.why.contains("paravirtual"), "{}", kvm.why);
    }

    #[test]
    fn each_obstacle_is_named() {
        let missing = || error(io::ErrorKind::NotFound);
        let denied = || error(io::ErrorKind::PermissionDenied);
        let judge = |opened: io::Error, cpu: &Cpu| {
            let again = error(opened.kind());
            Kvm::judge(Err(opened), Err(again), cpu)
        };
        assert!(judge(missing(), &cpu(false, true)).why.contains("nested"));
        assert!(
            judge(missing(), &cpu(false, false))
                .why
                .contains("firmware")
        );
        assert!(judge(missing(), &cpu(true, false)).why.contains("kvm_amd"));
        let kvm = judge(denied(), &cpu(true, false));
        assert!(kvm.present && !kvm.usable && kvm.why.contains("group kvm"));
        let works = Kvm::judge(Ok(()), Ok(()), &cpu(true, false));
        assert!(works.usable && works.why.contains("svm"));
    }
}
