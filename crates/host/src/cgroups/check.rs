//! Whether limits hold on the host this runs on, with real control groups of whichever version:
//! the end-to-end tests run this on the host and, for the other version, in a guest.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use wrenn_vmm::DiskLimits;

use super::{Cgroups, Limits, settings};

/// Confines a process to a group that it fills, on the host this runs on: real control groups
/// of whichever version. Prints what was seen; the end-to-end tests run it on the host and, for
/// the other version, in a guest.
///
/// # Errors
///
/// What did not hold.
pub async fn self_check() -> Result<String, String> {
    let name = format!("wrenn-check-{}", std::process::id());
    let cgroups = Cgroups::probe(&name);
    let version = cgroups.describe()?;
    let limits = Limits {
        cpu_percent: 20,
        memory: 32 << 20,
        tasks: 8,
    };
    // It waits, so that what it allocates counts in the group.
    let mut child = waiting("tail /dev/zero")?;
    let pid = child.id().ok_or("it has ended already")?;
    let checked = async {
        cgroups
            .confine("m-check", limits, &[pid])
            .map_err(|e| e.to_string())?;
        let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|e| e.to_string())?;
        if !own.contains("m-check") {
            return Err(format!("the process is not in its group: {own}"));
        }
        for (controller, folder) in cgroups.folders("m-check") {
            for (file, value) in settings(controller, limits) {
                let set = fs::read_to_string(folder.join(file)).map_err(|e| e.to_string())?;
                if set.trim() != value {
                    return Err(format!("{file} is {set}, not {value}"));
                }
            }
        }
        go(&mut child).await?;
        let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
        let status = ended
            .map_err(|_| "it was not stopped by its memory limit")?
            .map_err(|e| e.to_string())?;
        if std::os::unix::process::ExitStatusExt::signal(&status) != Some(9) {
            return Err(format!(
                "it was to be killed for want of memory, not: {status}"
            ));
        }
        match cgroups.oom_kills("m-check") {
            0 => Err("the kernel's kill was not counted".to_owned()),
            _ => Ok(()),
        }
    };
    let checked = checked.await;
    let removed = cgroups.remove("m-check").await;
    cgroups.close();
    checked?;
    removed.map_err(|e| e.to_string())?;
    match cgroups.machines().is_empty() {
        true => Ok(version),
        false => Err("a group is left over".to_owned()),
    }
}

/// Bytes per second to which the disk is limited by the check, and bytes it writes and reads.
const SLOW: u64 = 2_000_000;
const WRITTEN: u64 = 6_000_000;

/// Has a process that is limited to 2 MB/s write 6 MB past the cache into a file in `folder` and read
/// them back. Says how long each took.
///
/// # Errors
/// What did not hold, or why a disk cannot be limited here.
pub async fn disk_self_check(folder: &Path) -> Result<(Duration, Duration), String> {
    let mut cgroups = Cgroups::probe(&format!("wrenn-disk-{}", std::process::id()));
    let limits = DiskLimits {
        bytes_per_sec: Some(SLOW),
        operations_per_sec: None,
    };
    cgroups.limit_disk(folder, limits)?;
    let file = folder.join(format!("disk-check-{}", std::process::id()));
    let flags = format!("bs={} count={}", 500_000 / 4096 * 4096, WRITTEN / 500_000);
    let path = file.display();
    let write = format!("dd if=/dev/zero of={path} {flags} oflag=direct");
    let read = format!("dd if={path} of=/dev/null {flags} iflag=direct");
    let checked = async {
        let wrote = limited(&cgroups, &write).await?;
        Ok((wrote, limited(&cgroups, &read).await?))
    };
    let checked: Result<(Duration, Duration), String> = checked.await;
    let removed = cgroups.remove("m-disk").await;
    cgroups.close();
    fs::remove_file(&file).map_err(|error| error.to_string())?;
    let (wrote, was_read) = checked?;
    removed.map_err(|error| error.to_string())?;
    // The kernel lets the first tenth of a second through at once.
    let least = Duration::from_secs(WRITTEN / SLOW - 1);
    match wrote > least && was_read > least {
        true => Ok((wrote, was_read)),
        false => Err(format!(
            "6 MB at 2 MB/s took {wrote:?} to write and {was_read:?} to read"
        )),
    }
}

/// How long a command takes in a limited group.
async fn limited(cgroups: &Cgroups, command: &str) -> Result<Duration, String> {
    let mut child = waiting(command)?;
    let pid = child.id().ok_or("it has ended already")?;
    let limits = Limits {
        cpu_percent: 100,
        memory: 64 << 20,
        tasks: 8,
    };
    let confined = cgroups.confine("m-disk", limits, &[pid]);
    confined.map_err(|error| error.to_string())?;
    let began = Instant::now();
    go(&mut child).await?;
    let status = child.wait().await.map_err(|error| error.to_string())?;
    match status.success() {
        true => Ok(began.elapsed()),
        false => Err(format!("`{command}` ended with {status}")),
    }
}

/// A process that does nothing until it is told to become this command.
fn waiting(command: &str) -> Result<Child, String> {
    Command::new("/bin/bash")
        .args(["-c", &format!("read go; exec {command}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("no process to confine: {e}"))
}

async fn go(child: &mut Child) -> Result<(), String> {
    let mut input = child.stdin.take().ok_or("no input")?;
    tokio::io::AsyncWriteExt::write_all(&mut input, b"go\n")
        .await
        .map_err(|e| e.to_string())
}
