//! What the tests start as processes of their own: a keeper, and an agent to be killed.
//!
//! - `harness keeper` is a keeper whose companion answers each packet with `kept: ` before it.
//! - `harness agent DIR KERNEL INITRAMFS CMDLINE BASE TOP` boots a machine, prints `booted`
//!   and sleeps.
//! - `harness firecracker-agent BED DIR` does the same with Firecracker, with the files that
//!   its tests put into BED.
//! - `harness mapped-disks FOLDER` tries disks of the device mapper, as root of a guest, and ends
//!   with a line about what came of it; `harness hold IMAGE LAYER` uses one until it is killed.

mod mapped;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use wrenn_types::{MemoryMib, Shape, Vcpus};
use wrenn_vmm::{
    BootFiles, BootSpec, DiskChain, DiskLimits, FirecrackerConfig, FirecrackerVmm, Launcher,
    MachineSpec, MemoryFile, QemuConfig, QemuVmm, Vmm, keeper, probe,
};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["keeper"] => keeper::main(|fds| {
            for fd in fds {
                let mut buffer = [0; 512];
                while let Ok(count @ 1..) = rustix::io::read(&fd, &mut buffer) {
                    let answer = [b"kept: ", &buffer[..count]].concat();
                    if rustix::io::write(&fd, &answer).is_err() {
                        break;
                    }
                }
            }
        }),
        ["agent", dir, kernel, initramfs, cmdline, base, top] => {
            match agent(dir, kernel, initramfs, cmdline, base, top) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    println!("{error}");
                    ExitCode::FAILURE
                }
            }
        }
        ["firecracker-agent", bed, dir] => {
            match firecracker_agent(Path::new(bed), Path::new(dir)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    println!("{error}");
                    ExitCode::FAILURE
                }
            }
        }
        ["mapped-disks", folder] => match mapped::try_all(Path::new(folder)) {
            Ok(()) => {
                println!("MAPPED whole.");
                ExitCode::SUCCESS
            }
            Err(error) => {
                println!("MAPPED broken: {error}.");
                ExitCode::FAILURE
            }
        },
        ["hold", image, layer] => match mapped::hold(Path::new(image), Path::new(layer)) {
            Ok(never) => match never {},
            Err(error) => {
                println!("{error}");
                ExitCode::FAILURE
            }
        },
        _ => ExitCode::from(64),
    }
}

fn firecracker_agent(bed: &Path, dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let report = probe::host(None)?;
    let config = FirecrackerConfig::from_report(&report, String::new(), Launcher::default(), bed)?;
    let vmm = FirecrackerVmm::new(config);
    let shape = Shape {
        vcpus: Vcpus(1),
        memory: MemoryMib(64),
    };
    let machine = MachineSpec {
        dir: dir.into(),
        uid: 10_091,
        gid: 10_091,
        shape,
        boot: BootFiles {
            kernel: bed.join("kernel"),
            initramfs: bed.join("initramfs"),
            cmdline: "console=ttyS0".into(),
        },
        disk: DiskChain {
            base: bed.join("base.img"),
            layers: Vec::new(),
            top: dir.join("disk.raw"),
        },
        tap: None,
        mac: [2, 0xfc, 0, 0, 0, 1],
        identity: Box::new([0; 4096]),
        disk_limits: DiskLimits::default(),
        companions: Vec::new(),
    };
    boot_and_sleep(&vmm, machine, shape)
}

fn boot_and_sleep(
    vmm: &dyn Vmm,
    machine: MachineSpec,
    shape: Shape,
) -> Result<(), Box<dyn std::error::Error>> {
    let memory = Arc::new(MemoryFile::create(shape.memory.bytes())?);
    tokio::runtime::Runtime::new()?.block_on(async {
        let _machine = vmm.boot(BootSpec { machine, memory }).await?;
        println!("booted");
        std::io::stdout().flush()?;
        std::future::pending::<()>().await;
        Ok(())
    })
}

fn agent(
    dir: &str,
    kernel: &str,
    initramfs: &str,
    cmdline: &str,
    base: &str,
    top: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    let report = probe::host(None)?;
    let choice = probe::choose(&report, None)?;
    let vmm = QemuVmm::new(QemuConfig::from_report(
        &report,
        choice,
        Launcher::default(),
    )?);
    let machine = MachineSpec {
        dir: PathBuf::from(dir),
        uid: 10_090,
        gid: 10_090,
        shape: Shape::DEFAULT,
        boot: BootFiles {
            kernel: kernel.into(),
            initramfs: initramfs.into(),
            cmdline: cmdline.into(),
        },
        disk: DiskChain {
            base: Path::new(base).into(),
            layers: Vec::new(),
            top: Path::new(top).into(),
        },
        tap: None,
        mac: [2, 0xfc, 0, 0, 0, 1],
        identity: Box::new([0; 4096]),
        disk_limits: DiskLimits::default(),
        companions: Vec::new(),
    };
    boot_and_sleep(&vmm, machine, Shape::DEFAULT)
}
