//! Programs that outlive the agent that started them: what is kept of each, and how the next
//! agent takes it up.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::input::Input;
use super::output::{Channel, Log};
use super::pump::{Death, Pump, nonblocking, supervise};
use super::table::{Config, Hold, Process, Table};
use crate::handover::{Entry, Handover, Kept};

/// The body of an entry.
#[derive(Serialize, Deserialize)]
enum Record {
    /// A program; its descriptors are pidfd, then terminal or standard output and error.
    Program {
        config: Config,
        tag: Option<String>,
        terminal: bool,
        /// Nanoseconds of the monotonic clock at which its request's deadline is.
        deadline: Option<u64>,
        counter: Option<u32>,
    },
    /// Its standard input, apart because it may be closed before the end.
    Input {
        /// The program's key.
        of: u64,
    },
}

/// What is to be kept of a program that was just started.
pub(super) struct Program<'a> {
    pub(super) pid: u32,
    pub(super) config: &'a Config,
    pub(super) tag: Option<&'a String>,
    pub(super) deadline: Option<Instant>,
    pub(super) pidfd: &'a OwnedFd,
    pub(super) outputs: &'a [(Arc<AsyncFd<OwnedFd>>, Channel)],
    pub(super) log: &'a Log,
}

fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    let nanos = u32::try_from(now.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), nanos)
}

/// Has init keep it.
pub(super) fn keep(handover: &Arc<Handover>, program: &Program<'_>, input: &Input) -> Hold {
    let deadline = program.deadline.map(|at| {
        let left = at.saturating_duration_since(Instant::now());
        u64::try_from((monotonic() + left).as_nanos()).unwrap_or(u64::MAX)
    });
    let record = Record::Program {
        config: program.config.clone(),
        tag: program.tag.cloned(),
        terminal: program.outputs.iter().any(|(_, c)| *c == Channel::Pty),
        deadline,
        counter: program.log.counter(),
    };
    let mut fds = vec![program.pidfd.as_fd()];
    fds.extend(program.outputs.iter().map(|(fd, _)| fd.get_ref().as_fd()));
    let kept = handover.keep(program.pid, &body(&record), &fds);
    let input = match input {
        Input::Pipe(pipe) => {
            let record = Record::Input { of: kept.key() };
            Some(handover.keep(0, &body(&record), &[pipe.get_ref().as_fd()]))
        }
        Input::Terminal(_) | Input::None => None,
    };
    Hold {
        program: Some(kept),
        input,
    }
}

fn body(record: &Record) -> Vec<u8> {
    // Strings, numbers and maps with text keys can always be written as JSON.
    serde_json::to_vec(record).unwrap_or_default()
}

/// Takes up what a predecessor has left. Gives the process ids of its programs, and what
/// could not be taken up.
pub(super) fn adopt(
    handover: &Arc<Handover>,
    table: &Arc<Table>,
    entries: Vec<Entry>,
) -> (Vec<u32>, Vec<String>) {
    let (mut adopted, mut lost) = (Vec::new(), Vec::new());
    let mut inputs: HashMap<u64, (Kept, OwnedFd)> = HashMap::new();
    let mut programs = Vec::new();
    for mut entry in entries {
        let kept = handover.kept(entry.key);
        match serde_json::from_slice(&entry.body) {
            Ok(Record::Input { of }) => {
                if let Some(fd) = entry.fds.pop() {
                    inputs.insert(of, (kept, fd));
                }
            }
            Ok(Record::Program {
                config,
                tag,
                terminal,
                deadline,
                counter,
            }) => {
                let log = Log::resumed(counter.map(|slot| handover.counter(Some(slot))));
                let program = (config, tag, terminal, deadline, Arc::new(log));
                programs.push((entry, kept, program));
            }
            Err(error) => {
                kept.forget();
                lost.push(format!("process {}: {error}", entry.pid));
            }
        }
    }
    for (entry, kept, program) in programs {
        let pid = entry.pid;
        let input = inputs.remove(&kept.key());
        match take_up(handover, table, entry, kept, program, input) {
            Ok(()) => adopted.push(pid),
            Err((kept, error)) => {
                kept.forget();
                lost.push(format!("process {pid}: {error}"));
            }
        }
    }
    // Of programs that were not handed over, or are forgotten.
    inputs.into_values().for_each(|(kept, _)| kept.forget());
    (adopted, lost)
}

type Description = (Config, Option<String>, bool, Option<u64>, Arc<Log>);

/// Our ends of what a program reads and writes.
struct Ends {
    pidfd: OwnedFd,
    outputs: Vec<(Arc<AsyncFd<OwnedFd>>, Channel)>,
    input: Input,
}

fn ends(fds: Vec<OwnedFd>, terminal: bool, input: Option<OwnedFd>) -> io::Result<Ends> {
    let channels = if terminal {
        &[Channel::Pty][..]
    } else {
        &[Channel::Stdout, Channel::Stderr]
    };
    let mut fds = fds.into_iter();
    let pidfd = fds.next().ok_or(io::ErrorKind::UnexpectedEof)?;
    let mut outputs = Vec::new();
    for channel in channels {
        let fd = fds.next().ok_or(io::ErrorKind::UnexpectedEof)?;
        outputs.push((Arc::new(nonblocking(fd)?), *channel));
    }
    let input = match (outputs.as_slice(), input) {
        ([(master, Channel::Pty)], _) => Input::Terminal(Arc::clone(master)),
        (_, Some(fd)) => Input::Pipe(nonblocking(fd)?),
        (_, None) => Input::None,
    };
    Ok(Ends {
        pidfd,
        outputs,
        input,
    })
}

fn take_up(
    handover: &Arc<Handover>,
    table: &Arc<Table>,
    entry: Entry,
    kept: Kept,
    (config, tag, terminal, deadline, log): Description,
    input: Option<(Kept, OwnedFd)>,
) -> Result<(), (Kept, io::Error)> {
    let (kept_input, input) = input.unzip();
    let Ends {
        pidfd,
        outputs,
        input,
    } = match ends(entry.fds, terminal, input) {
        Ok(ends) => ends,
        Err(error) => return Err((kept, error)),
    };
    let terminal = match &input {
        Input::Terminal(master) => Some(Arc::clone(master)),
        Input::Pipe(_) | Input::None => None,
    };
    // An end that is known already is told as those that are still to come.
    let death = match entry.end {
        Some(exit) => Death::Known(exit),
        None => Death::Orphan(handover.end_of(kept.key())),
    };
    let hold = Hold {
        program: Some(kept),
        input: kept_input,
    };
    let process = Arc::new(Process {
        pid: entry.pid,
        tag,
        config,
        log: Arc::clone(&log),
        input: tokio::sync::Mutex::new(input),
        terminal,
        alive: Mutex::new(entry.end.is_none()),
        orphan: Some(pidfd),
        kept: Mutex::new(hold),
        timed_out: AtomicBool::new(false),
    });
    table.started(&process);
    let pumps = outputs
        .into_iter()
        .map(|(fd, channel)| Pump::start(fd, channel, &log))
        .collect();
    let deadline =
        deadline.map(|at| Instant::now() + Duration::from_nanos(at).saturating_sub(monotonic()));
    tokio::spawn(supervise(
        process,
        death,
        pumps,
        deadline,
        Arc::clone(table),
    ));
    Ok(())
}
