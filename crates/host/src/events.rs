//! What happened to sandboxes, numbered, and kept until the control plane says that it has it.
//!
//! `events.jsonl` in the data folder is appended to, one event a line, before anybody can hear
//! of it; its first line names the log and the number that the next line has. What was
//! acknowledged is cut off by writing the file anew and renaming it. It is not synced: it guards
//! against the death of this process and of the control plane. A crash in the middle of a line
//! costs that line, and the event had then been heard of by nobody.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use wrenn_types::SandboxId;

const FILE: &str = "events.jsonl";
/// So many unacknowledged events are kept; the oldest go first.
const MOST: usize = 20_000;
/// So many acknowledged ones stay in the file before it is written anew.
const SLACK: usize = 256;
/// At most so many are sent at once.
const BATCH: usize = 500;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It runs for the first time.
    Started,
    /// It was saved and its machine given back.
    Paused,
    /// It could not be paused and runs on.
    PauseFailed,
    /// It was restored and runs again.
    Resumed,
    /// A snapshot of it was taken; it is as it was.
    Saved,
    /// It was put back to a snapshot of itself.
    RolledBack,
    /// An agent that was started anew found it and goes on with it.
    Adopted,
    /// Its guest agent does not answer.
    Unresponsive,
    /// Its guest agent answers again.
    Responsive,
    /// It is over.
    Ended,
}

impl Kind {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Started => "started",
            Kind::Paused => "paused",
            Kind::PauseFailed => "pause_failed",
            Kind::Resumed => "resumed",
            Kind::Saved => "saved",
            Kind::RolledBack => "rolled_back",
            Kind::Adopted => "adopted",
            Kind::Unresponsive => "unresponsive",
            Kind::Responsive => "responsive",
            Kind::Ended => "ended",
        }
    }
}

/// On whose account it happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// Somebody asked for it.
    Request,
    /// Its time was over.
    Clock,
    /// Somebody opened one of its ports.
    Traffic,
    /// The guest did it.
    Guest,
    /// The host did it, or something on the host.
    Host,
}

impl Actor {
    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Actor::Request => "request",
            Actor::Clock => "clock",
            Actor::Traffic => "traffic",
            Actor::Guest => "guest",
            Actor::Host => "host",
        }
    }
}

/// What is known of a sandbox that has ended; the fields are those of the RPC.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeathCertificate {
    /// "stopped" or "error".
    pub state: String,
    /// The class of the reason, one word.
    pub cause: String,
    /// Milliseconds since it was given to its user.
    pub lived_ms: u64,
    /// The end of its console.
    pub console: String,
    /// The last program started through this agent; empty: none.
    pub last_command: String,
    /// Processor time of its last machine's monitor, in milliseconds.
    pub cpu_ms: u64,
    /// Guest memory that was in use when it was last looked at, in bytes.
    pub memory_bytes: u64,
    /// The same for its disk.
    pub disk_bytes: u64,
    /// The snapshot it was last saved as or restored from; empty: none.
    pub last_snapshot: String,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; the first is 1.
    pub seq: u64,
    /// When, in milliseconds since 1970.
    pub at_unix_ms: i64,
    /// To which sandbox.
    pub sandbox: SandboxId,
    /// What.
    pub kind: Kind,
    /// On whose account.
    pub actor: Actor,
    /// Why, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// With [`Kind::Ended`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub death: Option<Box<DeathCertificate>>,
}

/// The first line of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    log: String,
    /// Number of the line that follows.
    next: u64,
}

struct Inner {
    id: String,
    file: File,
    /// Not acknowledged, ascending.
    waiting: VecDeque<Event>,
    next: u64,
    /// Lines of the file that are acknowledged.
    stale: usize,
}

/// The log of this host.
pub struct EventLog {
    path: PathBuf,
    inner: Mutex<Inner>,
    newest: watch::Sender<u64>,
}

impl EventLog {
    /// Opens the log in `data_dir`, or begins one. A log that cannot be read is put aside and
    /// a new one begun, under another id: what is wrong with history must not keep the host
    /// from working.
    pub fn open(data_dir: &Path) -> io::Result<EventLog> {
        let path = data_dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let read = text.as_deref().map(parse);
        let (id, waiting, next) = match read {
            Some(Ok(read)) => read,
            Some(Err(why)) => {
                let aside = data_dir.join(format!("{FILE}.damaged"));
                tracing::error!(file = %path.display(), %why, aside = %aside.display(), "the log of events is damaged; a new one begins");
                std::fs::rename(&path, &aside)?;
                (new_id()?, VecDeque::new(), 1)
            }
            None => (new_id()?, VecDeque::new(), 1),
        };
        let file = rewrite(&path, &id, &waiting, next)?;
        Ok(EventLog {
            path,
            inner: Mutex::new(Inner {
                id,
                file,
                waiting,
                next,
                stale: 0,
            }),
            newest: watch::channel(next - 1).0,
        })
    }

    #[cfg(test)]
    fn id(&self) -> String {
        self.inner().id.clone()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic between two steps leaves at worst a line in the file that was not counted;
        // no step here panics.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Writes down that this happened now. If that fails it is told to the log of the process:
    /// what has happened cannot be undone for want of a note about it.
    pub fn add(
        &self,
        sandbox: SandboxId,
        kind: Kind,
        actor: Actor,
        reason: Option<String>,
        death: Option<DeathCertificate>,
    ) {
        let mut inner = self.inner();
        let event = Event {
            seq: inner.next,
            at_unix_ms: crate::activity::unix_ms(std::time::SystemTime::now()),
            sandbox,
            kind,
            actor,
            reason,
            death: death.map(Box::new),
        };
        let written = line(&event).and_then(|line| inner.file.write_all(&line));
        if let Err(error) = written {
            tracing::error!(%sandbox, kind = kind.word(), %error, "an event is not in the log on disk");
        }
        inner.next += 1;
        inner.waiting.push_back(event);
        if inner.waiting.len() > MOST {
            inner.waiting.pop_front();
            inner.stale += 1;
        }
        let newest = inner.next - 1;
        drop(inner);
        self.newest.send_replace(newest);
    }

    /// Forgets what the asker has, and gives what came after it and the name of the log; waits
    /// up to `patience` for a first one. An asker who counts in another log gets all there is.
    pub async fn after(
        &self,
        log: &str,
        seq: u64,
        limit: usize,
        patience: Duration,
    ) -> io::Result<(String, Vec<Event>)> {
        let seq = self.acknowledge(log, seq)?;
        let mut newest = self.newest.subscribe();
        let news = newest.wait_for(|newest| *newest > seq);
        // Whether or not something came, what there is is given.
        drop(tokio::time::timeout(patience, news).await);
        let limit = if limit == 0 { BATCH } else { limit.min(BATCH) };
        let inner = self.inner();
        let found = inner.waiting.iter().filter(|event| event.seq > seq);
        Ok((inner.id.clone(), found.take(limit).cloned().collect()))
    }

    /// Forgets up to `seq`, if that counts in this log, and says what to go on after.
    fn acknowledge(&self, log: &str, seq: u64) -> io::Result<u64> {
        let mut inner = self.inner();
        if log != inner.id || seq == 0 {
            return Ok(0);
        }
        if seq >= inner.next {
            // A power loss took events that the asker has: their numbers must not come again
            // under this name.
            let id = new_id()?;
            inner.file = rewrite(&self.path, &id, &inner.waiting, inner.next)?;
            inner.id = id;
            return Ok(0);
        }
        while inner.waiting.front().is_some_and(|event| event.seq <= seq) {
            inner.waiting.pop_front();
            inner.stale += 1;
        }
        if inner.stale > SLACK {
            inner.file = rewrite(&self.path, &inner.id, &inner.waiting, inner.next)?;
            inner.stale = 0;
        }
        Ok(seq)
    }
}

fn new_id() -> io::Result<String> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(hex::encode(random))
}

fn line(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// Puts a file in place that holds these events, and opens it for more; `next` is the number of
/// the one after them.
fn rewrite(path: &Path, id: &str, events: &VecDeque<Event>, next: u64) -> io::Result<File> {
    let next = events.front().map_or(next, |event| event.seq);
    let mut bytes = line(&Head {
        log: id.to_owned(),
        next,
    })?;
    for event in events {
        bytes.extend(line(event)?);
    }
    let new = path.with_extension("new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(&bytes)?;
    std::fs::rename(&new, path)?;
    Ok(file)
}

type Parsed = (String, VecDeque<Event>, u64);

/// The log's id, its events, and the number of the next one.
fn parse(text: &[u8]) -> Result<Parsed, String> {
    // What follows the last line's end was being written when its writer died.
    let whole = text.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    let mut lines = text[..whole].split(|byte| *byte == b'\n');
    let head = lines.next().unwrap_or_default();
    let head: Head = serde_json::from_slice(head).map_err(|e| format!("its first line: {e}"))?;
    let mut events = VecDeque::new();
    let mut last = head.next.checked_sub(1).ok_or("its numbers begin at 0")?;
    for (n, line) in lines.enumerate() {
        let event: Event =
            serde_json::from_slice(line).map_err(|e| format!("line {}: {e}", n + 2))?;
        if event.seq <= last {
            return Err(format!("line {}: its number is not above {last}", n + 2));
        }
        last = event.seq;
        events.push_back(event);
    }
    let next = last.checked_add(1).ok_or("its numbers are used up")?;
    Ok((head.log, events, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn add(log: &EventLog, reason: &str) {
        let reason = Some(reason.to_owned());
        log.add(SandboxId::new(), Kind::Paused, Actor::Clock, reason, None);
    }

    async fn reasons(log: &EventLog, seq: u64) -> Vec<(u64, String)> {
        let (_, events) = log.after(&log.id(), seq, 0, NOW).await.unwrap();
        let events = events.into_iter();
        events.map(|e| (e.seq, e.reason.unwrap())).collect()
    }

    #[tokio::test]
    async fn g03_events_are_given_until_they_are_acknowledged_and_numbers_never_go_back() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        for name in ["a", "b", "c"] {
            add(&log, name);
        }
        let all = [(1, "a".into()), (2, "b".into()), (3, "c".into())];
        // Asked for again and again, and by one who knows another log.
        assert_eq!(reasons(&log, 0).await, all);
        let (_, other) = log.after("another", 7, 0, NOW).await.unwrap();
        assert_eq!(other.len(), 3);
        assert_eq!(reasons(&log, 2).await, all[2..]);
        // A new agent goes on where the last one stopped.
        drop(log);
        let log = EventLog::open(dir.path()).unwrap();
        assert_eq!(reasons(&log, 2).await, all[2..]);
        assert_eq!(reasons(&log, 3).await, []);
        drop(log);
        let log = EventLog::open(dir.path()).unwrap();
        add(&log, "d");
        assert_eq!(reasons(&log, 3).await, [(4, "d".into())]);
    }

    #[tokio::test]
    async fn acknowledged_events_leave_the_file_and_their_numbers_stay_used() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        let many = u64::try_from(2 * SLACK).unwrap();
        for n in 0..many {
            add(&log, &n.to_string());
        }
        let size = || dir.path().join(FILE).metadata().unwrap().len();
        let full = size();
        assert_eq!(reasons(&log, many).await, []);
        assert!(size() < 200 && full > 10_000, "{} of {full}", size());
        let id = log.id();
        drop(log);
        let log = EventLog::open(dir.path()).unwrap();
        assert_eq!(log.id(), id);
        add(&log, "next");
        assert_eq!(reasons(&log, many).await, [(many + 1, "next".into())]);
    }

    #[tokio::test]
    async fn a_line_cut_short_is_dropped_and_damage_begins_a_new_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        add(&log, "a");
        add(&log, "b");
        let id = log.id();
        drop(log);
        let path = dir.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        assert_eq!(log.id(), id);
        assert_eq!(reasons(&log, 0).await, [(1, "a".into())]);
        drop(log);
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] = b'{';
        std::fs::write(&path, &damaged).unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        assert_ne!(log.id(), id);
        assert_eq!(reasons(&log, 0).await, []);
        assert!(dir.path().join(format!("{FILE}.damaged")).exists());
    }

    #[tokio::test]
    async fn a_waiter_hears_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let log = std::sync::Arc::new(EventLog::open(dir.path()).unwrap());
        let waiter = tokio::spawn({
            let log = log.clone();
            async move { log.after("", 0, 0, Duration::from_secs(60)).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiter.is_finished());
        add(&log, "news");
        let (_, heard) = waiter.await.unwrap().unwrap();
        assert_eq!(heard.len(), 1);
    }

    #[tokio::test]
    async fn events_lost_with_the_power_do_not_lend_their_numbers_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let log = EventLog::open(dir.path()).unwrap();
        add(&log, "a");
        let id = log.id();
        // The asker has up to 5.
        let (other, events) = log.after(&id, 5, 0, NOW).await.unwrap();
        assert_ne!(other, id);
        assert_eq!(events.len(), 1);
        assert_eq!(reasons(&log, 1).await, []);
    }
}
