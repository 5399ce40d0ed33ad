//! Signals and how children start: the parts that need the C library.
//!
//! PID 1 blocks the signals it serves and reads them from a descriptor, beside the agent's
//! socket, so that no handler runs and an idle guest has no wake-ups.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit};

/// The signals that PID 1 serves; SIGINT is Ctrl-Alt-Del, SIGPWR a failing power supply.
const SERVED: [libc::c_int; 4] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR];

/// What a signal asks of PID 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A child ended.
    Child,
    /// Power off in order.
    PowerOff,
    /// The agent has sent something, or has closed its end.
    Message,
    /// Nothing came within the time given.
    Timeout,
}

/// The served signals, blocked for the whole process.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks them. Must be called before any thread is started.
    pub fn block() -> io::Result<Self> {
        let mut set = empty_set();
        for signal in SERVED {
            // SAFETY: the set was initialised by `sigemptyset`; the numbers are constants.
            unsafe { libc::sigaddset(&mut set, signal) };
        }
        // SAFETY: changes only this thread's mask, with a set that lives through the call.
        if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: makes a new descriptor from a set that lives through the call.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Signals { fd })
    }

    /// Sleeps until one arrives or `socket` has something to say, at most for `timeout`
    /// (`None`: as long as it takes).
    pub fn wait(&self, timeout: Option<Duration>, socket: Option<BorrowedFd<'_>>) -> Event {
        let limit = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let mut fds = vec![PollFd::new(&self.fd, PollFlags::IN)];
        fds.extend(socket.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)));
        if rustix::event::poll(&mut fds, limit.as_ref()).is_err() {
            return Event::Timeout;
        }
        let said = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        match self.next() {
            Some(event) => event,
            None if said => Event::Message,
            None => Event::Timeout,
        }
    }

    fn next(&self) -> Option<Event> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.fd, &mut info).ok()?;
        // `ssi_signo` comes first; see signalfd(2).
        let signal = u32::from_ne_bytes(*info.first_chunk()?);
        Some(if signal == libc::SIGCHLD.unsigned_abs() {
            Event::Child
        } else {
            Event::PowerOff
        })
    }
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the whole set and cannot fail on a valid pointer.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

/// Open files of the programs that are started from here: as low as ever by default, since
/// some close or count all they may have, and as high as any asks for.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(MANY_FILES),
};
/// What the kernel allows at most by default is twice that.
const MANY_FILES: u64 = 524_288;

/// Descriptors of all programs that the agent follows are kept here too. Gives the limits
/// of programs that are started.
pub fn raise_open_files() -> io::Result<Rlimit> {
    let many = Rlimit {
        current: Some(MANY_FILES),
        maximum: Some(MANY_FILES),
    };
    rustix::process::setrlimit(Resource::Nofile, many)?;
    Ok(OPEN_FILES)
}

/// From now on this process takes no processor from another when it wakes (`SCHED_BATCH`, see
/// sched(7)). The agent tells it something in the middle of serving a request, and on one
/// processor the answer would wait until that is read. Programs started by [`spawn`] are not
/// held back.
pub fn stand_back() -> io::Result<()> {
    schedule(libc::SCHED_BATCH)
}

fn schedule(policy: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads a structure that lives through the call.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Starts a program in a session of its own with no signal blocked: the mask is inherited
/// over exec, and a program that never gets SIGTERM or SIGCHLD would misbehave. `inherited`
/// stays open in it under its number.
pub fn spawn(
    command: &mut Command,
    open_files: Option<Rlimit>,
    inherited: Option<&OwnedFd>,
) -> io::Result<Child> {
    let nothing = empty_set();
    let inherited = inherited.map(OwnedFd::try_clone).transpose()?;
    if let Some(fd) = &inherited {
        use std::os::fd::AsRawFd;
        command.env(crate::keeper::VARIABLE, fd.as_raw_fd().to_string());
    }
    // SAFETY: the closure runs between fork and exec; it makes async-signal-safe calls
    // and touches no memory that another thread could hold.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            schedule(libc::SCHED_OTHER)?;
            if let Some(limit) = open_files {
                rustix::process::setrlimit(Resource::Nofile, limit)?;
            }
            if let Some(fd) = &inherited {
                rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            }
            if libc::sigprocmask(libc::SIG_SETMASK, &nothing, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        })
    };
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_started_by_one_that_stands_back_does_not() {
        let policy = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let after_name = stat.rsplit(')').next().unwrap().to_owned();
            // The 41st field of proc_pid_stat(5); the third is the first after the name.
            after_name.split_whitespace().nth(41 - 3).unwrap().parse()
        };
        // In a thread of its own, for its policy stays.
        let started = std::thread::spawn(|| {
            stand_back().unwrap();
            spawn(Command::new("sleep").arg("60"), None, None).unwrap()
        });
        let mut child = started.join().unwrap();
        let found = policy(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found, Ok(libc::SCHED_OTHER));
    }
}
