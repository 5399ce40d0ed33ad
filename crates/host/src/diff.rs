//! What is in one guest and not in another.
//!
//! ```text
//!   listing of one  ──┐ merged by path ──▶ only here, only there ────────┬─▶ files, in order
//!   listing of other ─┘                └─▶ both, and times leave doubt ──┘
//!                                          read on both sides, in batches
//! ```
//!
//! Two machines of one past share the inodes and times of what neither has touched. So a file
//! is the same where inode, times, size and rights are, unless it was changed about when the two
//! parted; where they are not, its content decides. That a file was only touched is no change.

use std::collections::HashSet;
use std::collections::VecDeque;
use std::hash::Hash;

use crate::guest::{
    FileKind, Guest, GuestError, GuestFile, GuestPath, GuestPort, GuestProcess, Inventory,
};

/// Files whose contents are asked for at once.
const BATCH: usize = 128;
/// Bytes of files that are read on each side for one comparison.
const READ_BUDGET: u64 = 256 << 20;
/// Bytes of text in one answer.
const TEXT_BUDGET: usize = 2 << 20;
/// What each restore writes anew: in two sandboxes these differ and nobody has changed them.
const IDENTITY_FILES: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/machine-id"];

/// What is compared, and how much of it.
#[derive(Debug, Clone)]
pub struct Asked {
    /// At and below this path.
    pub path: String,
    /// At most so many files, processes and ports each.
    pub limit: usize,
    /// What was changed since is compared by content whatever its times say; nanoseconds since
    /// 1970.
    pub doubt_from: i64,
    /// The two are not the same sandbox at two times.
    pub two_sandboxes: bool,
}

/// A file that is not the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileChange {
    /// As it is in the first; `None`: it is not there.
    pub now: Option<GuestFile>,
    /// As it is in the other.
    pub before: Option<GuestFile>,
}

/// What is in one and not in the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Only<T> {
    /// In the first.
    pub added: Vec<T>,
    /// In the other.
    pub removed: Vec<T>,
}

/// What differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// In the order of the tree.
    pub files: Vec<FileChange>,
    /// Programs that run.
    pub processes: Only<GuestProcess>,
    /// Ports that are listened on.
    pub ports: Only<GuestPort>,
    /// There is more.
    pub truncated: bool,
    /// So many files were judged by size and time, for they could not or should not be read.
    pub unread: u32,
}

/// Where files are listed and read.
pub trait Tree {
    /// The next one, in the order of keys.
    fn next(&mut self) -> impl Future<Output = Result<Option<GuestFile>, GuestError>> + Send;
    /// Whether there is more than it lists.
    fn truncated(&self) -> bool;
    /// What files hold.
    fn digests(
        &self,
        paths: &[&GuestPath],
    ) -> impl Future<Output = Result<Vec<Option<String>>, GuestError>> + Send;
}

/// A guest that is being listed.
pub struct GuestTree {
    /// Its agent.
    pub guest: Guest,
    /// What it has told.
    pub inventory: Inventory,
}

impl Tree for GuestTree {
    async fn next(&mut self) -> Result<Option<GuestFile>, GuestError> {
        self.inventory.next().await
    }

    fn truncated(&self) -> bool {
        self.inventory.truncated()
    }

    async fn digests(&self, paths: &[&GuestPath]) -> Result<Vec<Option<String>>, GuestError> {
        self.guest.digests(paths).await
    }
}

/// Compares two guests.
pub async fn compare(
    mut now: GuestTree,
    mut before: GuestTree,
    asked: &Asked,
) -> Result<Diff, GuestError> {
    let mut room = Room(TEXT_BUDGET);
    let (here, there) = (&now.inventory.running, &before.inventory.running);
    let (processes, more_processes) = only(&here.processes, &there.processes, asked.limit, |one| {
        room.take(one.command.len())
    });
    let (ports, more_ports) = only(&here.ports, &there.ports, asked.limit, |_| true);
    let mut files = Files {
        asked,
        room,
        found: Vec::new(),
        waiting: VecDeque::new(),
        budget: READ_BUDGET,
        unread: 0,
        truncated: false,
    };
    files.compare(&mut now, &mut before).await?;
    Ok(Diff {
        files: files.found,
        processes,
        ports,
        truncated: files.truncated || more_processes || more_ports,
        unread: files.unread,
    })
}

/// Text that an answer has room for.
struct Room(usize);

impl Room {
    /// What else an entry takes.
    const EACH: usize = 64;

    fn take(&mut self, bytes: usize) -> bool {
        let left = self.0.checked_sub(bytes + Self::EACH);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}

/// What only one of two lists has, at most `limit` of it as far as it fits; and whether there
/// is more.
fn only<T: Clone + Eq + Hash>(
    here: &[T],
    there: &[T],
    limit: usize,
    mut fits: impl FnMut(&T) -> bool,
) -> (Only<T>, bool) {
    let (known_here, known_there) = (here.iter().collect(), there.iter().collect());
    let mut left = limit;
    let mut more = false;
    let mut take = |list: &[T], known: &HashSet<&T>| -> Vec<T> {
        let mut taken = Vec::new();
        for one in list.iter().filter(|one| !known.contains(one)) {
            if left == 0 || !fits(one) {
                more = true;
                break;
            }
            left -= 1;
            taken.push(one.clone());
        }
        taken
    };
    let added = take(here, &known_there);
    let removed = take(there, &known_here);
    (Only { added, removed }, more)
}

/// What a look at two files of one path says.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    Changed,
    /// Their contents decide.
    Doubt,
}

fn judge(now: &GuestFile, before: &GuestFile, doubt_from: i64) -> Verdict {
    let rights = |file: &GuestFile| (file.kind, file.mode, file.uid, file.gid);
    if rights(now) != rights(before) {
        return Verdict::Changed;
    }
    if !matches!(now.kind, FileKind::File | FileKind::Symlink) {
        return Verdict::Same;
    }
    if now.size != before.size {
        return Verdict::Changed;
    }
    let version = |file: &GuestFile| (file.inode, file.modified, file.changed);
    let untouched = version(now) == version(before) && now.changed < doubt_from;
    match untouched || now.size == 0 {
        true => Verdict::Same,
        false => Verdict::Doubt,
    }
}

enum Waiting {
    Change(FileChange),
    Doubt(GuestFile, GuestFile),
}

struct Files<'a> {
    asked: &'a Asked,
    room: Room,
    found: Vec<FileChange>,
    /// In the order of the tree, until the doubts among them are settled.
    waiting: VecDeque<Waiting>,
    budget: u64,
    unread: u32,
    truncated: bool,
}

impl Files<'_> {
    async fn compare(
        &mut self,
        now: &mut impl Tree,
        before: &mut impl Tree,
    ) -> Result<(), GuestError> {
        let (mut here, mut there) = (now.next().await?, before.next().await?);
        loop {
            // What comes after the end of a list that is cut short is not known to be new.
            if (here.is_none() && now.truncated()) || (there.is_none() && before.truncated()) {
                self.truncated = true;
                break;
            }
            let order = match (&here, &there) {
                (None, None) => break,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some(here), Some(there)) => here.key.cmp(&there.key),
            };
            let mut pair = FileChange {
                now: None,
                before: None,
            };
            if order.is_le() {
                pair.now = here.take();
                here = now.next().await?;
            }
            if order.is_ge() {
                pair.before = there.take();
                there = before.next().await?;
            }
            self.look_at(pair);
            if self.waiting.len() >= BATCH && !self.settle(now, before).await? {
                return Ok(());
            }
        }
        self.settle(now, before).await?;
        Ok(())
    }

    fn look_at(&mut self, pair: FileChange) {
        let (now, before) = match pair {
            FileChange {
                now: Some(now),
                before: Some(before),
            } => (now, before),
            one_sided => {
                self.waiting.push_back(Waiting::Change(one_sided));
                return;
            }
        };
        if self.asked.two_sandboxes && IDENTITY_FILES.contains(&now.path().as_str()) {
            return;
        }
        match judge(&now, &before, self.asked.doubt_from) {
            Verdict::Same => {}
            Verdict::Changed => self.waiting.push_back(Waiting::Change(FileChange {
                now: Some(now),
                before: Some(before),
            })),
            Verdict::Doubt => self.waiting.push_back(Waiting::Doubt(now, before)),
        }
    }

    /// Decides what waits. `false` when no more is to be found.
    async fn settle(&mut self, now: &impl Tree, before: &impl Tree) -> Result<bool, GuestError> {
        let mut paths = Vec::new();
        let mut asked_for = Vec::new();
        for waiting in &self.waiting {
            let Waiting::Doubt(file, _) = waiting else {
                continue;
            };
            let within = self.budget.checked_sub(file.size);
            self.budget = within.unwrap_or(self.budget);
            asked_for.push(within.is_some());
            if within.is_some() {
                paths.push(&file.name);
            }
        }
        let (here, there) = match paths.is_empty() {
            true => (Vec::new(), Vec::new()),
            false => tokio::try_join!(now.digests(&paths), before.digests(&paths))?,
        };
        let mut digests = here.into_iter().zip(there);
        let mut asked_for = asked_for.into_iter();
        while let Some(waiting) = self.waiting.pop_front() {
            let change = match waiting {
                Waiting::Change(change) => change,
                Waiting::Doubt(now, before) => {
                    let read = asked_for.next().unwrap_or(false);
                    let read = read.then(|| digests.next()).flatten();
                    let same = match read {
                        Some((Some(here), Some(there))) => here == there,
                        _ => {
                            self.unread = self.unread.saturating_add(1);
                            now.modified == before.modified
                        }
                    };
                    if same {
                        continue;
                    }
                    FileChange {
                        now: Some(now),
                        before: Some(before),
                    }
                }
            };
            let path = change.now.as_ref().or(change.before.as_ref());
            let length = path.map_or(0, |file| file.key.len());
            if self.found.len() == self.asked.limit || !self.room.take(length) {
                self.truncated = true;
                return Ok(false);
            }
            self.found.push(change);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
