//! `wrenn down`: stops the server on this machine.
//!
//! Its process is found by the note in the data folder and signalled only when it is
//! certain that this process is that server: a note may be old and its number taken.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use super::Context;
use super::sandbox::kill::destroy_all;
use crate::args::OutputArgs;
use crate::error::{Failure, require_root};
use crate::exit::Exit;
use crate::output::{sandboxes, with_spinner};
use crate::server_file::ServerFile;
use crate::settings::OnStop;

/// A server ends what is under way before it goes.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where it pauses or ends all its sandboxes by itself.
const PATIENCE_FOR_SANDBOXES: Duration = Duration::from_secs(600);
/// The note is written after the process has started; clocks are read to the second.
const SLACK: Duration = Duration::from_secs(2);

/// Options of `wrenn down`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Pause all sandboxes first
    #[arg(long, conflicts_with = "destroy")]
    pause: bool,
    /// End all sandboxes first
    #[arg(long)]
    destroy: bool,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Stops it and says what still runs.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<Exit, Failure> {
    let data_dir = &context.settings.data_dir;
    let note = ServerFile::read(data_dir).map_err(|error| {
        let failure = Failure::from_error(&error);
        match &error {
            crate::server_file::ServerFileError::Read { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                failure.code("not_root").hint("run `sudo wrenn down`")
            }
            _ => failure,
        }
    })?;
    let server = match &note {
        Some(note) => Server::find(note, data_dir)?,
        None => None,
    };
    let (Some(note), Some(server)) = (note, server) else {
        return if args.destroy {
            sweep(args, context).await
        } else {
            Err(not_running(data_dir))
        };
    };

    let mut left = None;
    if args.destroy {
        let client = context.client()?;
        let ids = client
            .list_sandboxes(&[])
            .await?
            .into_iter()
            .map(|(sandbox, _)| sandbox.id)
            .collect();
        let outcomes = with_spinner(
            &context.printer,
            "ending the sandboxes",
            destroy_all(&client, ids),
        )
        .await;
        for (id, outcome) in outcomes {
            if let Err(error) = outcome
                && !error.is_not_found()
            {
                return Err(Failure::from(error).hint(format!(
                    "sandbox {id} still runs, so the server was left running too"
                )));
            }
        }
        left = Some(Vec::new());
    } else if args.pause {
        pause(&note, context).await?;
        left = Some(Vec::new());
    } else if note.on_stop != OnStop::Keep {
        left = Some(Vec::new());
    } else if let Ok(client) = context.client()
        && let Ok(sandboxes) = client.list_sandboxes(&[]).await
    {
        // Only to tell; a server that does not answer is to be stopped all the same.
        left = Some(
            sandboxes
                .into_iter()
                .map(|(sandbox, _)| sandbox.id)
                .collect(),
        );
    }
    let patience = match note.on_stop {
        OnStop::Keep => PATIENCE,
        OnStop::Pause | OnStop::Destroy => PATIENCE_FOR_SANDBOXES,
    };

    server.terminate()?;
    let stopped = with_spinner(
        &context.printer,
        "stopping the server",
        server.gone(patience),
    )
    .await?;
    if !stopped {
        return Err(Failure::message(format!(
            "the server (process {}) has not ended within {} s",
            note.pid,
            patience.as_secs()
        ))
        .hint(format!(
            "its log says what it is doing; `kill -9 {}` loses nothing that runs",
            note.pid
        )));
    }
    if args.output.json {
        context.printer.json(
            &json!({ "stopped": { "pid": note.pid, "address": note.url() }, "sandboxes": left }),
        )?;
        return Ok(Exit::Ok);
    }
    context
        .printer
        .line(format!("stopped the server at {}", note.url()));
    match left {
        Some(left) if left.is_empty() && note.on_stop == OnStop::Pause => context
            .printer
            .line("it has paused its sandboxes; what it could not pause its log tells"),
        Some(left) if left.is_empty() => context.printer.line("no sandbox runs any more"),
        Some(left) => {
            context.printer.line(format!(
                "{} still run{}; the next `wrenn up` takes them over, `wrenn down --destroy` would have ended them:",
                if left.len() == 1 { "1 sandbox".to_owned() } else { format!("{} sandboxes", left.len()) },
                if left.len() == 1 { "s" } else { "" },
            ));
            for id in left {
                context.printer.line(format!("  {id}"));
            }
        }
        None => context
            .printer
            .line("its sandboxes, if it had any, still run; the next `wrenn up` takes them over"),
    }
    Ok(Exit::Ok)
}

/// Pauses all that runs. What cannot be paused runs on, and so does the server.
async fn pause(note: &ServerFile, context: &Context) -> Result<(), Failure> {
    if note.on_stop == OnStop::Destroy {
        return Err(Failure::message(
            "the server was started with --on-stop destroy and would end what is paused now",
        )
        .code("on_stop")
        .hint("start it anew without that, or use `wrenn down --destroy`"));
    }
    let client = context.client()?;
    let all = super::drain::pause_all(&client, &context.printer).await?;
    match all.failed.as_slice() {
        [] => Ok(()),
        [first, ..] => {
            let text = |name: &str| first[name].as_str().unwrap_or_default().to_owned();
            Err(Failure::message(format!(
                "{} could not be paused; of {}: {}",
                sandboxes(all.failed.len()),
                text("id"),
                text("message")
            ))
            .code(text("code"))
            .hint("they run on, so the server was left running too"))
        }
    }
}

/// Ends the sandboxes of a server that is gone itself.
async fn sweep(args: &Args, context: &Context) -> Result<Exit, Failure> {
    require_root("ending the sandboxes of a server that is gone")?;
    let work = super::gc::sweep(&context.settings, true, false);
    let report = with_spinner(&context.printer, "ending the sandboxes", work).await?;
    if args.output.json {
        context
            .printer
            .json(&json!({ "stopped": null, "ended": report.ended, "sandboxes": [] }))?;
    } else {
        context.printer.line(format!(
            "no server runs on {}; ended {} that an earlier one had left",
            context.settings.data_dir.display(),
            match report.ended.len() {
                1 => "1 sandbox".to_owned(),
                count => format!("{count} sandboxes"),
            }
        ));
    }
    Ok(Exit::Ok)
}

fn not_running(data_dir: &Path) -> Failure {
    Failure::message(format!("no server runs on {}", data_dir.display()))
        .code("no_server")
        .hint("if it uses another data folder, name it with --data-dir")
}

/// A process that is certainly the server.
struct Server {
    pid: i32,
    handle: OwnedFd,
}

impl Server {
    fn find(note: &ServerFile, data_dir: &Path) -> Result<Option<Self>, Failure> {
        let Some(pid) = Pid::from_raw(note.pid).filter(|_| note.pid > 1) else {
            return Ok(None);
        };
        // The handle first: from here on the number cannot pass to another process.
        let handle = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => {
                return Err(Failure::message(format!(
                    "cannot reach process {}: {error}",
                    note.pid
                )));
            }
        };
        let written =
            fs::metadata(ServerFile::path(data_dir)).and_then(|metadata| metadata.modified());
        let process = Process::read(note.pid);
        match (process, written) {
            (Ok(process), Ok(written)) if process.is_server_of(written) => Ok(Some(Server {
                pid: note.pid,
                handle,
            })),
            // Gone meanwhile, or another program under the same number.
            _ => Ok(None),
        }
    }

    fn terminate(&self) -> Result<(), Failure> {
        match pidfd_send_signal(&self.handle, Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(rustix::io::Errno::PERM) => Err(Failure::message(format!(
                "the server (process {}) is another user's",
                self.pid
            ))
            .code("not_root")
            .hint("run `sudo wrenn down`")),
            Err(error) => Err(Failure::message(format!(
                "cannot signal process {}: {error}",
                self.pid
            ))),
        }
    }

    /// Whether it has ended in time.
    async fn gone(self, patience: Duration) -> Result<bool, Failure> {
        let waited = tokio::task::spawn_blocking(move || wait(&self.handle, patience)).await;
        match waited {
            Ok(Ok(gone)) => Ok(gone),
            Ok(Err(error)) => Err(Failure::message(format!(
                "cannot wait for the server: {error}"
            ))),
            Err(error) => Err(Failure::message(format!(
                "cannot wait for the server: {error}"
            ))),
        }
    }
}

/// A pidfd is readable once its process has ended.
fn wait(handle: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What `/proc` tells about a process.
struct Process {
    arguments: Vec<String>,
    started: SystemTime,
}

impl Process {
    fn read(pid: i32) -> io::Result<Self> {
        let arguments = fs::read(format!("/proc/{pid}/cmdline"))?
            .split(|byte| *byte == 0)
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        // Field 22 of stat: ticks since boot. The name in field 2 may hold anything, so the
        // fields are counted from its closing parenthesis (proc_pid_stat(5)).
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let ticks: u64 = stat
            .rsplit_once(')')
            .and_then(|(_, fields)| fields.split_whitespace().nth(19))
            .and_then(|ticks| ticks.parse().ok())
            .ok_or_else(|| io::Error::other("stat has no start time"))?;
        let boot: u64 = fs::read_to_string("/proc/stat")?
            .lines()
            .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
            .ok_or_else(|| io::Error::other("/proc/stat has no btime"))?;
        let since_boot =
            Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second());
        Ok(Process {
            arguments,
            started: SystemTime::UNIX_EPOCH + Duration::from_secs(boot) + since_boot,
        })
    }

    /// Whether it is `wrenn up` and was there when the note was written.
    fn is_server_of(&self, note_written: SystemTime) -> bool {
        self.arguments
            .iter()
            .skip(1)
            .any(|argument| argument == "up")
            && self.started <= note_written + SLACK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(arguments: &[&str], started: SystemTime) -> Process {
        Process {
            arguments: arguments
                .iter()
                .map(|argument| (*argument).to_owned())
                .collect(),
            started,
        }
    }

    #[test]
    fn only_a_wrenn_up_older_than_the_note_is_the_server() {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        assert!(process(&["/usr/bin/wrenn", "up"], now).is_server_of(now));
        assert!(process(&["wrenn", "--data-dir", "/x", "up"], now - hour).is_server_of(now));
        assert!(!process(&["wrenn", "run", "x"], now - hour).is_server_of(now));
        assert!(
            !process(&["wrenn", "up"], now).is_server_of(now - hour),
            "that number was taken later"
        );
    }

    #[test]
    fn this_process_started_not_long_ago() {
        let me = Process::read(std::process::id() as i32).unwrap();
        let age = SystemTime::now()
            .duration_since(me.started)
            .unwrap_or_default();
        assert!(age < Duration::from_secs(600), "{age:?}");
    }

    #[test]
    fn a_stranger_under_the_noted_number_is_not_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let note = format!(
            r#"{{"address":"127.0.0.1:1","pid":{}}}"#,
            std::process::id()
        );
        fs::write(ServerFile::path(folder.path()), note).unwrap();
        let note = ServerFile::read(folder.path()).unwrap().unwrap();
        assert!(Server::find(&note, folder.path()).unwrap().is_none());
        for pid in [0, 1, -1] {
            let note = ServerFile {
                pid,
                ..note.clone()
            };
            assert!(
                Server::find(&note, folder.path()).unwrap().is_none(),
                "{pid}"
            );
        }
    }
}
