//! What the tests start as processes of their own: a keeper, and an agent to be killed.
//!
//! - `harness keeper` is a keeper whose companion answers each packet with `kept: ` before it.
//! - `harness agent DIR KERNEL INITRAMFS CMDLINE BASE TOP` boots a machine, prints `booted`
//!   and sleeps.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use wrenn_types::Shape;
use wrenn_vmm::{
    BootFiles, BootSpec, DiskChain, Launcher, MachineSpec, MemoryFile, QemuConfig, QemuVmm, Vmm,
    keeper, probe,
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
        _ => ExitCode::from(64),
    }
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
        companions: Vec::new(),
    };
    let memory = Arc::new(MemoryFile::create(Shape::DEFAULT.memory.bytes())?);
    tokio::runtime::Runtime::new()?.block_on(async {
        let _machine = vmm.boot(BootSpec { machine, memory }).await?;
        println!("booted");
        std::io::stdout().flush()?;
        std::future::pending::<()>().await;
        Ok(())
    })
}
