//! Second role, second half: keep envd alive, reap every orphan, power off when asked.

use crate::console::log;
use crate::signals::{self, Event, Signals};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::system::RebootCommand;
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
    argv: &'static [&'static str],
    state: State,
    crashes: u32,
}

enum State {
    Running { pid: Pid, since: Instant },
    Due { at: Instant },
}

impl Service {
    fn new(argv: &'static [&'static str]) -> Self {
        Service {
            argv,
            state: State::Due { at: Instant::now() },
            crashes: 0,
        }
    }

    fn start_if_due(&mut self, now: Instant) {
        let State::Due { at } = self.state else {
            return;
        };
        let [program, arguments @ ..] = self.argv else {
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
            .env("LANG", "C.UTF-8");
        let started = signals::spawn(command.current_dir("/"));
        let pid = started.map(|child| i32::try_from(child.id()).ok().and_then(Pid::from_raw));
        match pid {
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
    let mut services = vec![Service::new(&["/usr/bin/envd"])];
    // KVM's clock as a PTP device; emulated machines have none and their clock is set when
    // they are restored (G24).
    if Path::new("/dev/ptp0").exists() {
        services.push(Service::new(&["/usr/sbin/chronyd", "-n"]));
    }
    loop {
        let now = Instant::now();
        services
            .iter_mut()
            .for_each(|service| service.start_if_due(now));
        let pause = services
            .iter()
            .filter_map(|service| service.due_in(now))
            .min();
        match signals.wait(pause) {
            Event::Child => reap(&mut services),
            Event::Timeout => {}
            Event::PowerOff => break,
        }
    }
    power_off(&signals);
}

/// Collects every child that has ended: signals merge, so one may stand for several.
fn reap(services: &mut [Service]) {
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        let now = Instant::now();
        for service in services.iter_mut() {
            if service.ended(pid, status, now) {
                break;
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
        signals.wait(Some(left));
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
        service.start_if_due(start);
        let State::Running { pid, .. } = service.state else {
            panic!("not started")
        };
        let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty())
            .unwrap()
            .unwrap();
        assert!(service.ended(pid, status, start));
        assert_eq!(service.due_in(start), Some(FIRST_PAUSE));
        service.start_if_due(start + FIRST_PAUSE);
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
        service.start_if_due(start);
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
        service.start_if_due(start);
        assert_eq!(service.due_in(start), Some(FIRST_PAUSE));
    }
}
