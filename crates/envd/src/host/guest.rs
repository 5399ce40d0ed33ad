//! What makes a clone its own: randomness, machine id, names, marker files, clock.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, DynamicClockId, Timespec};
use sha2::{Digest, Sha256};

use super::certificate::{Recorder, Step};

/// KVM's clock of the host. Where it is, chronyd keeps the time by it, yet only some samples
/// after a restore; so that the first program is not told the time of the freeze, the hook
/// reads it as well.
const PTP_CLOCK: &str = "/dev/ptp0";
/// Tells our line in `/etc/hosts`.
const HOSTS_MARK: &str = "# this sandbox";
/// Limit of the kernel, see sethostname(2).
const HOSTNAME_MAX: usize = 64;

/// What to become.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) seed: [u8; 32],
    /// `None` when it has these names already, as a sandbox that was paused: what its user has
    /// made of the files since is left alone.
    pub(super) names: Option<Names>,
    /// The host's time.
    pub(super) now: Option<Told>,
}

/// A time that the host told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Told {
    /// What it was when it was sent, since 1970.
    pub(super) time: Duration,
    /// When that was received.
    pub(super) at: Instant,
}

impl Told {
    /// The best that is known of the host's time now: KVM's clock where there is one, else what
    /// was told and how long ago. What it was on its way for is missing.
    fn now(self) -> Duration {
        host_clock().unwrap_or_else(|| self.time.saturating_add(self.at.elapsed()))
    }
}

/// Who a machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    /// What the machine id is made from: the same sandbox keeps its own.
    pub(super) machine: Option<String>,
    pub(super) hostname: Option<String>,
    pub(super) sandbox_id: Option<String>,
    pub(super) template_id: Option<String>,
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum GuestError {
    #[error("cannot reseed the kernel's random number generator: {0}")]
    Reseed(#[source] io::Error),
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("host name '{0}' is not made of letters, digits, dots and hyphens, or too long")]
    HostnameForm(String),
    #[error("cannot set the host name '{name}': {source}")]
    Hostname { name: String, source: io::Error },
    #[error("cannot set the clock: {0}")]
    Clock(#[source] io::Error),
}

/// Variables that every program of a sandbox has.
pub(super) fn variables(
    sandbox_id: Option<&str>,
    template_id: Option<&str>,
) -> BTreeMap<String, String> {
    let mut envs = BTreeMap::new();
    for brand in ["E2B", "WRENN"] {
        envs.insert(format!("{brand}_SANDBOX"), "true".to_owned());
        for (name, value) in [("SANDBOX_ID", sandbox_id), ("TEMPLATE_ID", template_id)] {
            if let Some(value) = value {
                envs.insert(format!("{brand}_{name}"), value.to_owned());
            }
        }
    }
    envs
}

/// Carries out the plan, and has it recorded. Blocks.
pub(super) fn become_itself(plan: &Plan, recorder: &mut Recorder) -> Result<(), GuestError> {
    crate::sys::reseed(&plan.seed).map_err(GuestError::Reseed)?;
    recorder.certificate.entropy_reseeded = true;
    recorder.done(Step::Entropy);
    if let Some(told) = plan.now {
        let now = told.now();
        recorder.clock_was(clock(), now);
        set_clock(now)?;
        recorder.certificate.clock_set = true;
        recorder.done(Step::Clock);
    }
    if let Some(names) = &plan.names {
        take_names(names)?;
    }
    recorder.done(Step::Identity);
    Ok(())
}

/// A machine's clock stands while the machine does: brings it to the host's time. One that is
/// ahead stays so, for what was told is old by what it was on its way for.
pub(super) fn catch_up(told: Told) -> Result<(), GuestError> {
    let now = told.now();
    match clock() < now {
        true => set_clock(now),
        false => Ok(()),
    }
}

fn take_names(names: &Names) -> Result<(), GuestError> {
    if let Some(machine) = &names.machine {
        let id = hex::encode(&Sha256::digest(format!("wrenn machine id {machine}"))[..16]);
        write(Path::new("/etc/machine-id"), &format!("{id}\n"))?;
    }
    if let Some(name) = names.hostname.as_deref().filter(|name| !name.is_empty()) {
        set_hostname(name)?;
    }
    markers(Path::new("/run"), names)
}

/// The guest's time since 1970.
pub(super) fn clock() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    // Before 1970 nothing is further from the host's time than 1970 is.
    now.unwrap_or_default()
}

/// The host's time as KVM tells it now; `None` where it does not.
fn host_clock() -> Option<Duration> {
    let device = std::fs::File::open(PTP_CLOCK).ok()?;
    let id = DynamicClockId::Dynamic(device.as_fd());
    let time = rustix::time::clock_gettime_dynamic(id).ok()?;
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

/// Writes in place. ext4 takes a file that is emptied and closed for one that is replaced,
/// and starts to write it to the disk there and then: half of what a restore would cost.
fn write(path: &Path, content: &str) -> Result<(), GuestError> {
    let write = || {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        file.write_all_at(content.as_bytes(), 0)?;
        let length = content.len() as u64;
        if file.metadata()?.len() > length {
            file.set_len(length)?;
        }
        Ok(())
    };
    write().map_err(|source| GuestError::Write {
        path: path.to_owned(),
        source,
    })
}

fn set_clock(now: Duration) -> Result<(), GuestError> {
    let time = Timespec {
        tv_sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: now.subsec_nanos().into(),
    };
    rustix::time::clock_settime(ClockId::Realtime, time).map_err(|e| GuestError::Clock(e.into()))
}

fn set_hostname(name: &str) -> Result<(), GuestError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.len() > HOSTNAME_MAX || !name.chars().all(allowed) {
        return Err(GuestError::HostnameForm(name.to_owned()));
    }
    rustix::system::sethostname(name.as_bytes()).map_err(|e| GuestError::Hostname {
        name: name.to_owned(),
        source: e.into(),
    })?;
    write(Path::new("/etc/hostname"), &format!("{name}\n"))?;
    let path = Path::new("/etc/hosts");
    let before = std::fs::read_to_string(path).unwrap_or_default();
    write(path, &with_own_name(&before, name))
}

/// `/etc/hosts` with exactly one line of ours.
fn with_own_name(before: &str, name: &str) -> String {
    let mut after = String::new();
    for line in before.lines().filter(|line| !line.ends_with(HOSTS_MARK)) {
        after.push_str(line);
        after.push('\n');
    }
    after.push_str(&format!("127.0.1.1\t{name} {HOSTS_MARK}\n"));
    after
}

/// Files by which programs see where they are.
fn markers(run: &Path, names: &Names) -> Result<(), GuestError> {
    for (dir, brands) in [("e2b", &["E2B"][..]), ("wrenn", &["E2B", "WRENN"])] {
        let dir = run.join(dir);
        std::fs::create_dir_all(&dir).map_err(|source| GuestError::Write {
            path: dir.clone(),
            source,
        })?;
        let all = variables(names.sandbox_id.as_deref(), names.template_id.as_deref());
        for (name, value) in all
            .iter()
            .filter(|(name, _)| brands.iter().any(|b| name.starts_with(b)))
        {
            write(&dir.join(format!(".{name}")), value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_has_one_line_of_ours() {
        let once = with_own_name("127.0.0.1 localhost\n", "a");
        let twice = with_own_name(&once, "b");
        assert_eq!(twice, "127.0.0.1 localhost\n127.0.1.1\tb # this sandbox\n");
    }

    #[test]
    fn programs_find_who_they_are() {
        let run = std::env::temp_dir().join(format!("envd-markers-{}", std::process::id()));
        let names = Names {
            machine: None,
            hostname: None,
            sandbox_id: Some("sb-1".into()),
            template_id: None,
        };
        // What was longer before leaves nothing behind.
        std::fs::create_dir_all(run.join("wrenn")).unwrap();
        std::fs::write(run.join("wrenn/.WRENN_SANDBOX_ID"), "sb-12345").unwrap();
        markers(&run, &names).unwrap();
        let read = |name: &str| std::fs::read_to_string(run.join(name)).ok();
        assert_eq!(read("e2b/.E2B_SANDBOX").as_deref(), Some("true"));
        assert_eq!(read("wrenn/.WRENN_SANDBOX_ID").as_deref(), Some("sb-1"));
        assert_eq!(read("e2b/.WRENN_SANDBOX_ID"), None);
        assert_eq!(read("e2b/.E2B_TEMPLATE_ID"), None);
        std::fs::remove_dir_all(&run).unwrap();
        assert_eq!(variables(Some("a"), Some("b"))["E2B_TEMPLATE_ID"], "b");
    }

    #[test]
    fn a_bad_host_name_is_refused_before_anything_is_set() {
        for name in ["a b", "a\nb", "ä", &"x".repeat(65)] {
            assert!(
                matches!(set_hostname(name), Err(GuestError::HostnameForm(_))),
                "{name}"
            );
        }
    }
}
