//! Processes by number: told apart by start time, watched through a pidfd.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

use crate::machine::ProcessId;

/// The process that has number `pid` now.
pub(crate) fn identify(pid: u32) -> io::Result<ProcessId> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let start_time = start_time(&stat).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{pid}/stat is not as proc(5) says"),
        )
    })?;
    Ok(ProcessId { pid, start_time })
}

/// Field 22. The name, field 2, may hold spaces and parentheses: count from its end.
fn start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Identifies this run of the host: start times are only comparable within it.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// Bytes of a process that it shares with no other.
pub(crate) fn private_bytes(pid: u32) -> io::Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    Ok(rollup
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .sum::<u64>()
        * 1024)
}

/// A process held by a descriptor, so that its number cannot be reused unnoticed.
pub(crate) struct Watched {
    pidfd: AsyncFd<OwnedFd>,
}

impl Watched {
    /// Holds `process`; `None` when it has ended.
    pub(crate) fn open(process: ProcessId) -> io::Result<Option<Watched>> {
        let pid = i32::try_from(process.pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Checked after it is held: a number that was reused shows another start time.
        match identify(process.pid) {
            Ok(found) if found == process => {}
            Ok(_) => return Ok(None),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ESRCH) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        Ok(Some(Watched {
            pidfd: crate::kernel::await_readable(pidfd)?,
        }))
    }

    /// Returns when the process has ended.
    pub(crate) async fn ended(&self) -> io::Result<()> {
        self.pidfd.readable().await.map(drop)
    }

    /// Sends SIGKILL; fine if it has ended.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_start_time() {
        let fields: Vec<String> = (3..30).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) b) {}", fields.join(" "));
        assert_eq!(start_time(&stat), Some(22));
        assert_eq!(start_time("7 (a"), None);
    }

    #[tokio::test]
    async fn a_reused_number_is_another_process() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = identify(child.id()).unwrap();
        let other = ProcessId {
            start_time: id.start_time + 1,
            ..id
        };
        assert!(Watched::open(other).unwrap().is_none());
        let watched = Watched::open(id).unwrap().unwrap();
        watched.kill().unwrap();
        watched.ended().await.unwrap();
        child.wait().unwrap();
        assert!(Watched::open(id).unwrap().is_none());
        watched.kill().unwrap();
    }
}
