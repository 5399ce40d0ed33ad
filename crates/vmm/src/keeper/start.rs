//! The agent's side: starting a keeper with a monitor, and recording both.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use super::Launcher;
use super::orders::{Channel, Commit, Console, Jail, Orders, Report};
use crate::VmmError;
use crate::machine::MachinePids;
use crate::process::boot_id;
use crate::record::{CONSOLE, EXIT, Monitor, Record};

/// A monitor to start.
pub(crate) struct Start {
    /// Which one it is.
    pub(crate) monitor: Monitor,
    /// The program, in its jail.
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// User and group of keeper and monitor.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) console: Console,
    pub(crate) jail: Jail,
    /// The jail's network namespace, if it has one.
    pub(crate) network: Option<OwnedFd>,
    /// A process, see pidfd_open(2), without which the monitor must not go on.
    pub(crate) guard: Option<OwnedFd>,
    /// The monitor's descriptors, from [`super::FIRST_FD`] on.
    pub(crate) fds: Vec<OwnedFd>,
    /// The companions' descriptors.
    pub(crate) companions: Vec<OwnedFd>,
}

impl Start {
    /// Starts the monitor under a keeper and writes both down in the machine's folder: from
    /// here on it lives by itself. If this fails or is given up there is no process.
    pub(crate) async fn run(
        self,
        launcher: &Launcher,
        dir: &Path,
        patience: Duration,
    ) -> Result<MachinePids, VmmError> {
        let monitor = self.monitor;
        let orders = Orders {
            program: self.program,
            args: self.args,
            uid: self.uid,
            gid: self.gid,
            monitor_fds: self.fds.len(),
            companion_fds: self.companions.len(),
            guarded: self.guard.is_some(),
            console: self.console,
            jail: self.jail,
        };
        let mut passed = vec![
            OwnedFd::from(new_file(dir, CONSOLE)?),
            OwnedFd::from(new_file(dir, EXIT)?),
        ];
        passed.extend(self.network);
        passed.extend(self.guard);
        passed.extend(self.fds);
        passed.extend(self.companions);
        let channel = spawn_keeper(launcher, &orders, passed)?;
        let (pids, channel) = await_report(channel, patience).await?;
        let boot_id = boot_id().map_err(|source| VmmError::Probe {
            what: "its boot id",
            source,
        })?;
        Record::new(boot_id, pids, monitor).write(dir)?;
        channel.send(&Commit, &[]).map_err(|error| {
            VmmError::Keeper(format!("it ended before the machine was recorded: {error}"))
        })?;
        Ok(pids)
    }
}

fn new_file(dir: &Path, name: &str) -> Result<File, VmmError> {
    let path = dir.join(name);
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| VmmError::File {
            what: "cannot create",
            path,
            source,
        })
}

/// Starts a keeper and gives it its orders. Without a hook between fork and exec, so that
/// the standard library may use vfork: the agent may be large.
fn spawn_keeper(
    launcher: &Launcher,
    orders: &Orders,
    fds: Vec<OwnedFd>,
) -> Result<Channel, VmmError> {
    let failed =
        |error: io::Error| VmmError::Keeper(format!("{}: {error}", launcher.program.display()));
    let (channel, theirs) = Channel::pair().map_err(failed)?;
    let mut child = tokio::process::Command::new(&launcher.program)
        .args(&launcher.args)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(false)
        .spawn()
        .map_err(failed)?;
    tokio::spawn(async move {
        // Only so that it does not stay a zombie: how the machine ended is in exit.json.
        if let Err(error) = child.wait().await {
            tracing::warn!(%error, "a keeper could not be waited for");
        }
    });
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    channel.send(orders, &borrowed).map_err(failed)?;
    Ok(channel)
}

/// Waits for the keeper's word and gives the channel back.
async fn await_report(
    channel: Channel,
    patience: Duration,
) -> Result<(MachinePids, Channel), VmmError> {
    let failed = |error: io::Error| VmmError::Keeper(error.to_string());
    let readable = crate::kernel::await_readable(channel.into_fd()).map_err(failed)?;
    match tokio::time::timeout(patience, readable.readable()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => return Err(failed(error)),
        Err(_) => {
            return Err(VmmError::Keeper(format!(
                "it gave no sign of life within {} s",
                patience.as_secs()
            )));
        }
    }
    let channel = Channel::from_fd(readable.into_inner());
    match channel.receive::<Report>().map_err(failed)? {
        Some((Report::Started { keeper, vmm }, _)) => Ok((MachinePids { keeper, vmm }, channel)),
        Some((Report::Failed(why), _)) => Err(VmmError::Keeper(why)),
        None => Err(VmmError::Keeper(
            "it ended before it started anything".into(),
        )),
    }
}
