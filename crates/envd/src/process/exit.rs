//! How a program ended, in the words E2B's clients read.

use rustix::process::WaitIdStatus;

/// A program's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal {
        /// Its number.
        number: i32,
        /// Whether a core file was written.
        dumped: bool,
    },
    /// Known only to an agent that crashed before it could say so.
    Lost,
}

impl Exit {
    /// From what waitid(2) says of a process that has ended.
    pub fn from_wait(status: &WaitIdStatus) -> Exit {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(number)) => Exit::Signal {
                number,
                dumped: status.dumped(),
            },
            // `WEXITED` reports nothing else.
            (None, None) => Exit::Signal {
                number: 0,
                dumped: false,
            },
        }
    }

    /// The status, or -1 where a signal ended it.
    pub fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal { .. } | Exit::Lost => -1,
        }
    }

    /// Whether it ended by itself.
    pub fn exited(self) -> bool {
        matches!(self, Exit::Code(_))
    }

    /// `exit status 3`, `signal: killed`.
    pub fn status(self) -> String {
        match self {
            Exit::Code(code) => format!("exit status {code}"),
            Exit::Signal { number, dumped } => {
                let core = if dumped { " (core dumped)" } else { "" };
                format!("signal: {}{core}", signal_name(number))
            }
            Exit::Lost => "unknown: the guest agent was restarted as it ended".to_owned(),
        }
    }

    /// The same, where it was no success.
    pub fn error(self) -> Option<String> {
        (self != Exit::Code(0)).then(|| self.status())
    }
}

/// Signals in words, see signal(7).
fn signal_name(number: i32) -> String {
    let name = match number {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        libc::SIGXCPU => "CPU time limit exceeded",
        libc::SIGXFSZ => "file size limit exceeded",
        libc::SIGSYS => "bad system call",
        other => return format!("signal {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_read_as_clients_expect() {
        assert_eq!(
            (Exit::Code(0).status().as_str(), Exit::Code(0).error()),
            ("exit status 0", None)
        );
        assert_eq!(Exit::Code(3).error().as_deref(), Some("exit status 3"));
        let killed = Exit::Signal {
            number: 9,
            dumped: false,
        };
        assert_eq!((killed.code(), killed.exited()), (-1, false));
        assert_eq!(killed.error().as_deref(), Some("signal: killed"));
        let segv = Exit::Signal {
            number: 11,
            dumped: true,
        };
        assert_eq!(segv.status(), "signal: segmentation fault (core dumped)");
        assert_eq!(
            Exit::Signal {
                number: 40,
                dumped: false
            }
            .status(),
            "signal: signal 40"
        );
    }
}
