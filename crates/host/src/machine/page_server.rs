//! A machine's page server: the process that supplies its memory from a snapshot, where the
//! monitor cannot have that laid over the template's.
//!
//! ```text
//!   agent ──starts──▶ page server ──listens──▶ pages.sock ◀──connects── monitor, in its jail
//!                          │   ▲
//!    ended by its keeper ◀─┘   └─ its death ends the machine, and the machine's ends it
//! ```
//!
//! In the machine's folder: `pages.sock` until the monitor has connected, `pages.control` while
//! it lives, `pages.json` with what it did and why it ended, `pages.log`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wrenn_memory::{BaseConfig, Config, Policy, Record, State, Status};
use wrenn_snapshot::SnapshotId;

use super::{MachineError, Site, read_json};
use crate::template::LoadedTemplate;

/// What is told on its standard output once a monitor may connect.
const LISTENING: &str = "listening\n";
const SOCKET: &str = "pages.sock";
const CONTROL: &str = "pages.control";
const STATUS: &str = "pages.json";
const LOG: &str = "pages.log";

/// How long it may take to open a snapshot, on the reference machine.
const OPEN_PATIENCE: Duration = Duration::from_secs(15);
/// How long the monitor may take to connect, and then to tell where its memory is.
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to end once its machine has.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// How long the pages that a machine asks for first are written down, on the reference machine:
/// until its guest agent has answered and a first command has run.
const RECORDED_FOR: Duration = Duration::from_secs(2);
/// Most pages that are written down: 128 MiB.
const RECORDED_PAGES: u32 = 32_768;
/// Bytes of data brought per second that nobody has asked for: a quarter of what one processor
/// copies, so that others are not held up.
const BACKGROUND_RATE: u64 = 512 << 20;

/// A page server that waits for its monitor.
pub(super) struct PageServer {
    /// Where it does.
    pub(super) socket: PathBuf,
    /// Its number.
    pub(super) pid: u32,
    process: OwnedFd,
}

impl PageServer {
    /// Starts one in the folder of a machine that runs as `uid`, for memory that `snapshot`
    /// lays over the template's. The caller's sandbox has the snapshot pinned.
    pub(super) async fn start(
        site: &Site,
        folder: &Path,
        uid: u32,
        template: &LoadedTemplate,
        snapshot: SnapshotId,
    ) -> Result<PageServer, MachineError> {
        let failed = |action| {
            let path = folder.to_owned();
            move |source| MachineError::File {
                action,
                path,
                source,
            }
        };
        // It opens the memory anew from this process, which waits for it.
        let base = template
            .memory
            .share()
            .map_err(failed("share the memory of"))?;
        let info = site.vmm.info();
        let config = Config {
            socket: folder.join(SOCKET),
            uid,
            control: folder.join(CONTROL),
            status: folder.join(STATUS),
            store: site.config.snapshots_dir(),
            snapshot: Some(snapshot),
            pinned_by: None,
            base: Some(BaseConfig {
                path: format!("/proc/{}/fd/{}", std::process::id(), base.as_raw_fd()).into(),
                id: template.base_id(),
            }),
            policy: policy(site, snapshot),
            connect_millis: millis(info.deadline(CONNECT_PATIENCE)),
            handshake_millis: millis(info.deadline(CONNECT_PATIENCE)),
        };
        let log =
            File::create(folder.join(LOG)).map_err(failed("log what serves the memory of"))?;
        let (program, args) = &site.config.page_server;
        let mut child = tokio::process::Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            .kill_on_drop(false)
            .spawn()
            .map_err(failed("start what serves the memory of"))?;
        let pid = child.id().unwrap_or_default();
        let server = open_process(pid).map(|process| PageServer {
            socket: config.socket.clone(),
            pid,
            process,
        });
        let server = server.map_err(failed("watch what serves the memory of"))?;
        let pipes = (child.stdin.take(), child.stdout.take());
        tokio::spawn(async move {
            // Only so that it does not stay a zombie: how it ended is in its status file.
            if let Err(error) = child.wait().await {
                tracing::warn!(%error, "a page server could not be waited for");
            }
        });
        let listens = async {
            let (Some(mut orders), Some(mut told)) = pipes else {
                return Err(io::Error::other("it has no pipes"));
            };
            orders.write_all(&serde_json::to_vec(&config)?).await?;
            drop(orders);
            let mut words = String::new();
            told.read_to_string(&mut words).await?;
            match words == LISTENING {
                true => Ok(()),
                false => Err(io::Error::other(match failure(folder) {
                    Some(why) => why,
                    None => format!("it ended at once; {LOG} may say why"),
                })),
            }
        };
        let patience = info.deadline(OPEN_PATIENCE);
        let listens = tokio::time::timeout(patience, listens).await;
        let listens = listens.unwrap_or_else(|_| {
            let seconds = patience.as_secs();
            Err(io::Error::other(format!(
                "it was not ready within {seconds} s"
            )))
        });
        match listens {
            Ok(()) => Ok(server),
            Err(error) => {
                server.end();
                Err(failed("supply the memory of")(error))
            }
        }
    }

    /// A descriptor of its process for the machine's keeper.
    pub(super) fn process(&self) -> io::Result<OwnedFd> {
        self.process.try_clone()
    }

    /// Ends it, whose machine did not start.
    pub(super) fn end(&self) {
        // It may have ended, which is as well.
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
    }
}

/// Without a record of what is asked for first, one is made; with it, that comes first and then
/// all else, where the machine's memory is its own anyway.
fn policy(site: &Site, snapshot: SnapshotId) -> Policy {
    let working_set = site.config.working_set(snapshot);
    let record = (!working_set.exists()).then(|| Record {
        millis: millis(site.vmm.info().deadline(RECORDED_FOR)),
        pages: RECORDED_PAGES,
    });
    Policy {
        working_set: Some(working_set),
        record,
        background: site.config.expected_use_percent >= 100,
        background_bytes_per_second: Some(BACKGROUND_RATE),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn open_process(pid: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or_else(|| io::Error::other("it has no number"))?;
    Ok(rustix::process::pidfd_open(number, PidfdFlags::empty())?)
}

fn status_in(folder: &Path) -> Option<Status> {
    // One that cannot be read tells nothing, as one that is not there.
    read_json(folder, STATUS).ok().flatten()
}

/// Why a machine's page server has failed, if it has.
pub fn failure(folder: &Path) -> Option<String> {
    let status = status_in(folder)?;
    match status.state {
        State::Failed => status.reason,
        _ => None,
    }
}

/// Waits until the page server of a machine that has ended is gone as well, if it had one, so
/// that it writes nothing more into the machine's folder.
pub(super) async fn ended(folder: &Path) {
    if !folder.join(CONTROL).exists() {
        return;
    }
    let Some(status) = status_in(folder) else {
        return;
    };
    let Ok(process) = open_process(status.pid) else {
        return;
    };
    let waited = tokio::task::spawn_blocking(move || {
        let patience = Timespec {
            tv_sec: END_PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let mut process = [PollFd::new(&process, PollFlags::IN)];
        matches!(rustix::event::poll(&mut process, Some(&patience)), Ok(1))
    });
    if !waited.await.unwrap_or(false) {
        tracing::warn!(folder = %folder.display(), pid = status.pid, "a page server has not ended with its machine");
    }
}

/// The body of `wrenn page-server`: serves the memory of one machine as it is told on standard
/// input, and ends with it.
pub fn serve() -> Result<(), wrenn_memory::ServeError> {
    // Away from the agent's terminal; it is no leader of a group, so this cannot fail.
    let _ = rustix::process::setsid();
    let config = Config::read(io::stdin().lock())?;
    let counts = wrenn_memory::serve(&config, || {
        // The agent waits for the end of this pipe. One that is gone has its machine's keeper
        // or the patience with the monitor end this.
        let _ = rustix::io::write(rustix::stdio::stdout(), LISTENING.as_bytes());
        if let Ok(null) = File::options().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(&null);
        }
    })?;
    tracing::info!(?counts, "the machine has ended");
    Ok(())
}
