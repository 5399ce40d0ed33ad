//! Exit codes: what a caller of `wrenn` may rely on.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | it failed; the message says why |
//! | 2 | wrong usage |
//! | 124 | `run`, `exec`, `drain --wait`: the time limit that was asked for is over |
//! | 125 | `run`, `exec`, `shell`: Wrenn itself failed, so nothing is known about the command |
//! | 126 | `run`, `exec`, `shell`: the command is there but cannot be executed |
//! | 127 | `run`, `exec`, `shell`: no such command in the sandbox |
//! | 128+n | ended by signal n, in the sandbox or here (130: Ctrl-C) |
//! | other | `run`, `exec`, `shell`: the command's own |

use std::process::ExitCode;

/// How `wrenn` ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok,
    /// It failed.
    Failed,
    /// Wrong usage; clap ends with the same code for what it finds itself.
    Usage,
    /// The time limit is over.
    TimedOut,
    /// Wrenn failed before or beside the command.
    RunFailed,
    /// The command cannot be executed.
    NotExecutable,
    /// There is no such command.
    NotFound,
    /// A signal ended it.
    Signal(u8),
    /// The command's own exit code.
    Command(u8),
}

impl Exit {
    /// The number for the shell.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::TimedOut => 124,
            Exit::RunFailed => 125,
            Exit::NotExecutable => 126,
            Exit::NotFound => 127,
            // Linux knows signals 1 to 64, so this stays below 193.
            Exit::Signal(n) => 128 + (n & 0x7f),
            Exit::Command(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_shells_and_docker() {
        assert_eq!(Exit::Ok.code(), 0);
        assert_eq!(Exit::Failed.code(), 1);
        assert_eq!(Exit::RunFailed.code(), 125);
        assert_eq!(Exit::NotExecutable.code(), 126);
        assert_eq!(Exit::NotFound.code(), 127);
        assert_eq!(Exit::Signal(2).code(), 130);
        assert_eq!(Exit::Signal(9).code(), 137);
        assert_eq!(Exit::Signal(64).code(), 192);
        assert_eq!(Exit::Command(255).code(), 255);
    }
}
