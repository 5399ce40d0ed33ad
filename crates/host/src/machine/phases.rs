//! The steps of an operation: where its time went, and where it can be made to crash.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

/// Where the time of an operation went, in order.
#[derive(Debug, Default, Clone)]
pub struct Phases(pub Vec<(&'static str, Duration)>);

impl Phases {
    /// Notes the time since `*since` under `name`, and starts the next phase.
    pub fn note(&mut self, name: &'static str, since: &mut Instant) {
        let now = Instant::now();
        self.0.push((name, now - *since));
        *since = now;
        reached(name);
    }
}

static CRASH_FILE: OnceLock<PathBuf> = OnceLock::new();

/// From now on this process kills itself at the end of the step whose name this file holds, or
/// with `hold ` before the name stops itself there until it is continued; as long as there is no
/// such file nothing happens. For tests of what a crash leaves, and a disk that is full just then.
pub fn crash_by(file: PathBuf) {
    // Set once, at the start of a process.
    let _ = CRASH_FILE.set(file);
}

/// A step is done; see [`crash_by`].
pub fn reached(step: &str) {
    let Some(file) = CRASH_FILE.get() else {
        return;
    };
    let wanted = std::fs::read_to_string(file).unwrap_or_default();
    let (signal, wanted, arrives_within) = match wanted.trim().strip_prefix("hold ") {
        Some(wanted) => (Signal::STOP, wanted, Duration::from_millis(100)),
        None => (Signal::KILL, wanted.trim(), Duration::from_secs(60)),
    };
    if wanted == step {
        // Once: whoever comes after this process goes on.
        let _ = std::fs::remove_file(file);
        let _ = kill_process(getpid(), signal);
        // The signal is on its way, and nothing may be done until it is there.
        std::thread::sleep(arrives_within);
    }
}
