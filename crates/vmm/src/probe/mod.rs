//! What this host can do, found by trying, and how guests shall be executed on it.

mod choose;
mod cpu;
mod features;
mod kvm;
mod tools;

use std::path::Path;

use serde::Serialize;

pub(crate) use choose::usable_firecracker;
pub use choose::{Choice, Driver, DriverChoice, choose, choose_driver};
pub use cpu::Cpu;
pub use features::{Feature, Limits, Measured};
pub use kvm::Kvm;
pub use tools::{Monitor, Tool};

use crate::VmmError;

/// The oldest QEMU that works.
pub const QEMU_MINIMUM: &str = "7.2";

/// The oldest Firecracker that is safe: earlier ones have CVE-2026-1386 and CVE-2026-5747.
pub const FIRECRACKER_MINIMUM: &str = "1.15.1";

/// All that was found out about this host.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostReport {
    /// Release of the kernel, such as `6.1.0-56-cloud-amd64`.
    pub kernel: String,
    /// The processor.
    pub cpu: Cpu,
    /// Whether guests can run on the processor itself.
    pub kvm: Kvm,
    /// QEMU; `None` where it is not installed.
    pub qemu: Option<Tool>,
    /// Firecracker; `None` where it is not installed.
    pub firecracker: Option<Tool>,
    /// What runs the machines if nobody asks for something else.
    pub monitor: DriverChoice,
    /// What the kernel and the data folder offer.
    pub features: Vec<Feature>,
    /// What there is of everything.
    pub limits: Limits,
}

impl HostReport {
    /// Whether something works here that was tried, by its name among the features.
    pub fn has(&self, feature: &str) -> bool {
        let mut found = self.features.iter().filter(|it| it.name == feature);
        found.any(|it| it.available == Measured::Yes)
    }
}

/// Examines this host, which takes about 100 ms. `data_dir` is where sandboxes will live;
/// without it, reflinks are not tried. Blocking.
pub fn host(data_dir: Option<&Path>) -> Result<HostReport, VmmError> {
    let failed = |what| move |source| VmmError::Probe { what, source };
    let cpu = Cpu::probe().map_err(failed("its processor"))?;
    let kvm = Kvm::probe(&cpu);
    let mut report = HostReport {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        cpu,
        kvm,
        qemu: tools::find(Monitor::Qemu),
        firecracker: tools::find(Monitor::Firecracker),
        monitor: DriverChoice {
            driver: Driver::Qemu,
            why: String::new(),
        },
        features: features::probe(data_dir),
        limits: Limits::probe().map_err(failed("its limits"))?,
    };
    report.monitor = choose_driver(&report, None)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_described_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let report = host(Some(dir.path())).unwrap();
        assert_eq!(report.cpu.tsc_khz / 100_000, second_measurement() / 100_000);
        assert!(report.cpu.slowness > 0.1 && report.cpu.slowness < 50.0);
        let qemu = report.qemu.as_ref().unwrap();
        assert!(qemu.usable && qemu.version.as_ref().unwrap().contains('.'));
        assert!(report.limits.memory_bytes > 1 << 30 && report.limits.cpus >= 1);
        let feature = |name: &str| report.features.iter().find(|f| f.name == name).unwrap();
        assert_eq!(feature("memfd seals").available, Measured::Yes);
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
        let json = serde_json::to_value(&report).unwrap();
        assert!(json["cpu"]["tscKhz"].is_number());
        println!("{}", serde_json::to_string_pretty(&json).unwrap());
    }

    fn second_measurement() -> u32 {
        Cpu::probe().unwrap().tsc_khz
    }
}
