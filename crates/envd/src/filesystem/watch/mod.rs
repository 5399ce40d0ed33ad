//! Watching directories.
//!
//! ```text
//!   inotify ──▶ Tree ──▶ Event ──▶ WatchDir          a stream, fed by a task (stream)
//!   (kernel)   (names,             CreateWatcher …   kept until asked for (polled)
//!              new directories)
//! ```
//!
//! Events follow Go's fsnotify, which E2B's clients know: IN_CREATE and IN_MOVED_TO are
//! CREATE, IN_MODIFY is WRITE, IN_ATTRIB is CHMOD, IN_DELETE is REMOVE, IN_MOVED_FROM is
//! RENAME; see inotify(7). An upload, which appears by one rename, is reported as what it
//! means: CREATE, CHMOD, WRITE.
//!
//! Nothing polls: the kernel's queue wakes a task, which reads it on a blocking thread with
//! the rights of the user who asked. Each watch has a kernel queue of its own; one that is
//! not read (a stuck client) overflows there, and its client is told that events were lost.

mod mounts;
mod polled;
mod stream;
mod tree;

use std::path::PathBuf;
use std::sync::Arc;

use buffa::{EnumValue, MessageField};
use rustix::fd::OwnedFd;
use rustix::fs::inotify;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use wrenn_wire::filesystem::{EventType, FilesystemEvent};

pub use self::polled::Watchers;
pub use self::stream::{Keepalive, stream};
use self::tree::Tree;
use super::entry::Entry;
use super::error::FsError;
use super::identity;
use crate::users::User;

/// What a client asks for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Directories below too, those made later included.
    pub recursive: bool,
    /// With the file's entry in CREATE, WRITE and CHMOD.
    pub include_entry: bool,
    /// Also on file systems that tell only of changes made from this machine.
    pub allow_network_mounts: bool,
}

/// One change.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Relative to the watched directory, which is `.` itself.
    pub name: String,
    /// What happened.
    pub kind: EventType,
    /// The file as it is now, where it was asked for and is still there.
    pub entry: Option<Entry>,
}

impl From<Event> for FilesystemEvent {
    fn from(event: Event) -> Self {
        FilesystemEvent {
            name: event.name,
            r#type: EnumValue::from(event.kind),
            entry: MessageField::from(event.entry.map(Into::into)),
            ..FilesystemEvent::default()
        }
    }
}

/// What one reading of the queue brought.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order in which they happened.
    pub events: Vec<Event>,
    /// There is more to read now.
    pub more: bool,
    /// The watched directory is gone; there will be no further event.
    pub over: bool,
}

/// A watched directory.
pub struct Watch {
    queue: Arc<AsyncFd<OwnedFd>>,
    /// Away while a blocking thread reads the queue.
    tree: Option<Tree>,
    user: Arc<User>,
}

impl Watch {
    /// Begins to watch `path`.
    ///
    /// # Errors
    /// [`FsError::Missing`], [`FsError::NotDirectory`], [`FsError::Invalid`] for a network mount
    /// that is not allowed, [`FsError::Exhausted`] at the kernel's limits.
    pub async fn open(user: Arc<User>, path: PathBuf, options: Options) -> Result<Watch, FsError> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let queue = inotify::init(flags).map_err(|errno| match errno {
            Errno::MFILE => FsError::Exhausted(
                "no more watches are possible: the limit fs.inotify.max_user_instances is reached; remove watchers or raise it".into(),
            ),
            other => FsError::from_errno("watch", &path, other),
        })?;
        let queue =
            crate::sys::async_fd(queue).map_err(|(_, e)| FsError::from_io("watch", &path, &e))?;
        let queue = Arc::new(queue);
        let of_tree = Arc::clone(&queue);
        let tree =
            identity::run(&user, move || Tree::plant(of_tree.get_ref(), path, options)).await?;
        Ok(Watch {
            queue,
            tree: Some(tree),
            user,
        })
    }

    /// The kernel's queue, to wait on.
    pub fn queue(&self) -> Arc<AsyncFd<OwnedFd>> {
        Arc::clone(&self.queue)
    }

    /// Reads what has happened until now, without waiting.
    ///
    /// # Errors
    /// [`FsError::EventsLost`], [`FsError::Exhausted`] when a new directory could not be
    /// watched. The watch is still usable, but has missed something.
    pub async fn read(&mut self) -> Result<Batch, FsError> {
        let Some(mut tree) = self.tree.take() else {
            // A reading was given up half-way, with its tree.
            return Err(FsError::EventsLost);
        };
        let queue = Arc::clone(&self.queue);
        let (tree, batch) = identity::run(&self.user, move || {
            let batch = tree.read(queue.get_ref());
            Ok((tree, batch))
        })
        .await?;
        self.tree = Some(tree);
        batch
    }
}

/// Waits until the queue of a watch has something, then counts as not having been told so
/// that the next wait is for newer events.
async fn wait(queue: &AsyncFd<OwnedFd>) -> Result<(), FsError> {
    match queue.readable().await {
        Ok(mut guard) => {
            guard.clear_ready();
            Ok(())
        }
        Err(error) => Err(FsError::Internal(format!(
            "cannot wait for file events: {error}"
        ))),
    }
}
