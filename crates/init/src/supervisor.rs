//! Second role, second half: keep envd alive, reap every orphan, power off when asked.

use crate::console::log;
use crate::keeper::Keeper;
use crate::signals::{self, Event, Signals};
use rustix::io::Errno;
use rustix::process::{Pid, Rlimit, Signal, WaitOptions, WaitStatus};
use rustix::system::RebootCommand;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// PATH of everything started from here.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// First pause before a service that crashed is started again; doubled with each crash.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A service that lived this long was healthy: its next crash counts as the first.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// An agent that has crashed so often in a row gets no process back: one of them may be why.
const TOO_OFTEN: u32 = 4;
/// How long programs may take to end at power-off.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long to wait before the start that follows crash number `crashes` in a row.
fn pause_after(crashes: u32) -> Duration {
    let factor = 1u32
        .checked_shl(crashes.saturating_sub(1))
        .unwrap_or(u32::MAX);
    FIRST_PAUSE.saturating_mul(factor).min(LONGEST_PAUSE)
}

/// A program that is started again whenever it ends.
struct Service {
    argv: Vec<String>,
    state: State,
    crashes: u32,
}

enum State {
    Running { pid: Pid, since: Instant },
    Due { at: Instant },
}

impl Service {
    fn new(argv: &[&str]) -> Self {
        Service {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            state: State::Due { at: Instant::now() },
            crashes: 0,
        }
    }

    /// With a keeper, it gets back what its predecessor has left there.
    fn start_if_due(
        &mut self,
        now: Instant,
        keeper: Option<&mut Keeper>,
        open_files: Option<Rlimit>,
    ) {
        let State::Due { at } = self.state else {
            return;
        };
        let [program, arguments @ ..] = self.argv.as_slice() else {
            return;
        };
        if at > now {
            return;
        }
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .current_dir("/");
        match start(&mut command, keeper, open_files, self.crashes) {
            Ok(Some(pid)) => self.state = State::Running { pid, since: now },
            Ok(None) => log(format_args!("{program} has no process id")),
            Err(error) => {
                self.crashes = self.crashes.saturating_add(1);
                let pause = pause_after(self.crashes);
                log(format_args!(
                    "cannot start {program}: {error}; next try in {pause:?}"
                ));
                self.state = State::Due { at: now + pause };
            }
        }
    }

    /// Takes note of a process that ended; true if it was this service's.
    fn ended(&mut self, ended: Pid, status: WaitStatus, now: Instant) -> bool {
        let State::Running { pid, since } = self.state else {
            return false;
        };
        if pid != ended {
            return false;
        }
        let healthy = now.duration_since(since) >= HEALTHY_AFTER;
        self.crashes = if healthy {
            1
        } else {
            self.crashes.saturating_add(1)
        };
        let pause = pause_after(self.crashes);
        let how = describe(status);
        log(format_args!(
            "{} {how}; starting it again in {pause:?}",
            self.argv.join(" ")
        ));
        self.state = State::Due { at: now + pause };
        true
    }

    fn due_in(&self, now: Instant) -> Option<Duration> {
        match self.state {
            State::Running { .. } => None,
            State::Due { at } => Some(at.saturating_duration_since(now)),
        }
    }
}

fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (_, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".into(),
    }
}

fn start(
    command: &mut Command,
    keeper: Option<&mut Keeper>,
    open_files: Option<Rlimit>,
    crashes: u32,
) -> io::Result<Option<Pid>> {
    let Some(keeper) = keeper else {
        let child = signals::spawn(command, open_files, None)?;
        return Ok(pid_of(&child));
    };
    if crashes >= TOO_OFTEN && keeper.processes() > 0 {
        let count = keeper.processes();
        log(format_args!("{count} processes are not handed over"));
        keeper.forget_processes();
    }
    let theirs = keeper.connect()?;
    let child = signals::spawn(command, open_files, Some(&theirs))?;
    drop(theirs);
    keeper.hand_back();
    Ok(pid_of(&child))
}

fn pid_of(child: &std::process::Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

/// The services of this system; the first is the agent, whose processes are kept.
struct Supervisor {
    signals: Signals,
    services: Vec<Service>,
    keeper: Keeper,
    open_files: Option<Rlimit>,
}

/// Runs for as long as the guest does.
pub fn run() {
    let signals = match Signals::block() {
        Ok(signals) => signals,
        Err(error) => {
            log(format_args!("cannot block signals: {error}"));
            return;
        }
    };
    // Ctrl-Alt-Del becomes SIGINT to us instead of a reset.
    if let Err(error) = rustix::system::reboot(RebootCommand::CadOff) {
        log(format_args!("cannot take over Ctrl-Alt-Del: {error}"));
    }
    if let Err(error) = signals::stand_back() {
        log(format_args!("cannot give way to the agent: {error}"));
    }
    let open_files = signals::raise_open_files()
        .inspect_err(|error| {
            log(format_args!(
                "cannot raise the limit of open files: {error}"
            ))
        })
        .ok();
    let mut services = vec![Service::new(&["/usr/bin/envd"])];
    // KVM's clock as a PTP device; emulated machines have none and their clock is set when
    // they are restored (G24).
    if Path::new("/dev/ptp0").exists() {
        services.push(Service::new(&["/usr/sbin/chronyd", "-n"]));
    }
    let mut supervisor = Supervisor {
        signals,
        services,
        keeper: Keeper::default(),
        open_files,
    };
    supervisor.serve();
    power_off(&supervisor.signals);
}

/// Outside a guest, for development and tests: keeps the agent `argv` alive and adopts its
/// orphans as process 1 does, until SIGTERM, which ends the agent too.
///
/// # Errors
/// This process cannot become the one that orphans go to.
pub fn supervise(argv: &[&str]) -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut supervisor = Supervisor {
        signals: Signals::block()?,
        services: vec![Service::new(argv)],
        keeper: Keeper::default(),
        open_files: None,
    };
    supervisor.serve();
    for service in &supervisor.services {
        if let State::Running { pid, .. } = service.state {
            rustix::process::kill_process(pid, Signal::TERM)?;
        }
    }
    Ok(())
}

impl Supervisor {
    /// Until the system is to end.
    fn serve(&mut self) {
        loop {
            let now = Instant::now();
            let mut keeper = Some(&mut self.keeper);
            for service in &mut self.services {
                service.start_if_due(now, keeper.take(), self.open_files);
            }
            let due = self.services.iter().filter_map(|s| s.due_in(now)).min();
            match self.signals.wait(due, self.keeper.socket()) {
                Event::Child => {
                    // Who is to be kept may have been told by an agent that is among the dead.
                    self.keeper.take();
                    self.reap();
                }
                Event::Message => self.keeper.take(),
                Event::Timeout => {}
                Event::PowerOff => return,
            }
        }
    }

    /// Collects every child that has ended: signals merge, so one may stand for several.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let now = Instant::now();
            if !self.services.iter_mut().any(|s| s.ended(pid, status, now)) {
                self.keeper
                    .ended(pid.as_raw_nonzero().get().unsigned_abs(), status);
            }
        }
    }
}

fn power_off(signals: &Signals) {
    log(format_args!("powering off"));
    signal_all(Signal::TERM);
    let deadline = Instant::now() + FAREWELL;
    while !all_ended() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        signals.wait(Some(left), None);
    }
    signal_all(Signal::KILL);
    rustix::fs::sync();
    // A file system left read-only needs no journal replay at its next mount.
    if let Err(error) = rustix::mount::mount_remount("/", rustix::mount::MountFlags::RDONLY, c"") {
        log(format_args!("cannot make / read-only: {error}"));
    }
    for command in [RebootCommand::PowerOff, RebootCommand::Restart] {
        if let Err(error) = rustix::system::reboot(command) {
            log(format_args!("{command:?}: {error}"));
        }
    }
}

/// Signals every process but ourselves.
fn signal_all(signal: Signal) {
    for pid in other_processes() {
        match rustix::process::kill_process(pid, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => log(format_args!("cannot signal process {pid}: {error}")),
        }
    }
}

/// Every process with a program: kernel threads have an empty command line.
fn other_processes() -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
        })
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .parse()
                .ok()
                .filter(|pid| *pid != 1)
        })
        .filter_map(Pid::from_raw)
        .collect()
}

/// Reaps; true once no child is left.
fn all_ended() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit() {
        assert_eq!(pause_after(1), Duration::from_millis(50));
        assert_eq!(pause_after(3), Duration::from_millis(200));
        assert_eq!(pause_after(9), LONGEST_PAUSE);
        assert_eq!(pause_after(u32::MAX), LONGEST_PAUSE);
    }

    #[test]
    fn g34_a_service_that_crashed_is_started_again() {
        let mut service = Service::new(&["/bin/false"]);
        let start = Instant::now();
        service.start_if_due(start, None, None);
        let State::Running { pid, .. } = service.state else {
            panic!("not started")
        };
        let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty())
            .unwrap()
            .unwrap();
        assert!(service.ended(pid, status, start));
        assert_eq!(service.due_in(start), Some(FIRST_PAUSE));
        service.start_if_due(start + FIRST_PAUSE, None, None);
        let State::Running { pid: second, .. } = service.state else {
            panic!("not started again")
        };
        assert_ne!(pid, second);
        rustix::process::waitpid(Some(second), WaitOptions::empty()).unwrap();
    }

    #[test]
    fn a_long_life_forgives_earlier_crashes() {
        let mut service = Service::new(&["/bin/true"]);
        service.crashes = 7;
        let start = Instant::now();
        service.start_if_due(start, None, None);
        let State::Running { pid, .. } = service.state else {
            panic!("not started")
        };
        let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty())
            .unwrap()
            .unwrap();
        assert!(service.ended(pid, status, start + HEALTHY_AFTER));
        assert_eq!(service.due_in(start + HEALTHY_AFTER), Some(FIRST_PAUSE));
    }

    #[test]
    fn a_program_that_is_missing_is_tried_again_later() {
        let mut service = Service::new(&["/nonexistent/program"]);
        let start = Instant::now();
        service.start_if_due(start, None, None);
        assert_eq!(service.due_in(start), Some(FIRST_PAUSE));
    }
}
