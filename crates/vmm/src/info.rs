//! What runs the machines, and what a saved state depends on.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How the guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// By the processor, through the kernel's KVM.
    Kvm,
    /// By QEMU's Tiny Code Generator: translated in software, works everywhere.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
    }
}

/// How a monitor's disk layers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerFormat {
    /// qcow2: each layer has what differs from those below.
    Qcow2,
    /// Raw: each layer is a whole image.
    Raw,
    /// Of Linux's device mapper: each layer has all that differs from the raw image below.
    DmSnapshot,
}

impl LayerFormat {
    /// Its name, which files of it end with.
    pub fn name(self) -> &'static str {
        match self {
            LayerFormat::Qcow2 => "qcow2",
            LayerFormat::Raw => "raw",
            LayerFormat::DmSnapshot => "dm-snapshot",
        }
    }

    /// The format of this name.
    pub fn from_name(name: &str) -> Option<LayerFormat> {
        [
            LayerFormat::Qcow2,
            LayerFormat::Raw,
            LayerFormat::DmSnapshot,
        ]
        .into_iter()
        .find(|format| format.name() == name)
    }

    /// Whether a monitor that writes this format can build on a layer of the other one.
    pub fn builds_on(self, other: LayerFormat) -> bool {
        self == other || (self, other) == (LayerFormat::DmSnapshot, LayerFormat::Raw)
    }
}

/// What of a kernel a monitor boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelFormat {
    /// The compressed image that Linux distributions ship.
    BzImage,
    /// The ELF file in it.
    Elf,
}

/// The virtual machine monitor in use and why it was chosen.
#[derive(Debug, Clone, Serialize)]
pub struct VmmInfo {
    /// The driver: `qemu` or `firecracker`.
    pub kind: &'static str,
    /// The program.
    pub path: PathBuf,
    /// Its version, such as `7.2.22`.
    pub version: String,
    /// How guests are executed.
    pub accelerator: Accelerator,
    /// Why this accelerator, as a sentence.
    pub why: String,
    /// What a state saved by this monitor depends on.
    pub fingerprint: Fingerprint,
    /// How slow this host is for guests: 1 for the machine the time limits were set on, 2
    /// for one that takes twice as long.
    pub slowness: f64,
    /// How disk layers are written.
    pub layers: LayerFormat,
    /// What of a kernel is booted.
    pub kernel: KernelFormat,
    /// Whether memory that was saved over a template is best had from a page server
    /// ([`crate::Vmm::restore_served`]), since it cannot be laid over the template's in place.
    pub page_server: bool,
    /// Whether machines can be started before it is known what they become
    /// ([`crate::Vmm::stand_by`]).
    pub stands_by: bool,
}

impl VmmInfo {
    /// A time limit that was set on the reference machine, stretched to this one. Never
    /// shorter than `base`: a fast host may be a busy one.
    pub fn deadline(&self, base: Duration) -> Duration {
        base.mul_f64(self.slowness.clamp(1.0, 20.0))
    }
}

/// What a saved machine state depends on. A state made under one fingerprint is only loaded
/// under a compatible one: QEMU does not tell all differences apart itself, since `microvm`
/// is an unversioned machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// The driver: `qemu` or `firecracker`.
    pub vmm: String,
    /// The monitor's version.
    pub version: String,
    /// The machine model with its options.
    pub machine: String,
    /// The processor model.
    pub cpu: String,
    /// How guests are executed.
    pub accelerator: Accelerator,
    /// Rate of the guest's time stamp counter in kHz, which is the host's.
    pub tsc_khz: u32,
    /// Kind of network back end, which decides the virtio features on offer.
    pub netdev: String,
    /// Version of our own device layout; raised when the driver adds or moves a device.
    pub layout: u32,
}

/// Why a saved state cannot be loaded here: each difference as `what: saved, here`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the state was saved under another virtual machine monitor ({}): start cold from the disk instead, or make the template again here", .differences.join("; "))]
pub struct Incompatible {
    /// One sentence for each difference.
    pub differences: Vec<String>,
}

/// Two measurements of one host's counter differ by less than this many parts per million;
/// two hosts of different models by thousands.
const TSC_TOLERANCE_PPM: u64 = 500;

impl Fingerprint {
    /// Whether a state saved under `saved` may be loaded by a monitor with this fingerprint.
    pub fn accepts(&self, saved: &Fingerprint) -> Result<(), Incompatible> {
        let mut differences = Vec::new();
        let mut differ = |what: &str, saved: &dyn fmt::Display, here: &dyn fmt::Display| {
            let (saved, here) = (saved.to_string(), here.to_string());
            if saved != here {
                differences.push(format!("{what}: {saved} then, {here} here"));
            }
        };
        differ("monitor", &saved.vmm, &self.vmm);
        differ("version", &saved.version, &self.version);
        differ("machine", &saved.machine, &self.machine);
        differ("processor model", &saved.cpu, &self.cpu);
        differ("accelerator", &saved.accelerator, &self.accelerator);
        differ("network back end", &saved.netdev, &self.netdev);
        differ("device layout", &saved.layout, &self.layout);
        let apart = u64::from(saved.tsc_khz.abs_diff(self.tsc_khz));
        if apart * 1_000_000 > u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            differences.push(format!(
                "time stamp counter: {} kHz then, {} kHz here",
                saved.tsc_khz, self.tsc_khz
            ));
        }
        if differences.is_empty() {
            Ok(())
        } else {
            Err(Incompatible { differences })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Fingerprint {
        Fingerprint {
            vmm: "qemu".into(),
            version: "7.2.22".into(),
            machine: "microvm,acpi=on".into(),
            cpu: "max".into(),
            accelerator: Accelerator::Tcg,
            tsc_khz: 2_596_120,
            netdev: "tap".into(),
            layout: 1,
        }
    }

    #[test]
    fn a_second_measurement_of_the_same_counter_is_accepted() {
        let mut saved = here();
        saved.tsc_khz += 900;
        assert_eq!(here().accepts(&saved), Ok(()));
        saved.tsc_khz += 900;
        assert!(here().accepts(&saved).is_err());
    }

    #[test]
    fn every_difference_is_named() {
        let mut saved = here();
        saved.version = "9.0.1".into();
        saved.accelerator = Accelerator::Kvm;
        let error = here().accepts(&saved).unwrap_err();
        assert_eq!(
            error.differences,
            [
                "version: 9.0.1 then, 7.2.22 here",
                "accelerator: kvm then, tcg here"
            ]
        );
    }
}
