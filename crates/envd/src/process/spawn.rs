//! From a request to a running program.
//!
//! Environment, later ones win: our `PATH`; `HOME`, `USER`, `LOGNAME`, `SHELL`; the sandbox's
//! variables; the request's. Working directory: the request's, else the sandbox's default,
//! else the user's home; `~` is the home, and what is relative starts there.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::adopted;
use super::input::Input;
use super::output::{Channel, Log, Reader};
use super::pump::{Death, Pump, nonblocking, supervise};
use super::table::{Config, Process, Table, window};
use crate::cgroups::Group;
use crate::state::{Frozen, State};
use crate::sys::{self, Credentials, Program, Step};
use crate::users::User;

/// Children are the first to go when memory runs out, before the agent.
const OOM_SCORE_ADJ: &std::ffi::CStr = c"100";
/// Where programs are looked for when we ourselves were started without `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Group of terminals in every distribution; see grantpt(3).
const TTY_GROUP: u32 = 5;

/// What to start.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) config: Config,
    pub(super) user: User,
    pub(super) tag: Option<String>,
    /// Columns and rows, where it wants a terminal.
    pub(super) terminal: Option<(u16, u16)>,
    pub(super) stdin: bool,
    /// When its whole group is killed.
    pub(super) deadline: Option<Instant>,
}

/// Bytes of a tag: it is a name, and kept for a while for each program that has ended.
pub(super) const MOST_TAG: usize = 256;

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No program was named.
    #[error("the request names no program: set `process.cmd`")]
    NoCommand,
    /// A tag that is kept and listed for as long as the program.
    #[error("the tag has {0} bytes: at most {MOST_TAG} are allowed")]
    Tag(usize),
    /// A NUL byte, which no program can be given.
    #[error("{0} contains a NUL byte")]
    Nul(&'static str),
    /// A variable's name is empty or has an equals sign.
    #[error("'{0}' is no name of a variable")]
    VariableName(String),
    /// The working directory is not there.
    #[error("cwd '{0}' does not exist")]
    NoCwd(String),
    /// The working directory is something else.
    #[error("cwd '{0}' is not a directory")]
    CwdIsFile(String),
    /// The user may not enter it.
    #[error("cwd '{cwd}' cannot be entered by user '{user}'")]
    CwdDenied {
        /// The directory.
        cwd: String,
        /// The user.
        user: String,
    },
    /// No such program.
    #[error("command not found: '{0}'")]
    NotFound(String),
    /// The user may not run it, or it is no program.
    #[error("command '{command}' cannot be run by user '{user}'")]
    Denied {
        /// The command.
        command: String,
        /// The user.
        user: String,
    },
    /// The agent runs without the right to become another user.
    #[error("cannot become user '{user}' (uid {uid}): the agent is not root: {source}")]
    User {
        /// The user.
        user: String,
        /// Its number.
        uid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// Out of processes, memory or descriptors.
    #[error("starting '{command}' failed for lack of resources: {source}")]
    Exhausted {
        /// The command.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("starting '{command}' failed at step {step:?}: {source}")]
    Failed {
        /// The command.
        command: String,
        /// Where.
        step: Step,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest stayed frozen while the request waited.
    #[error(transparent)]
    Frozen(#[from] Frozen),
}

/// Starts a program and returns it with a lossless reader that misses nothing: it was there
/// before the program.
pub(super) async fn start(
    state: &Arc<State>,
    table: &Arc<Table>,
    request: Request,
) -> Result<(Arc<Process>, Reader), StartError> {
    if let Some(tag) = &request.tag
        && tag.len() > MOST_TAG
    {
        return Err(StartError::Tag(tag.len()));
    }
    let entered = state.enter().await?;
    let counter = state.handover.as_ref().map(|h| h.counter(None));
    let log = Arc::new(Log::counted(counter));
    let reader = log.reader(None, true);
    let plan = Plan::new(state, &request)?;
    // All that can fail for lack of descriptors comes before the program.
    let (ours, streams) = Streams::new(&request).map_err(|source| exhausted(&request, source))?;
    let Ours {
        input,
        terminal,
        outputs,
    } = ours;
    let state_for_child = Arc::clone(state);
    // A child takes its time when memory is short; that must not stop everybody else.
    let spawned = tokio::task::spawn_blocking(move || {
        let child = plan.spawn(&streams, &state_for_child);
        (plan, child)
    });
    let (plan, child) = spawned
        .await
        .map_err(|panic| exhausted(&request, io::Error::other(panic)))?;
    let child = child.map_err(|(step, source)| explain(&request, &plan.cwd, step, source))?;
    let pidfd = match sys::async_fd(child.pidfd) {
        Ok(pidfd) => pidfd,
        Err((pidfd, source)) => {
            // Nobody could follow it.
            abandon(&pidfd);
            return Err(exhausted(&request, source));
        }
    };
    let kept = state.handover.as_ref().map(|handover| {
        let program = adopted::Program {
            pid: child.pid,
            config: &request.config,
            tag: request.tag.as_ref(),
            deadline: request.deadline,
            pidfd: pidfd.get_ref(),
            outputs: &outputs,
            log: &log,
        };
        adopted::keep(handover, &program, &input)
    });
    let process = Arc::new(Process {
        pid: child.pid,
        tag: request.tag,
        config: request.config,
        log: Arc::clone(&log),
        input: tokio::sync::Mutex::new(input),
        terminal,
        alive: Mutex::new(true),
        orphan: None,
        kept: Mutex::new(kept.unwrap_or_default()),
        timed_out: AtomicBool::new(false),
    });
    table.started(&process);
    let pumps = outputs
        .into_iter()
        .map(|(fd, channel)| Pump::start(fd, channel, &log))
        .collect();
    tokio::spawn(supervise(
        Arc::clone(&process),
        Death::Child(pidfd),
        pumps,
        request.deadline,
        Arc::clone(table),
    ));
    drop(entered);
    tracing::debug!(pid = process.pid, user = %request.user.name, "program started");
    Ok((process, reader))
}

fn exhausted(request: &Request, source: io::Error) -> StartError {
    StartError::Exhausted {
        command: request.config.cmd.clone(),
        source,
    }
}

fn abandon(pidfd: &OwnedFd) {
    use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
    let killed = pidfd_send_signal(pidfd, Signal::KILL)
        .and_then(|()| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
    if let Err(error) = killed {
        tracing::error!(%error, "cannot end a program that cannot be followed");
    }
}

fn explain(request: &Request, cwd: &Path, step: Step, source: io::Error) -> StartError {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    let command = request.config.cmd.clone();
    let user = request.user.name.clone();
    let cwd = cwd.display().to_string();
    match (step, source.kind()) {
        (Step::Cwd, NotFound) => StartError::NoCwd(cwd),
        (Step::Cwd, NotADirectory) => StartError::CwdIsFile(cwd),
        (Step::Cwd, PermissionDenied) => StartError::CwdDenied { cwd, user },
        (Step::Exec, NotFound | NotADirectory) => StartError::NotFound(command),
        (Step::Exec, PermissionDenied) => StartError::Denied { command, user },
        (Step::Groups | Step::Gid | Step::Uid, PermissionDenied) => StartError::User {
            user,
            uid: request.user.uid,
            source,
        },
        _ => match source.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::E2BIG) => {
                StartError::Exhausted { command, source }
            }
            _ => StartError::Failed {
                command,
                step,
                source,
            },
        },
    }
}

/// Our ends of a program's streams.
struct Ours {
    input: Input,
    terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    outputs: Vec<(Arc<AsyncFd<OwnedFd>>, Channel)>,
}

/// Its ends: standard input, output, error. Dropped once it has its own, for they would
/// keep the pipes open after its end.
struct Streams([Arc<OwnedFd>; 3]);

impl Streams {
    fn new(request: &Request) -> io::Result<(Ours, Streams)> {
        match request.terminal {
            Some(size) => Streams::terminal(size, &request.user),
            None => Streams::pipes(request.stdin),
        }
    }

    fn pipes(stdin: bool) -> io::Result<(Ours, Streams)> {
        let flags = PipeFlags::CLOEXEC;
        let (their_in, input) = if stdin {
            let (reader, writer) = rustix::pipe::pipe_with(flags)?;
            (reader, Input::Pipe(nonblocking(writer)?))
        } else {
            (std::fs::File::open("/dev/null")?.into(), Input::None)
        };
        let (stdout, their_out) = rustix::pipe::pipe_with(flags)?;
        let (stderr, their_err) = rustix::pipe::pipe_with(flags)?;
        let outputs = vec![
            (Arc::new(nonblocking(stdout)?), Channel::Stdout),
            (Arc::new(nonblocking(stderr)?), Channel::Stderr),
        ];
        let theirs = Streams([their_in, their_out, their_err].map(Arc::new));
        Ok((
            Ours {
                input,
                terminal: None,
                outputs,
            },
            theirs,
        ))
    }

    fn terminal((cols, rows): (u16, u16), user: &User) -> io::Result<(Ours, Streams)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&master)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        rustix::termios::tcsetwinsize(&master, window(cols, rows))?;
        // The user must be able to open it by name (`/dev/tty`, `$(tty)`); only root can
        // give it away, and without root it is ours already.
        if rustix::process::geteuid().is_root() {
            let uid = rustix::process::Uid::from_raw(user.uid);
            let gid = rustix::process::Gid::from_raw(TTY_GROUP);
            rustix::fs::fchown(&slave, Some(uid), Some(gid))?;
            rustix::fs::fchmod(&slave, rustix::fs::Mode::from_raw_mode(0o620))?;
        }
        let master = Arc::new(nonblocking(master)?);
        let slave = Arc::new(slave);
        let ours = Ours {
            input: Input::Terminal(Arc::clone(&master)),
            terminal: Some(Arc::clone(&master)),
            outputs: vec![(master, Channel::Pty)],
        };
        Ok((
            ours,
            Streams([Arc::clone(&slave), Arc::clone(&slave), slave]),
        ))
    }
}

/// All that the child needs, made in the parent.
struct Plan {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    envp: Vec<CString>,
    cwd: PathBuf,
    credentials: Option<Credentials>,
    terminal: bool,
}

impl Plan {
    fn new(state: &State, request: &Request) -> Result<Plan, StartError> {
        let config = state.config();
        let (asked, user) = (&request.config, &request.user);
        if asked.cmd.is_empty() {
            return Err(StartError::NoCommand);
        }
        let envs = environment(user, &config.envs, &asked.envs)?;
        let mut argv = vec![c_string("the command", &asked.cmd)?];
        for arg in &asked.args {
            argv.push(c_string("an argument", arg)?);
        }
        let mut envp = Vec::with_capacity(envs.len());
        for (name, value) in &envs {
            let mut entry = name.as_bytes().to_vec();
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            envp.push(CString::new(entry).map_err(|_| StartError::Nul("a variable"))?);
        }
        let cwd = working_directory(
            asked.cwd.as_deref(),
            config.default_workdir.as_deref(),
            user,
        );
        let candidates = candidates(&asked.cmd, envs.get(OsStr::new("PATH")), &cwd)?;
        if asked.cwd.as_ref().is_some_and(|cwd| !cwd.is_empty()) && !cwd.exists() {
            return Err(StartError::NoCwd(cwd.display().to_string()));
        }
        let ours = rustix::process::geteuid();
        // Without root there is nobody else to become.
        let same = !ours.is_root() && ours.as_raw() == user.uid;
        let credentials = (!same).then(|| Credentials {
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.clone(),
        });
        let terminal = request.terminal.is_some();
        Ok(Plan {
            candidates,
            argv,
            envp,
            cwd,
            credentials,
            terminal,
        })
    }

    fn spawn(&self, streams: &Streams, state: &State) -> Result<sys::Child, (Step, io::Error)> {
        let [stdin, stdout, stderr] = &streams.0;
        let group = if self.terminal {
            Group::Ptys
        } else {
            Group::User
        };
        let cwd = CString::new(self.cwd.as_os_str().as_bytes())
            .map_err(|nul| (Step::Cwd, io::Error::other(nul)))?;
        sys::spawn(&Program {
            candidates: self.candidates.clone(),
            argv: self.argv.clone(),
            envp: self.envp.clone(),
            cwd,
            stdio: [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            terminal: self.terminal,
            credentials: self.credentials.clone(),
            cgroup: state.cgroups.folder(group),
            oom_score_adj: OOM_SCORE_ADJ,
            open_files: state.settings.child_open_files,
        })
    }
}

fn c_string(what: &'static str, text: &str) -> Result<CString, StartError> {
    CString::new(text).map_err(|_| StartError::Nul(what))
}

fn environment(
    user: &User,
    sandbox: &BTreeMap<String, String>,
    request: &BTreeMap<String, String>,
) -> Result<BTreeMap<OsString, OsString>, StartError> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let mut envs: BTreeMap<OsString, OsString> = BTreeMap::new();
    envs.insert("PATH".into(), path);
    envs.insert("HOME".into(), user.home.clone().into_os_string());
    envs.insert("USER".into(), user.name.clone().into());
    envs.insert("LOGNAME".into(), user.name.clone().into());
    // As login(1) sets it. Where it is missing bash looks its user up, through all of NSS.
    envs.insert("SHELL".into(), user.shell.clone().into_os_string());
    for (name, value) in sandbox.iter().chain(request) {
        if name.is_empty() || name.contains('=') {
            return Err(StartError::VariableName(name.clone()));
        }
        envs.insert(name.into(), value.into());
    }
    Ok(envs)
}

fn working_directory(request: Option<&str>, default: Option<&Path>, user: &User) -> PathBuf {
    let asked = request
        .filter(|cwd| !cwd.is_empty())
        .map(Path::new)
        .or(default);
    match asked {
        Some(path) => crate::users::expand_home(path, &user.home),
        // A user without a home can still work.
        None if user.home.is_dir() => user.home.clone(),
        None => PathBuf::from("/"),
    }
}

/// The paths that `command` may mean: itself where it has a slash (relative to the working
/// directory), else one per directory of `PATH`.
fn candidates(
    command: &str,
    path: Option<&OsString>,
    cwd: &Path,
) -> Result<Vec<CString>, StartError> {
    let whole = |path: PathBuf| {
        CString::new(path.into_os_string().into_vec()).map_err(|_| StartError::Nul("the command"))
    };
    if command.contains('/') {
        return Ok(vec![whole(cwd.join(command))?]);
    }
    path.map(|path| {
        std::env::split_paths(path)
            .map(|dir| cwd.join(dir).join(command))
            // A directory of that name would say "permission denied" and hide a later one.
            .filter(|file| {
                std::fs::metadata(file)
                    .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
            })
            .map(whole)
            .collect()
    })
    .unwrap_or_else(|| Ok(Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> User {
        User {
            name: "user".into(),
            uid: 1000,
            gid: 1000,
            groups: vec![1000],
            home: "/home/user".into(),
            shell: "/bin/bash".into(),
        }
    }

    #[test]
    fn the_working_directory_follows_the_rules() {
        let mut user = user();
        user.home = "/usr".into();
        let at = |request, default: Option<&str>| {
            working_directory(request, default.map(Path::new), &user)
                .display()
                .to_string()
        };
        assert_eq!(at(None, None), "/usr");
        assert_eq!(at(Some(""), None), "/usr");
        assert_eq!(at(None, Some("/srv")), "/srv");
        assert_eq!(at(Some("/tmp"), Some("/srv")), "/tmp");
        assert_eq!(at(Some("~"), None), "/usr");
        assert_eq!(at(Some("~/x"), None), "/usr/x");
        assert_eq!(at(Some("x/y"), Some("/srv")), "/usr/x/y");
        user.home = "/no/such/home".into();
        assert_eq!(working_directory(None, None, &user), Path::new("/"));
    }

    #[test]
    fn later_variables_win_and_bad_names_are_refused() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs
                .iter()
                .map(|(k, v)| ((*k).into(), (*v).into()))
                .collect()
        };
        let envs = environment(
            &user(),
            &map(&[("A", "1"), ("B", "1"), ("HOME", "/h")]),
            &map(&[("B", "2")]),
        )
        .unwrap();
        let get = |name: &str| envs.get(OsStr::new(name)).and_then(|v| v.to_str()).unwrap();
        assert_eq!(
            (get("A"), get("B"), get("HOME"), get("USER"), get("SHELL")),
            ("1", "2", "/h", "user", "/bin/bash")
        );
        for name in ["", "A=B"] {
            assert!(environment(&user(), &map(&[]), &map(&[(name, "")])).is_err());
        }
    }

    #[test]
    fn a_command_is_looked_up_in_the_program_s_own_path() {
        let path = OsString::from("/nowhere:/bin:/usr/bin");
        let found = candidates("sh", Some(&path), Path::new("/")).unwrap();
        assert_eq!(found[0].to_str(), Ok("/bin/sh"));
        assert!(
            candidates("no-such", Some(&path), Path::new("/"))
                .unwrap()
                .is_empty()
        );
        assert_eq!(
            candidates("./a", None, Path::new("/srv")).unwrap()[0].to_str(),
            Ok("/srv/./a")
        );
    }
}
