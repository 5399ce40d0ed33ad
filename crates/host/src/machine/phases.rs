//! The steps of an operation: where its time went, and where it can be made to crash.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

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

/// From now on this process kills itself at the end of the step whose name this file holds; as
/// long as there is no such file nothing happens. For tests of what a crash leaves.
pub fn crash_by(file: PathBuf) {
    // Set once, at the start of a process.
    let _ = CRASH_FILE.set(file);
}

/// A step is done; see [`crash_by`].
pub fn reached(step: &str) {
    let Some(file) = CRASH_FILE.get() else {
        return;
    };
    if std::fs::read_to_string(file).is_ok_and(|wanted| wanted.trim() == step) {
        // Once: whoever comes after this process goes on.
        let _ = std::fs::remove_file(file);
        let myself = rustix::process::getpid();
        let _ = rustix::process::kill_process(myself, rustix::process::Signal::KILL);
        // The signal is on its way, and nothing may be done until it is there.
        std::thread::sleep(Duration::from_secs(60));
    }
}
