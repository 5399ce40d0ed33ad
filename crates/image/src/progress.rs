//! What a build tells while it runs. Drawing is the caller's business.

use std::time::{Duration, Instant};

/// The steps of a build, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Ask apt which packages, versions and hashes the image is made of.
    Resolve,
    /// Download those packages.
    Download,
    /// Install them into a folder.
    Install,
    /// Unpack the kernel and its modules.
    Kernel,
    /// Make the root file system and the initramfs.
    FileSystem,
    /// Digest everything, write the manifest, put the image in its place.
    Commit,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Step; 6] = [
        Step::Resolve,
        Step::Download,
        Step::Install,
        Step::Kernel,
        Step::FileSystem,
        Step::Commit,
    ];

    /// What the step does, for people.
    pub const fn title(self) -> &'static str {
        match self {
            Step::Resolve => "resolving packages",
            Step::Download => "downloading packages",
            Step::Install => "installing packages",
            Step::Kernel => "preparing the kernel",
            Step::FileSystem => "making the file system",
            Step::Commit => "checking and storing",
        }
    }

    /// Place among [`Step::ALL`], from 0.
    pub fn index(self) -> usize {
        Step::ALL
            .iter()
            .position(|step| *step == self)
            .unwrap_or_default()
    }
}

/// One message of a running build.
#[derive(Debug, Clone, Copy)]
pub struct StepEvent {
    /// Which step.
    pub step: Step,
    /// How much of it is done, 0 to 1, where that can be known.
    pub fraction: Option<f32>,
    /// How long the step has taken so far.
    pub elapsed: Duration,
    /// The last message of this step.
    pub done: bool,
}

/// Watches a build, and may end it.
pub trait Progress: Sync {
    /// Called when a step starts, several times a second while it runs, and when it is done.
    fn step(&self, event: StepEvent);

    /// Asked several times a second; true ends the build with
    /// [`ImageError::Cancelled`](crate::ImageError::Cancelled) and leaves nothing behind.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Nobody watches.
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _: StepEvent) {}
}

/// One step under way: says so at once, and again when it is finished.
pub(crate) struct Running<'a> {
    progress: &'a dyn Progress,
    step: Step,
    start: Instant,
}

impl<'a> Running<'a> {
    pub(crate) fn start(progress: &'a dyn Progress, step: Step) -> Self {
        let running = Running {
            progress,
            step,
            start: Instant::now(),
        };
        running.tell(None, false);
        running
    }

    pub(crate) fn fraction(&self, fraction: Option<f32>) {
        self.tell(fraction.map(|value| value.clamp(0.0, 1.0)), false);
    }

    pub(crate) fn cancelled(&self) -> bool {
        self.progress.cancelled()
    }

    pub(crate) fn finish(self) {
        self.tell(Some(1.0), true);
    }

    fn tell(&self, fraction: Option<f32>, done: bool) {
        let elapsed = self.start.elapsed();
        self.progress.step(StepEvent {
            step: self.step,
            fraction,
            elapsed,
            done,
        });
    }
}
