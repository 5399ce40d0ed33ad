//! Signals and how children start: the parts that need the C library.
//!
//! PID 1 blocks the signals it serves and takes them one by one with `sigtimedwait`, so
//! that no handler runs and an idle guest has no wake-ups.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

/// The signals that PID 1 serves; SIGINT is Ctrl-Alt-Del, SIGPWR a failing power supply.
const SERVED: [libc::c_int; 4] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR];

/// What a signal asks of PID 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A child ended.
    Child,
    /// Power off in order.
    PowerOff,
    /// Nothing came within the time given.
    Timeout,
}

/// The served signals, blocked for the whole process.
pub struct Signals {
    set: libc::sigset_t,
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
        Ok(Signals { set })
    }

    /// Sleeps until one arrives, at most for `timeout` (`None`: as long as it takes).
    pub fn wait(&self, timeout: Option<Duration>) -> Event {
        let limit = timeout.map(|timeout| libc::timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: set and limit live through the call; a null limit means "no limit", and
        // the null second argument that no details are wanted.
        match unsafe { libc::sigtimedwait(&self.set, std::ptr::null_mut(), limit) } {
            libc::SIGCHLD => Event::Child,
            -1 => Event::Timeout,
            _ => Event::PowerOff,
        }
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

/// Starts a program in a session of its own with no signal blocked: the mask is inherited
/// over exec, and a program that never gets SIGTERM or SIGCHLD would misbehave.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let nothing = empty_set();
    // SAFETY: the closure runs between fork and exec; it makes two async-signal-safe calls
    // and touches no memory that another thread could hold.
    unsafe {
        command.pre_exec(move || {
            rustix::process::setsid()?;
            if libc::sigprocmask(libc::SIG_SETMASK, &nothing, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        })
    };
    command.spawn()
}
