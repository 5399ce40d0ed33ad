//! The guest agent of this binary, run as a plain process of this machine.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

/// It is there within a few milliseconds.
const START: Duration = Duration::from_secs(10);

/// Why it does not run.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    #[error("cannot put the guest agent into memory")]
    Memory(#[source] io::Error),
    #[error("cannot start the guest agent")]
    Start(#[source] io::Error),
    #[error("the guest agent did not say where it listens, but `{0}`")]
    Silent(String),
    #[error("cannot read how much memory the guest agent uses")]
    Status(#[source] io::Error),
}

/// A running agent; ended on drop, and with it the programs it started, which read from it
/// or write to it.
#[derive(Debug)]
pub(super) struct Agent {
    child: Child,
    /// Where it listens.
    pub(super) address: SocketAddr,
    /// Kept open: what it prints later must not meet a closed pipe.
    _stdout: BufReader<ChildStdout>,
}

impl Agent {
    /// Starts `program`, an ELF file, from memory: nothing is left on disk whatever happens.
    pub(super) async fn start(program: &[u8]) -> Result<Agent, AgentError> {
        let file = rustix::fs::memfd_create("envd", MemfdFlags::CLOEXEC)
            .map_err(|errno| AgentError::Memory(errno.into()))?;
        let mut file = std::fs::File::from(file);
        file.write_all(program).map_err(AgentError::Memory)?;
        let mut child = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .arg0("envd")
            .args(["--no-vm", "--listen", "127.0.0.1", "--port", "0"])
            .env("ENVD_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(AgentError::Start)?;
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| AgentError::Silent(String::new()))?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        match tokio::time::timeout(START, stdout.read_line(&mut line)).await {
            Ok(read) => read.map_err(AgentError::Start)?,
            Err(_) => return Err(AgentError::Silent("nothing".to_owned())),
        };
        let address = line
            .trim()
            .parse()
            .map_err(|_| AgentError::Silent(line.trim().to_owned()))?;
        Ok(Agent {
            child,
            address,
            _stdout: stdout,
        })
    }

    /// Bytes of its memory that are resident.
    pub(super) fn resident(&self) -> Result<u64, AgentError> {
        let pid = self
            .child
            .id()
            .ok_or_else(|| AgentError::Status(io::Error::other("it has ended")))?;
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/status")).map_err(AgentError::Status)?;
        resident(&status).ok_or_else(|| {
            AgentError::Status(io::Error::other("/proc/PID/status is not as proc(5) says"))
        })
    }

    /// Ends it and waits until it is gone.
    pub(super) async fn stop(mut self) -> Result<(), AgentError> {
        self.child.kill().await.map_err(AgentError::Status)
    }
}

fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read_as_its_manual_says() {
        assert_eq!(
            resident("Name:\tx\nVmRSS:\t    9216 kB\n"),
            Some(9216 << 10)
        );
        assert_eq!(resident("Name:\tx\n"), None);
    }

    #[tokio::test]
    async fn what_is_no_agent_is_said_so() {
        let error = Agent::start(b"#!/bin/sh\necho hello\n").await;
        assert!(error.is_err(), "{error:?}");
    }
}
