//! PID 1 of a guest, in two roles of one static binary.
//!
//! ```text
//! kernel ─▶ /init in the initramfs   modules, root file system, switch_root   (initramfs.rs)
//!              └─exec─▶ /sbin/wrenn-init in the root   mounts, cgroups, network  (setup.rs)
//!                          └─ supervises envd and chronyd, reaps orphans       (supervisor.rs)
//!                             └─ keeps for the next envd what a crash would lose (keeper/)
//! ```
//!
//! A guest boots once per template and is restored ever after, so what matters most is that
//! it is small and silent: between signals it sleeps in one system call without a timeout.
//! Whatever fails here is told on the console and survived where the guest is still of use.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cgroup;
mod console;
mod initramfs;
pub mod keeper;
mod modules;
mod netlink;
mod setup;
mod signals;
mod supervisor;

pub use supervisor::supervise;

use console::log;
use std::process::ExitCode;

/// Name under which the kernel starts an initramfs' program.
const INITRAMFS_NAME: &str = "/init";

/// Process 1 of a guest; elsewhere it refuses.
pub fn main() -> ExitCode {
    let name = std::env::args().next().unwrap_or_default();
    if std::process::id() != 1 {
        log(format_args!(
            "this program starts a guest and runs only as its process 1"
        ));
        return ExitCode::from(2);
    }
    if name == INITRAMFS_NAME {
        // On success this never returns: the process has become the root's init.
        let failure = initramfs::run();
        log(format_args!("cannot start the root file system: {failure}"));
        // PID 1 that ends makes the kernel panic, and `panic=1` ends the machine: the host
        // sees a dead VM with this line in its console log instead of one that hangs.
        return ExitCode::FAILURE;
    }
    setup::run();
    supervisor::run();
    ExitCode::SUCCESS
}
