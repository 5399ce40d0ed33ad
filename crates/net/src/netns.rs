//! Network namespaces: named ones that `ip netns` shows, and the thread that enters them.
//!
//! A thread's namespace decides where its sockets and taps live, so entering one is a change
//! of global meaning for everything else that runs on that thread. It therefore only happens
//! on threads of this module: never on a worker of the async runtime.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::oneshot;

/// Where `ip netns` looks for named namespaces, see ip-netns(8).
const NAMED: &str = "/run/netns";

/// A network namespace with a name. The descriptor keeps it alive, the name makes it findable.
#[derive(Debug)]
pub(crate) struct Namespace {
    path: PathBuf,
    fd: OwnedFd,
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The path of a namespace's name.
pub(crate) fn path_of(name: &str) -> PathBuf {
    Path::new(NAMED).join(name)
}

/// The namespace of the calling thread. `/proc/self` would be that of the main thread.
pub(crate) fn of_this_thread() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Names of all named namespaces.
pub(crate) fn names() -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(NAMED) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

/// Makes the folder of names what `ip netns add` makes of it: a mount of its own. Done by that
/// program later, it would hide the mounts that were made here before, and nobody could take
/// them away again.
fn prepare_folder() -> io::Result<()> {
    std::fs::create_dir_all(NAMED)?;
    // Of two that find no mount, the second would hide the first's.
    let folder = File::open(NAMED)?;
    rustix::fs::flock(&folder, FlockOperation::LockExclusive)?;
    match rustix::mount::mount_change(NAMED, MountPropagationFlags::SHARED) {
        // INVAL: no mount point.
        Err(Errno::INVAL) => {
            rustix::mount::mount_bind_recursive(NAMED, NAMED)?;
            rustix::mount::mount_change(NAMED, MountPropagationFlags::SHARED)?;
        }
        done => done?,
    }
    Ok(())
}

impl Namespace {
    /// Moves the calling thread into a new namespace and gives that a name.
    pub(crate) fn create_and_enter(name: &str) -> io::Result<Self> {
        prepare_folder()?;
        let path = path_of(name);
        // The file is only the place to mount on.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o000)
            .open(&path)?;
        let made = crate::sys::new_net_namespace().and_then(|()| {
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &path)?;
            of_this_thread()
        });
        match made {
            Ok(fd) => Ok(Self { path, fd }),
            Err(error) => {
                remove(name)?;
                Err(error)
            }
        }
    }

    /// Opens a namespace by its name. A name without a namespace behind it (a crash came
    /// between the two) is an error of kind `NotFound`.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let path = path_of(name);
        let fd: OwnedFd = File::open(&path)?.into();
        // Any file can be opened, but only a namespace is on nsfs.
        const NSFS_MAGIC: i64 = 0x6e73_6673;
        if rustix::fs::fstatfs(&fd)?.f_type != NSFS_MAGIC {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        Ok(Self { path, fd })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Removes the name of a namespace. The namespace itself ends with its last user.
pub(crate) fn remove(name: &str) -> io::Result<()> {
    let path = path_of(name);
    match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
        // INVAL: not mounted; NOENT: not even there.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    // Also detaches copies of the mount in other mount namespaces.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

type Work = Box<dyn FnOnce() + Send>;

struct Visit {
    namespace: Arc<Namespace>,
    /// Called inside, or with the reason why that was impossible.
    work: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// A handle to the thread that visits namespaces. Visits must be short and must not block:
/// making a socket, opening a tap.
#[derive(Debug, Clone)]
pub(crate) struct Visitor {
    visits: mpsc::Sender<Visit>,
}

impl Visitor {
    /// Starts the thread; it ends with the last handle.
    pub(crate) fn start() -> io::Result<Self> {
        let (visits, inbox) = mpsc::channel::<Visit>();
        let home = of_this_thread()?;
        std::thread::Builder::new()
            .name("wrenn-netns".to_owned())
            .spawn(move || {
                for visit in inbox {
                    let inside = move_into_link_name_space(
                        visit.namespace.as_fd(),
                        Some(LinkNameSpaceType::Network),
                    );
                    (visit.work)(inside.map_err(io::Error::from));
                    // A thread inside keeps a namespace alive that is to be removed. If the way
                    // home fails the next visit still enters its own namespace first.
                    if let Err(errno) =
                        move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))
                    {
                        tracing::error!(%errno, "the namespace thread could not go home");
                    }
                }
            })?;
        Ok(Self { visits })
    }

    /// Runs `work` inside `namespace`.
    pub(crate) async fn visit<T: Send + 'static>(
        &self,
        namespace: &Arc<Namespace>,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (reply, answer) = oneshot::channel();
        let visit = Visit {
            namespace: Arc::clone(namespace),
            work: Box::new(move |inside| {
                // Nobody listens if the caller gave up; the result is closed by dropping it.
                drop(reply.send(inside.and_then(|()| work())));
            }),
        };
        let gone = || io::Error::other("the thread that enters network namespaces has ended");
        self.visits.send(visit).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Runs `work` on a thread of its own, which may change its namespace and then ends.
pub(crate) async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (reply, answer) = oneshot::channel();
    let work: Work = Box::new(move || drop(reply.send(work())));
    std::thread::Builder::new()
        .name("wrenn-slot".to_owned())
        .spawn(work)?;
    answer
        .await
        .map_err(|_| io::Error::other("a thread that works on a slot panicked"))
}
