//! The keeper's life, from its start to the end of the monitor.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Gid, Pid, PidfdFlags, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, set_no_new_privs};

use super::console::{BoundedLog, Tail};
use super::orders::{Channel, Commit, FIRST_FD, Orders, Report, SERIAL_FD};
use crate::kernel;
use crate::machine::{ExitCause, ExitReason};
use crate::process::identify;

/// How much of the monitor's standard error is kept.
const STDERR_BYTES: usize = 4 << 10;

/// Open files of a monitor: its descriptors, event descriptors and those of later layers.
const MAX_OPEN_FILES: u64 = 512;

/// Stack of the companions' thread: an address range, of which only what is used costs
/// memory. An overflow would end the machine.
const COMPANION_STACK: usize = 1 << 20;

/// The body of the hidden `wrenn keeper` command: must be the first thing its process does,
/// while it has one thread and owns no descriptor but the standard three, of which standard
/// input is the channel to the agent.
///
/// `companions` runs in a thread of its own with the descriptors given in
/// [`crate::MachineSpec::companions`] and ends with the machine.
pub fn main(companions: impl FnOnce(Vec<OwnedFd>) + Send + 'static) -> ExitCode {
    let Ok(channel) = take_channel() else {
        return ExitCode::from(2);
    };
    let (mut monitor, fds) = match start(&channel) {
        Ok(Some(started)) => started,
        // The agent is gone: nobody to serve.
        Ok(None) => return ExitCode::FAILURE,
        Err(error) => {
            // If the agent is gone too, nobody needs to know.
            let _ = channel.send(&Report::Failed(error.to_string()), &[]);
            return ExitCode::FAILURE;
        }
    };
    if !fds.companions.is_empty() {
        let started = thread::Builder::new()
            .name("companions".into())
            .stack_size(COMPANION_STACK)
            .spawn(move || companions(fds.companions));
        if let Err(error) = started {
            // The monitor dies with this process.
            let _ = channel.send(&Report::Failed(format!("no thread: {error}")), &[]);
            return ExitCode::FAILURE;
        }
    }
    let reported = identify(std::process::id()).and_then(|keeper| {
        let vmm = identify(monitor.child.id())?;
        channel.send(&Report::Started { keeper, vmm }, &[])
    });
    if reported.is_err() {
        return ExitCode::FAILURE;
    }
    match monitor.watch(channel, BoundedLog::new(fds.console), &fds.exit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Takes the channel from standard input and closes all else that was inherited.
fn take_channel() -> io::Result<Channel> {
    kernel::close_inherited()?;
    let channel = io::stdin().as_fd().try_clone_to_owned()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(Channel::from_fd(channel))
}

/// The keeper's own descriptors.
struct Fds {
    console: File,
    exit: File,
    companions: Vec<OwnedFd>,
}

/// The monitor as the keeper sees it.
struct Monitor {
    child: Child,
    pidfd: OwnedFd,
    serial: File,
    stderr: File,
    tail: Tail,
}

fn start(channel: &Channel) -> io::Result<Option<(Monitor, Fds)>> {
    let Some((orders, fds)) = channel.receive::<Orders>()? else {
        return Ok(None);
    };
    let mut fds = fds.into_iter();
    let (Some(console), Some(exit)) = (fds.next(), fds.next()) else {
        return Err(io::Error::other("descriptors are missing"));
    };
    let monitor_fds: Vec<OwnedFd> = fds.by_ref().take(orders.monitor_fds).collect();
    let companions: Vec<OwnedFd> = fds.collect();
    if monitor_fds.len() != orders.monitor_fds || companions.len() != orders.companion_fds {
        return Err(io::Error::other("descriptors are missing"));
    }
    // Away from the agent's terminal and from any folder that may be unmounted.
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    confine(&orders).map_err(|error| {
        io::Error::other(format!(
            "cannot become user {} in group {} (is the agent root?): {error}",
            orders.uid, orders.gid
        ))
    })?;
    let monitor = spawn(&orders, monitor_fds)?;
    Ok(Some((
        monitor,
        Fds {
            console: File::from(console),
            exit: File::from(exit),
            companions,
        },
    )))
}

/// Gives up all rights before anything of the guest's runs; the monitor inherits that.
fn confine(orders: &Orders) -> io::Result<()> {
    let limit = |value| Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    // A core would hold the guest's memory.
    rustix::process::setrlimit(Resource::Core, limit(0))?;
    rustix::process::setrlimit(Resource::Nofile, limit(MAX_OPEN_FILES))?;
    set_no_new_privs(true)?;
    if rustix::process::geteuid().is_root() {
        for capability in CapabilitySet::all() {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // An older kernel does not know the newest ones.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let (uid, gid) = (Uid::from_raw(orders.uid), Gid::from_raw(orders.gid));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    } else if rustix::process::geteuid().as_raw() != orders.uid {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

fn spawn(orders: &Orders, fds: Vec<OwnedFd>) -> io::Result<Monitor> {
    let (serial, serial_in) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // The guest's console waits for the keeper rather than losing bytes.
    rustix::fs::fcntl_setfl(&serial_in, OFlags::empty())?;
    let (stderr, stderr_in) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    rustix::fs::fcntl_setfl(&stderr_in, OFlags::empty())?;
    let mut mappings = vec![FdMapping {
        parent_fd: serial_in,
        child_fd: SERIAL_FD,
    }];
    mappings.extend(
        (FIRST_FD..)
            .zip(fds)
            .map(|(child_fd, parent_fd)| FdMapping {
                parent_fd,
                child_fd,
            }),
    );
    let mut command = Command::new(&orders.program);
    command
        .args(&orders.args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(stderr_in))
        .fd_mappings(mappings)
        .map_err(io::Error::other)?;
    kernel::die_with_parent(&mut command);
    let child = command.spawn().map_err(|error| {
        io::Error::other(format!("cannot run {}: {error}", orders.program.display()))
    })?;
    // Dropping the command closes this process's copies of the monitor's descriptors.
    drop(command);
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("no process number"))?;
    Ok(Monitor {
        pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty())?,
        child,
        serial: File::from(serial),
        stderr: File::from(stderr),
        tail: Tail::new(STDERR_BYTES),
    })
}

impl Monitor {
    /// Serves the monitor until it ends, then writes down how.
    fn watch(&mut self, channel: Channel, mut log: BoundedLog, exit: &File) -> io::Result<()> {
        let mut channel = Some(channel);
        let (mut serial_open, mut stderr_open) = (true, true);
        let mut buffer = [0; 8192];
        loop {
            let [ended, serial, stderr, agent] = wait([
                Some(self.pidfd.as_fd()),
                serial_open.then(|| self.serial.as_fd()),
                stderr_open.then(|| self.stderr.as_fd()),
                channel.as_ref().map(Channel::as_fd),
            ])?;
            if serial {
                // A full disk must not end the machine: what cannot be kept is lost.
                serial_open = drain(&mut self.serial, &mut buffer, |bytes| {
                    let _ = log.write(bytes);
                });
            }
            if stderr {
                stderr_open = drain(&mut self.stderr, &mut buffer, |bytes| self.tail.push(bytes));
            }
            if ended && !serial && !stderr {
                // What it wrote before its end has been read: nothing more was ready.
                let status = self.child.wait()?;
                return self.record(status, exit);
            }
            if agent && let Some(open) = channel.take() {
                match open.receive::<Commit>() {
                    Ok(Some(_)) => {}
                    // The agent died before it recorded the machine. Keep no machine that
                    // nobody knows of.
                    Ok(None) | Err(_) => self.child.kill()?,
                }
            }
        }
    }

    fn record(&self, status: ExitStatus, exit: &File) -> io::Result<()> {
        let cause = match (status.code(), status.signal()) {
            (Some(code), _) => ExitCause::Status(code),
            (None, Some(signal)) => ExitCause::Signal(signal),
            (None, None) => ExitCause::Unseen,
        };
        let reason = ExitReason {
            cause,
            at_unix_ms: unix_ms(),
            stderr: self.tail.text(),
        };
        // One write of less than a page: a reader finds nothing or all of it.
        exit.write_all_at(&serde_json::to_vec(&reason)?, 0)
    }
}

/// Milliseconds since 1970; 0 on a host whose clock is before that.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis().try_into().unwrap_or(u64::MAX))
}

/// Reads all that is there; `false` at the end of the stream.
fn drain(pipe: &mut File, buffer: &mut [u8], mut take: impl FnMut(&[u8])) -> bool {
    loop {
        match pipe.read(buffer) {
            Ok(0) => return false,
            Ok(count) => {
                take(&buffer[..count]);
                if count < buffer.len() {
                    return true;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

/// Waits until one of `sources` has something to read or has ended, and tells which.
fn wait<const N: usize>(sources: [Option<BorrowedFd<'_>>; N]) -> io::Result<[bool; N]> {
    let mut polled: Vec<PollFd<'_>> = sources
        .iter()
        .flatten()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        match poll(&mut polled, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut results = polled.iter().map(|fd| !fd.revents().is_empty());
    Ok(sources.map(|source| source.is_some() && results.next() == Some(true)))
}
