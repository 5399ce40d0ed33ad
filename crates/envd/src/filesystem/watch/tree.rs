//! The directories behind one kernel queue, and what its events mean.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::fs::{FileType as Kind, Mode, OFlags};
use rustix::io::Errno;
use wrenn_wire::filesystem::EventType;

use super::{Batch, Event, Options, mounts};
use crate::filesystem::entry::{self, Names};
use crate::filesystem::error::FsError;
use crate::filesystem::hidden::{self, Appears};

/// A reading stops here, so that one busy directory does not keep a thread.
const BATCH: usize = 1024;
/// Bytes read from the kernel at once.
const BUFFER: usize = 16 << 10;
/// How long the second half of a rename may lag behind the first: both are queued by the
/// same system call.
const RENAME_LAG: Duration = Duration::from_millis(2);

/// A file that is open although it was unlinked (an upload under way, an `O_TMPFILE`) is
/// nobody's business, hence `EXCL_UNLINK`.
const MASK: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::EXCL_UNLINK)
    .union(WatchFlags::ONLYDIR);

struct Node {
    parent: Option<i32>,
    name: OsString,
}

/// See the module.
pub(super) struct Tree {
    root: PathBuf,
    root_wd: i32,
    options: Options,
    nodes: HashMap<i32, Node>,
    names: Names,
    /// Directories that have left their place and not yet arrived, by cookie.
    leaving: HashMap<u32, i32>,
    /// Uploads that have left their hidden name and not yet arrived.
    appearing: HashMap<u32, Appears>,
    /// What was found in directories that appeared and has been reported, so that events of
    /// the same things, queued at the same time, are not reported again; and the same from
    /// the reading before.
    found: HashSet<(i32, OsString)>,
    found_before: HashSet<(i32, OsString)>,
}

/// What the reader needs of a kernel event, owned.
struct Raw {
    wd: i32,
    flags: ReadFlags,
    cookie: u32,
    name: Option<OsString>,
}

impl Tree {
    /// Watches `root`, and what is below it where the options say so.
    pub(super) fn plant(queue: &OwnedFd, root: PathBuf, options: Options) -> Result<Tree, FsError> {
        let mut tree = Tree {
            root: root.clone(),
            root_wd: 0,
            options,
            nodes: HashMap::new(),
            names: Names::default(),
            leaving: HashMap::new(),
            appearing: HashMap::new(),
            found: HashSet::new(),
            found_before: HashSet::new(),
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&root, flags, Mode::empty())
            .map_err(|errno| FsError::from_errno("watch", &root, errno))?;
        let stat =
            rustix::fs::fstat(&dir).map_err(|errno| FsError::from_errno("watch", &root, errno))?;
        if Kind::from_raw_mode(stat.st_mode) != Kind::Directory {
            return Err(FsError::NotDirectory(root));
        }
        if !options.allow_network_mounts
            && let Some(kind) = mounts::network(&dir, &root)?
        {
            return Err(FsError::Invalid(format!(
                "path '{}' is on a network file system ({kind}), where changes made elsewhere are not seen; set allow_network_mounts to watch it all the same",
                root.display()
            )));
        }
        tree.root_wd = watch(queue, &dir, &root)?;
        let node = Node {
            parent: None,
            name: OsString::new(),
        };
        tree.nodes.insert(tree.root_wd, node);
        if options.recursive {
            tree.descend(queue, tree.root_wd, None)?;
        }
        Ok(tree)
    }

    /// Reads the queue until it is empty or a batch is full.
    pub(super) fn read(&mut self, queue: &OwnedFd) -> Result<Batch, FsError> {
        let mut batch = Batch::default();
        let mut lost = None;
        let mut waited = false;
        loop {
            let raw = match take(queue) {
                Ok(raw) if raw.is_empty() => {
                    let half_way = !self.leaving.is_empty() || !self.appearing.is_empty();
                    if half_way && !waited {
                        waited = true;
                        std::thread::sleep(RENAME_LAG);
                        continue;
                    }
                    break;
                }
                Ok(raw) => raw,
                Err(errno) => return Err(FsError::from_errno("watch", &self.root, errno)),
            };
            for event in raw {
                if let Err(error) = self.take_in(queue, event, &mut batch) {
                    lost = Some(error);
                }
            }
            if batch.events.len() >= BATCH {
                batch.more = true;
                break;
            }
        }
        if !batch.more {
            self.settle(queue);
        }
        match lost {
            Some(error) => Err(error),
            None => Ok(batch),
        }
    }

    /// The queue is empty: what left and did not arrive has left the tree.
    fn settle(&mut self, queue: &OwnedFd) {
        self.appearing.clear();
        for (_, wd) in std::mem::take(&mut self.leaving) {
            self.forget_below(queue, wd);
        }
        self.found_before = std::mem::take(&mut self.found);
    }

    fn take_in(&mut self, queue: &OwnedFd, raw: Raw, batch: &mut Batch) -> Result<(), FsError> {
        if raw.flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Err(FsError::EventsLost);
        }
        if raw.flags.contains(ReadFlags::IGNORED) {
            self.nodes.remove(&raw.wd);
            batch.over |= raw.wd == self.root_wd;
            return Ok(());
        }
        let Some(name) = raw.name else {
            self.of_directory(raw.wd, raw.flags, batch);
            return Ok(());
        };
        let Some(path) = self.relative(raw.wd).map(|dir| dir.join(&name)) else {
            return Ok(());
        };
        if hidden::is_hidden(name.as_bytes()) {
            if raw.flags.contains(ReadFlags::MOVED_FROM)
                && let Some(appears) = hidden::upload(name.as_bytes())
            {
                self.appearing.insert(raw.cookie, appears);
            }
            return Ok(());
        }
        if is_nameless(name.as_bytes()) && rustix::fs::lstat(self.root.join(&path)).is_err() {
            return Ok(());
        }
        let is_dir = raw.flags.contains(ReadFlags::ISDIR);
        let place = (raw.wd, name);
        if raw
            .flags
            .intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO)
        {
            let told = self.found.remove(&place) | self.found_before.remove(&place);
            if raw.cookie != 0
                && let Some(appears) = self.appearing.remove(&raw.cookie)
            {
                for kind in &meaning(appears)[usize::from(told && appears.is_new())..] {
                    self.report(&path, *kind, batch);
                }
                return Ok(());
            }
            if !told {
                self.report(&path, EventType::EVENT_TYPE_CREATE, batch);
            }
            // What was found has been looked into as well.
            let known = told && !self.leaving.contains_key(&raw.cookie);
            if is_dir && self.options.recursive && !known {
                let made = raw.flags.contains(ReadFlags::CREATE);
                return self.arrive(queue, place, raw.cookie, made, batch);
            }
        } else if raw.flags.contains(ReadFlags::MODIFY) {
            self.report(&path, EventType::EVENT_TYPE_WRITE, batch);
        } else if raw.flags.contains(ReadFlags::ATTRIB) {
            self.report(&path, EventType::EVENT_TYPE_CHMOD, batch);
        } else if raw
            .flags
            .intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM)
        {
            self.found.remove(&place);
            self.found_before.remove(&place);
            let kind = if raw.flags.contains(ReadFlags::DELETE) {
                EventType::EVENT_TYPE_REMOVE
            } else {
                if is_dir && let Some(wd) = self.child(place.0, &place.1) {
                    self.leaving.insert(raw.cookie, wd);
                }
                EventType::EVENT_TYPE_RENAME
            };
            self.report(&path, kind, batch);
        }
        Ok(())
    }

    /// An event without a name is of a watched directory itself. For those below the root
    /// their parent tells the same with a name.
    fn of_directory(&mut self, wd: i32, flags: ReadFlags, batch: &mut Batch) {
        if wd != self.root_wd {
            return;
        }
        let kind = if flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::UNMOUNT) {
            EventType::EVENT_TYPE_REMOVE
        } else if flags.contains(ReadFlags::MOVE_SELF) {
            EventType::EVENT_TYPE_RENAME
        } else if flags.contains(ReadFlags::ATTRIB) {
            EventType::EVENT_TYPE_CHMOD
        } else {
            return;
        };
        self.report(Path::new(""), kind, batch);
    }

    fn report(&mut self, relative: &Path, kind: EventType, batch: &mut Batch) {
        let name = if relative.as_os_str().is_empty() {
            ".".to_owned()
        } else {
            relative.to_string_lossy().into_owned()
        };
        let still_there = matches!(
            kind,
            EventType::EVENT_TYPE_CREATE
                | EventType::EVENT_TYPE_WRITE
                | EventType::EVENT_TYPE_CHMOD
        );
        let entry = if self.options.include_entry && still_there {
            // Gone by now, or not to be looked at: the event is true without it.
            entry::at_path(&self.root.join(relative), &mut self.names).ok()
        } else {
            None
        };
        batch.events.push(Event { name, kind, entry });
    }

    /// A directory has appeared under a watched one: known, if it was moved here from
    /// another, else new to us, `made` or moved.
    fn arrive(
        &mut self,
        queue: &OwnedFd,
        (parent, name): (i32, OsString),
        cookie: u32,
        made: bool,
        batch: &mut Batch,
    ) -> Result<(), FsError> {
        if let Some(wd) = self.leaving.remove(&cookie)
            && let Some(node) = self.nodes.get_mut(&wd)
        {
            node.parent = Some(parent);
            node.name = name;
            return Ok(());
        }
        if let Some(wd) = self.add(queue, parent, &name)? {
            self.descend(queue, wd, Some((batch, made)))?;
        }
        Ok(())
    }

    /// Watches the directory `name` below a watched one. `None` where there is none (any
    /// more), or none that the user may read, or a network mount that was not asked for.
    fn add(&mut self, queue: &OwnedFd, parent: i32, name: &OsStr) -> Result<Option<i32>, FsError> {
        let Some(above) = self.relative(parent) else {
            return Ok(None);
        };
        let path = self.root.join(above).join(name);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(dir) = rustix::fs::open(&path, flags, Mode::empty()) else {
            return Ok(None);
        };
        if !self.options.allow_network_mounts && mounts::network(&dir, &path)?.is_some() {
            return Ok(None);
        }
        let wd = match watch(queue, &dir, &path) {
            Ok(wd) => wd,
            Err(FsError::Denied { .. } | FsError::Missing(_)) => return Ok(None),
            Err(other) => return Err(other),
        };
        let node = Node {
            parent: Some(parent),
            name: name.to_owned(),
        };
        self.nodes.insert(wd, node);
        Ok(Some(wd))
    }

    /// Watches all directories below one, and with a batch reports what is found there:
    /// things that were made before the watch was. Files with contents in a directory that
    /// has just been `made` were written as well.
    fn descend(
        &mut self,
        queue: &OwnedFd,
        top: i32,
        mut batch: Option<(&mut Batch, bool)>,
    ) -> Result<(), FsError> {
        let mut todo = vec![top];
        while let Some(wd) = todo.pop() {
            let Some(relative) = self.relative(wd) else {
                continue;
            };
            let path = self.root.join(&relative);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let Ok(dir) = rustix::fs::open(&path, flags, Mode::empty()) else {
                continue;
            };
            let found = rustix::fs::Dir::new(dir)
                .map_err(|errno| FsError::from_errno("list", &path, errno))?;
            for item in found {
                let item = item.map_err(|errno| FsError::from_errno("list", &path, errno))?;
                let bytes = item.file_name().to_bytes();
                if matches!(bytes, b"." | b"..") || hidden::is_hidden(bytes) {
                    continue;
                }
                let name = OsStr::from_bytes(bytes);
                if let Some((batch, made)) = &mut batch {
                    self.found.insert((wd, name.to_owned()));
                    let below = relative.join(name);
                    self.report(&below, EventType::EVENT_TYPE_CREATE, batch);
                    if *made && has_contents(&path.join(name)) {
                        self.report(&below, EventType::EVENT_TYPE_WRITE, batch);
                    }
                }
                // Some file systems do not say what an entry is; `add` only takes directories.
                let may_be_dir = matches!(item.file_type(), Kind::Directory | Kind::Unknown);
                if may_be_dir && let Some(below) = self.add(queue, wd, name)? {
                    todo.push(below);
                }
            }
        }
        Ok(())
    }

    /// Path of a watched directory below the root.
    fn relative(&self, wd: i32) -> Option<PathBuf> {
        let mut names = Vec::new();
        let mut node = self.nodes.get(&wd)?;
        while let Some(parent) = node.parent {
            names.push(node.name.as_os_str());
            node = self.nodes.get(&parent)?;
        }
        Some(names.into_iter().rev().collect())
    }

    fn child(&self, parent: i32, name: &OsStr) -> Option<i32> {
        self.nodes
            .iter()
            .find(|(_, node)| node.parent == Some(parent) && node.name == name)
            .map(|(wd, _)| *wd)
    }

    /// Stops watching a directory that left the tree, and those below it.
    fn forget_below(&mut self, queue: &OwnedFd, top: i32) {
        let mut todo = vec![top];
        while let Some(wd) = todo.pop() {
            todo.extend(
                self.nodes
                    .iter()
                    .filter(|(_, node)| node.parent == Some(wd))
                    .map(|(wd, _)| *wd),
            );
            self.nodes.remove(&wd);
            // It may have been deleted meanwhile, which ends the watch as well.
            match inotify::remove_watch(queue, wd) {
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => tracing::warn!(%error, wd, "cannot end a watch"),
            }
        }
    }
}

fn has_contents(path: &Path) -> bool {
    rustix::fs::lstat(path).is_ok_and(|stat| {
        Kind::from_raw_mode(stat.st_mode) == Kind::RegularFile && stat.st_size > 0
    })
}

/// Whether the kernel may call an open file so that has no name (`O_TMPFILE`): by its inode
/// number. Changes of its mode are told all the same, in spite of `EXCL_UNLINK`.
fn is_nameless(name: &[u8]) -> bool {
    name.strip_prefix(b"#")
        .is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit))
}

fn meaning(appears: Appears) -> &'static [EventType] {
    match appears {
        Appears::New => &[
            EventType::EVENT_TYPE_CREATE,
            EventType::EVENT_TYPE_CHMOD,
            EventType::EVENT_TYPE_WRITE,
        ],
        Appears::NewEmpty => &[EventType::EVENT_TYPE_CREATE, EventType::EVENT_TYPE_CHMOD],
        Appears::Replaced => &[EventType::EVENT_TYPE_CHMOD, EventType::EVENT_TYPE_WRITE],
    }
}

/// Adds an open directory to a queue. The kernel demands that the user may read it.
fn watch(queue: &OwnedFd, dir: &OwnedFd, path: &Path) -> Result<i32, FsError> {
    let by_descriptor = format!("/proc/self/fd/{}", dir.as_raw_fd());
    inotify::add_watch(queue, by_descriptor, MASK).map_err(|errno| match errno {
        Errno::NOSPC => FsError::Exhausted(format!(
            "cannot watch '{}': the limit fs.inotify.max_user_watches is reached; watch fewer directories or raise it",
            path.display()
        )),
        other => FsError::from_errno("watch", path, other),
    })
}

/// One read of the queue; empty when there is nothing in it.
fn take(queue: &OwnedFd) -> rustix::io::Result<Vec<Raw>> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER];
    let mut reader = inotify::Reader::new(queue, &mut buffer);
    let mut out = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => out.push(Raw {
                wd: event.wd(),
                flags: event.events(),
                cookie: event.cookie(),
                name: event
                    .file_name()
                    .map(|name| OsStr::from_bytes(name.to_bytes()).to_owned()),
            }),
            Err(Errno::AGAIN) => return Ok(out),
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        }
        if reader.is_buffer_empty() {
            return Ok(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> OwnedFd {
        inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap()
    }

    fn names(batch: &Batch) -> Vec<(String, EventType)> {
        batch
            .events
            .iter()
            .map(|e| (e.name.clone(), e.kind))
            .collect()
    }

    #[test]
    fn a_tree_follows_directories_that_are_made_moved_and_removed() {
        use EventType as E;
        let (create, write) = (E::EVENT_TYPE_CREATE, E::EVENT_TYPE_WRITE);
        let dir = tempfile::tempdir().unwrap();
        let queue = queue();
        let options = Options {
            recursive: true,
            ..Options::default()
        };
        std::fs::create_dir(dir.path().join("old")).unwrap();
        let mut tree = Tree::plant(&queue, dir.path().to_owned(), options).unwrap();
        // Made faster than anybody could watch: found when looked at.
        std::fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        std::fs::write(dir.path().join("a/b/c/f"), "x").unwrap();
        let batch = tree.read(&queue).unwrap();
        let mut expected: Vec<_> = ["a", "a/b", "a/b/c", "a/b/c/f"]
            .map(|n| (n.to_owned(), create))
            .into();
        expected.push(("a/b/c/f".to_owned(), write));
        assert_eq!(names(&batch), expected);
        // Watched by now.
        std::fs::write(dir.path().join("a/b/c/g"), "x").unwrap();
        let batch = tree.read(&queue).unwrap();
        assert_eq!(
            names(&batch),
            [
                ("a/b/c/g".to_owned(), create),
                ("a/b/c/g".to_owned(), write)
            ]
        );
        // Moved inside: events carry the new path.
        std::fs::rename(dir.path().join("a"), dir.path().join("old/z")).unwrap();
        let batch = tree.read(&queue).unwrap();
        assert_eq!(
            names(&batch),
            [
                ("a".to_owned(), E::EVENT_TYPE_RENAME),
                ("old/z".to_owned(), create)
            ]
        );
        std::fs::write(dir.path().join("old/z/b/c/g"), "yy").unwrap();
        let batch = tree.read(&queue).unwrap();
        assert!(
            names(&batch)
                .iter()
                .all(|e| *e == ("old/z/b/c/g".to_owned(), write))
        );
        assert!(!batch.events.is_empty());
        // Moved out: no more events.
        let outside = tempfile::tempdir_in(dir.path().parent().unwrap()).unwrap();
        std::fs::rename(dir.path().join("old/z"), outside.path().join("z")).unwrap();
        assert_eq!(
            names(&tree.read(&queue).unwrap()),
            [("old/z".to_owned(), E::EVENT_TYPE_RENAME)]
        );
        std::fs::write(outside.path().join("z/b/c/g"), "zzz").unwrap();
        assert_eq!(names(&tree.read(&queue).unwrap()), []);
        assert_eq!(tree.nodes.len(), 2);
        // The root itself.
        std::fs::remove_dir_all(dir.path()).unwrap();
        let batch = tree.read(&queue).unwrap();
        assert!(batch.over);
        assert_eq!(
            names(&batch).last().unwrap(),
            &(".".to_owned(), E::EVENT_TYPE_REMOVE)
        );
    }

    #[test]
    fn a_name_like_that_of_a_nameless_file_is_reported_when_it_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let queue = queue();
        let mut tree = Tree::plant(&queue, dir.path().to_owned(), Options::default()).unwrap();
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let nameless = rustix::fs::open(dir.path(), flags, Mode::from_raw_mode(0o600)).unwrap();
        rustix::fs::fchmod(&nameless, Mode::from_raw_mode(0o644)).unwrap();
        assert_eq!(names(&tree.read(&queue).unwrap()), []);
        std::fs::File::create(dir.path().join("#123")).unwrap();
        let seen = names(&tree.read(&queue).unwrap());
        assert_eq!(seen, [("#123".to_owned(), EventType::EVENT_TYPE_CREATE)]);
    }

    #[test]
    fn hidden_names_are_not_reported() {
        let dir = tempfile::tempdir().unwrap();
        let queue = queue();
        let mut tree = Tree::plant(&queue, dir.path().to_owned(), Options::default()).unwrap();
        let hidden = dir.path().join(hidden::upload_name(Appears::New));
        std::fs::write(&hidden, "x").unwrap();
        assert_eq!(names(&tree.read(&queue).unwrap()), []);
        std::fs::rename(&hidden, dir.path().join("f")).unwrap();
        let kinds: Vec<_> = names(&tree.read(&queue).unwrap());
        assert_eq!(
            kinds,
            meaning(Appears::New)
                .iter()
                .map(|k| ("f".to_owned(), *k))
                .collect::<Vec<_>>()
        );
    }
}
