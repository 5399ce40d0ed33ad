//! The keeper's life, from its start to the end of the monitor.

use std::fs::File;
use std::io::{self, Read, Write};
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
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_no_new_privs,
};

use super::console::{BoundedLog, Tail};
use super::jail;
use super::orders::{Channel, Commit, Console, FIRST_FD, Orders, Report, SERIAL_FD};
use crate::kernel;
use crate::machine::{ExitCause, ExitReason};
use crate::process::identify;

/// How much of the monitor's standard error is kept.
const STDERR_BYTES: usize = 4 << 10;

/// Open files of a monitor: its descriptors, event descriptors and those of later layers.
const MAX_OPEN_FILES: u64 = 512;

/// How much a guest may print while the keeper is busy: a monitor that writes to its standard
/// output does not wait for it.
const CONSOLE_PIPE: usize = 256 << 10;

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
    match monitor.watch(channel, BoundedLog::new(fds.console), &fds.exit, fds.guard) {
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
    guard: Option<OwnedFd>,
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
    let networked = orders.jail.network;
    let network = if networked { fds.next() } else { None };
    let guard = if orders.guarded { fds.next() } else { None };
    let monitor_fds: Vec<OwnedFd> = fds.by_ref().take(orders.monitor_fds).collect();
    let companions: Vec<OwnedFd> = fds.collect();
    if networked != network.is_some()
        || orders.guarded != guard.is_some()
        || monitor_fds.len() != orders.monitor_fds
        || companions.len() != orders.companion_fds
    {
        return Err(io::Error::other("descriptors are missing"));
    }
    // Away from the agent's terminal and from any folder that may be unmounted.
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    // Only root can lock something in, so the monitor confines itself before this does.
    let monitor = alone(|| spawn(&orders, monitor_fds, network))?;
    confine_as(&orders)?;
    Ok(Some((
        monitor,
        Fds {
            console: File::from(console),
            exit: File::from(exit),
            guard,
            companions,
        },
    )))
}

/// Gives up all rights before anything of the guest's runs; the monitor inherits that.
fn confine(uid: u32, gid: u32) -> io::Result<()> {
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
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    } else if rustix::process::geteuid().as_raw() != uid {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Has what `spawn` starts see no process but itself: it is the first of a new process
/// namespace. This process stays in its own, and may have threads again afterwards.
fn alone<T>(spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let ours = File::open("/proc/self/ns/pid")?;
    kernel::unshare(UnshareFlags::NEWPID)?;
    let spawned = spawn();
    let kind = Some(LinkNameSpaceType::ProcessID);
    move_into_link_name_space(ours.as_fd(), kind)?;
    spawned
}

/// [`confine`], with words for its failure.
fn confine_as(orders: &Orders) -> io::Result<()> {
    confine(orders.uid, orders.gid).map_err(|error| {
        io::Error::other(format!(
            "cannot become user {} in group {} (is the agent root?): {error}",
            orders.uid, orders.gid
        ))
    })
}

/// A pipe from the monitor, whose end it writes to is its user's, so that it can also be
/// opened anew.
fn pipe_from(orders: &Orders) -> io::Result<(OwnedFd, OwnedFd)> {
    let (output, input) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // The monitor waits for the keeper rather than losing bytes.
    rustix::fs::fcntl_setfl(&input, OFlags::empty())?;
    if rustix::process::geteuid().is_root() {
        let (uid, gid) = (Uid::from_raw(orders.uid), Gid::from_raw(orders.gid));
        rustix::fs::fchown(&input, Some(uid), Some(gid))?;
    }
    Ok((output, input))
}

fn spawn(orders: &Orders, fds: Vec<OwnedFd>, network: Option<OwnedFd>) -> io::Result<Monitor> {
    let (serial, serial_in) = pipe_from(orders)?;
    let (mut stderr, stderr_in) = {
        let (output, input) = pipe_from(orders)?;
        (File::from(output), input)
    };
    let mut command = Command::new(&orders.program);
    command
        .args(&orders.args)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(stderr_in));
    let mut mappings = Vec::with_capacity(fds.len() + 1);
    match orders.console {
        Console::Descriptor => mappings.push(FdMapping {
            parent_fd: serial_in,
            child_fd: SERIAL_FD,
        }),
        Console::Stdout => {
            rustix::pipe::fcntl_setpipe_size(&serial_in, CONSOLE_PIPE)?;
            command.stdout(Stdio::from(serial_in));
        }
    }
    lock_in(&mut command, network, orders);
    mappings.extend(
        (FIRST_FD..)
            .zip(fds)
            .map(|(child_fd, parent_fd)| FdMapping {
                parent_fd,
                child_fd,
            }),
    );
    command.fd_mappings(mappings).map_err(io::Error::other)?;
    kernel::die_with_parent(&mut command)?;
    let spawned = command.spawn();
    // Dropping the command closes this process's copies of the monitor's descriptors.
    drop(command);
    let child = spawned.map_err(|error| {
        // What could not be done before the program was run is told there.
        let mut words = [0; 512];
        let count = stderr.read(&mut words).unwrap_or(0);
        let program = orders.program.display();
        match String::from_utf8_lossy(&words[..count]).trim() {
            "" => io::Error::other(format!("cannot run {program}: {error}")),
            why => io::Error::other(format!("cannot run {program}: {why}")),
        }
    })?;
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("no process number"))?;
    Ok(Monitor {
        pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty())?,
        child,
        serial: File::from(serial),
        stderr,
        tail: Tail::new(STDERR_BYTES),
    })
}

/// Has the child of `command` build its jail and give up its rights before anything else.
fn lock_in(command: &mut Command, network: Option<OwnedFd>, orders: &Orders) {
    let (jail, uid, gid) = (orders.jail.clone(), orders.uid, orders.gid);
    let hook = move || {
        jail::enter(&jail, uid, gid, network.as_ref().map(AsFd::as_fd))
            .and_then(|()| confine(uid, gid))
            .inspect_err(|error| {
                // The parent gets the number of an error at most; its words go this way.
                let _ = io::stderr().write_all(error.to_string().as_bytes());
            })
    };
    kernel::before_program(command, hook);
}

impl Monitor {
    /// Serves the monitor until it ends, then writes down how.
    fn watch(
        &mut self,
        channel: Channel,
        mut log: BoundedLog,
        exit: &File,
        mut guard: Option<OwnedFd>,
    ) -> io::Result<()> {
        let mut channel = Some(channel);
        let (mut serial_open, mut stderr_open) = (true, true);
        let mut buffer = [0; 8192];
        loop {
            let [ended, serial, stderr, agent, unguarded] = wait([
                Some(self.pidfd.as_fd()),
                serial_open.then(|| self.serial.as_fd()),
                stderr_open.then(|| self.stderr.as_fd()),
                channel.as_ref().map(Channel::as_fd),
                guard.as_ref().map(AsFd::as_fd),
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
            if unguarded && !ended {
                guard = None;
                self.tail
                    .push(b"wrenn: the process that serves its memory has ended\n");
                self.child.kill()?;
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
