//! Which monitor and which accelerator are used. Pure.

use std::fmt;

use serde::Serialize;

use super::{FIRECRACKER_MINIMUM, HostReport};
use crate::{Accelerator, VmmError};

/// A monitor that there is a driver for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// [`crate::QemuVmm`]: everywhere.
    Qemu,
    /// [`crate::FirecrackerVmm`]: on hardware virtualisation.
    Firecracker,
}

impl Driver {
    /// What [`crate::VmmInfo::kind`] calls it.
    pub const fn kind(self) -> &'static str {
        match self {
            Driver::Qemu => "qemu",
            Driver::Firecracker => "firecracker",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Driver::Qemu => "QEMU",
            Driver::Firecracker => "Firecracker",
        })
    }
}

/// A monitor and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DriverChoice {
    /// What runs the machines.
    pub driver: Driver,
    /// Why, as a sentence; for QEMU also why not Firecracker.
    pub why: String,
}

/// Chooses what runs the machines: as the operator asks, else Firecracker where it is there and
/// runs ordinary guests, else QEMU. Firecracker that is not there or too old is refused even if
/// asked for; on a KVM that only runs paravirtual guests it is not, so that somebody whose
/// guests are such can have it.
pub fn choose_driver(report: &HostReport, asked: Option<Driver>) -> Result<DriverChoice, VmmError> {
    let choice = |driver, why: String| Ok(DriverChoice { driver, why });
    let firecracker = usable_firecracker(report);
    match (asked, firecracker) {
        (Some(Driver::Qemu), _) => choice(Driver::Qemu, "the operator asked for it".into()),
        (Some(Driver::Firecracker), Err(error)) => Err(error),
        (Some(Driver::Firecracker), Ok(_)) if !report.kvm.creates_machines => {
            Err(VmmError::Accelerator {
                asked: Accelerator::Kvm,
                why: report.kvm.why.clone(),
            })
        }
        (Some(Driver::Firecracker), Ok(_)) if report.kvm.usable => {
            choice(Driver::Firecracker, "the operator asked for it".into())
        }
        (Some(Driver::Firecracker), Ok(_)) => choice(
            Driver::Firecracker,
            format!(
                "the operator asked for it, though Linux guests will not run: {}",
                report.kvm.why
            ),
        ),
        (None, Ok(version)) if report.kvm.usable => choice(
            Driver::Firecracker,
            format!("Firecracker {version} is here, and {}", report.kvm.why),
        ),
        (None, Ok(_)) => choice(
            Driver::Qemu,
            format!(
                "Firecracker is here, and needs hardware virtualisation: {}",
                report.kvm.why
            ),
        ),
        (None, Err(error)) => choice(Driver::Qemu, format!("{error}")),
    }
}

/// The version of a Firecracker that may be used.
pub(crate) fn usable_firecracker(report: &HostReport) -> Result<&str, VmmError> {
    let tool = report.firecracker.as_ref();
    let tool = tool.ok_or(VmmError::NoFirecracker)?;
    let unusable = |why| VmmError::UnusableMonitor {
        path: tool.path.clone(),
        why,
    };
    match &tool.version {
        Some(version) if tool.usable => Ok(version),
        Some(version) => Err(unusable(format!(
            "it has version {version}, and {FIRECRACKER_MINIMUM} is the oldest that is safe (CVE-2026-1386, CVE-2026-5747); upgrade it"
        ))),
        None => Err(unusable(
            "it does not tell its version; is it Firecracker?".into(),
        )),
    }
}

/// An accelerator and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// How guests are executed.
    pub accelerator: Accelerator,
    /// Why, as a sentence.
    pub why: String,
}

/// Chooses how guests are executed: as the operator asks, else KVM where it was seen to
/// work, else TCG, which always works. KVM that does not work here is refused even if asked
/// for.
pub fn choose(report: &HostReport, asked: Option<Accelerator>) -> Result<Choice, VmmError> {
    let choice = |accelerator, why: String| Ok(Choice { accelerator, why });
    match (asked, report.kvm.usable) {
        (Some(Accelerator::Kvm), false) => Err(VmmError::Accelerator {
            asked: Accelerator::Kvm,
            why: report.kvm.why.clone(),
        }),
        (Some(accelerator), _) => choice(accelerator, "the operator asked for it".into()),
        (None, true) => choice(Accelerator::Kvm, report.kvm.why.clone()),
        (None, false) => choice(
            Accelerator::Tcg,
            format!(
                "guests are emulated in software, since KVM cannot be used: {}",
                report.kvm.why
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Tool;

    #[test]
    fn firecracker_is_taken_where_it_runs_ordinary_guests_or_is_asked_for() {
        let mut report = super::super::host(None).unwrap();
        let tool = |version: &str, usable| {
            Some(Tool {
                path: "/opt/firecracker".into(),
                version: Some(version.into()),
                minimum: FIRECRACKER_MINIMUM,
                usable,
            })
        };
        let kvm = |report: &mut HostReport, creates, usable| {
            report.kvm.creates_machines = creates;
            report.kvm.usable = usable;
            report.kvm.why = "so it is".into();
        };
        let firecracker = Some(Driver::Firecracker);
        // Where all is well.
        report.firecracker = tool("1.16.1", true);
        kvm(&mut report, true, true);
        let choice = choose_driver(&report, None).unwrap();
        assert_eq!(choice.driver, Driver::Firecracker);
        assert!(choice.why.contains("1.16.1") && choice.why.ends_with("so it is"));
        let choice = choose_driver(&report, Some(Driver::Qemu)).unwrap();
        assert_eq!(choice.driver, Driver::Qemu);
        // Where only paravirtual guests run.
        kvm(&mut report, true, false);
        let choice = choose_driver(&report, None).unwrap();
        assert_eq!(choice.driver, Driver::Qemu);
        assert!(choice.why.contains("hardware"), "{}", choice.why);
        let choice = choose_driver(&report, firecracker).unwrap();
        assert_eq!(choice.driver, Driver::Firecracker);
        assert!(choice.why.contains("Linux guests will not run"));
        // Without KVM.
        kvm(&mut report, false, false);
        assert!(choose_driver(&report, firecracker).is_err());
        // Too old, or not there.
        kvm(&mut report, true, true);
        report.firecracker = tool("1.15.0", false);
        let choice = choose_driver(&report, None).unwrap();
        assert_eq!(choice.driver, Driver::Qemu);
        assert!(choice.why.contains("1.15.1"), "{}", choice.why);
        assert!(choose_driver(&report, firecracker).is_err());
        report.firecracker = None;
        let choice = choose_driver(&report, None).unwrap();
        assert_eq!(choice.driver, Driver::Qemu);
        assert!(choice.why.contains("FIRECRACKER_BIN"), "{}", choice.why);
        let error = choose_driver(&report, firecracker).unwrap_err();
        assert!(matches!(error, VmmError::NoFirecracker), "{error:?}");
    }

    #[test]
    fn kvm_is_never_taken_where_it_does_not_work() {
        let mut report = super::super::host(None).unwrap();
        report.kvm.usable = false;
        report.kvm.why = "it is broken".into();
        let choice = choose(&report, None).unwrap();
        assert_eq!(choice.accelerator, Accelerator::Tcg);
        assert!(choice.why.ends_with("it is broken"));
        let error = choose(&report, Some(Accelerator::Kvm)).unwrap_err();
        assert!(error.to_string().contains("it is broken"), "{error}");
        report.kvm.usable = true;
        assert_eq!(choose(&report, None).unwrap().accelerator, Accelerator::Kvm);
        let asked = choose(&report, Some(Accelerator::Tcg)).unwrap();
        assert_eq!(asked.accelerator, Accelerator::Tcg);
    }
}
