//! A slot in use, and the way into its guest.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::net::{TcpSocket, TcpStream};

use crate::config::{GUEST_ADDR, NetConfig};
use crate::denials::{self, Denial};
use crate::egress::NetworkPolicy;
use crate::error::{NetError, OPEN_TAP};
use crate::netns::{Namespace, Visitor};
use crate::plumbing::{self, Plumbing};
use crate::policy::TAP;
use crate::relay::RelayFiles;
use crate::sys;

/// How long a tap that nobody is known to use may be busy.
const TAP_FREE_WITHIN: Duration = Duration::from_millis(300);
const TAP_RETRY: Duration = Duration::from_millis(5);

/// A network slot that somebody holds.
///
/// Dropping it leaves the network in place, for a machine outlives its agent: it is ended by
/// [`crate::SlotPool::give_back`] and by nothing else.
#[derive(Debug)]
pub struct Slot {
    pub(crate) plumbing: Arc<Plumbing>,
    /// Cleared when the slot is given back; its dialers look at it.
    pub(crate) held: Arc<AtomicBool>,
    config: Arc<NetConfig>,
    visitor: Visitor,
}

impl Slot {
    pub(crate) fn new(plumbing: Arc<Plumbing>, config: Arc<NetConfig>, visitor: Visitor) -> Self {
        Self {
            plumbing,
            held: Arc::new(AtomicBool::new(true)),
            config,
            visitor,
        }
    }

    /// The number by which a later agent adopts this slot.
    pub fn index(&self) -> u32 {
        self.plumbing.index
    }

    /// The name of the namespace, and of the slot's link on the host.
    pub fn name(&self) -> &str {
        &self.plumbing.name
    }

    /// The address behind which the guest appears to the host.
    pub fn outside_addr(&self) -> Ipv4Addr {
        self.plumbing.outside
    }

    /// The path of the network namespace, as setns(2) takes it.
    pub fn namespace(&self) -> &Path {
        self.plumbing.namespace.path()
    }

    /// Opens the tap as `-netdev tap,fd=` takes it (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR; close on
    /// exec). It works after QEMU dropped its privileges. There is one queue: a second call
    /// fails with EBUSY while the first descriptor is open anywhere. A program that this process
    /// starts has a copy of whatever descriptor was open just then, until it runs: so EBUSY is
    /// believed only when it stays.
    ///
    /// # Errors
    /// [`NetError::Step`] and, on a kernel without tap devices, [`NetError::MissingFeature`].
    pub async fn open_tap(&self) -> Result<OwnedFd, NetError> {
        let began = Instant::now();
        loop {
            let open = || sys::open_tap(TAP);
            let error = match self.visitor.visit(&self.plumbing.namespace, open).await {
                Ok(tap) => return Ok(tap),
                Err(error) => error,
            };
            if error.kind() != io::ErrorKind::ResourceBusy || began.elapsed() > TAP_FREE_WITHIN {
                let name = self.plumbing.name.clone();
                return Err(NetError::step(OPEN_TAP, name, error));
            }
            tokio::time::sleep(TAP_RETRY).await;
        }
    }

    /// Opens what [`crate::relay::serve`] needs: the resolver's sockets, at 169.254.0.22:53 in
    /// the slot's namespace, and the way to learn and to apply the slot's policy and to note
    /// what it refused.
    ///
    /// # Errors
    /// [`NetError::Step`], with EADDRINUSE while a relay still runs on this slot.
    pub async fn relay(&self) -> Result<RelayFiles, NetError> {
        let step = |step, error| NetError::step(step, self.plumbing.name.clone(), error);
        let notice = self
            .plumbing
            .open_notice()
            .map_err(|e| step("open the note of the slot's policy", e))?;
        let refused = self
            .plumbing
            .make_refused()
            .map_err(|e| step("make the file for names that are refused", e))?;
        let (udp, tcp, openings) = self
            .visitor
            .visit(&self.plumbing.namespace, plumbing::bind_dns)
            .await
            .map_err(|e| step("bind the resolver's sockets", e))?;
        Ok(RelayFiles {
            udp,
            tcp,
            openings,
            notice,
            refused,
        })
    }

    /// The way into the guest.
    pub fn guest(&self) -> GuestDialer {
        GuestDialer {
            namespace: Arc::clone(&self.plumbing.namespace),
            held: Arc::clone(&self.held),
            visitor: self.visitor.clone(),
        }
    }

    /// Puts another policy in force, for open connections too: those it closes are cut. In
    /// force when this returns; nothing happens if it is already.
    ///
    /// # Errors
    /// [`NetError::Step`] if the kernel refuses; then nothing has changed. If only the relay
    /// could not be told, addresses that names stand for stay closed.
    pub async fn set_policy(&self, policy: &NetworkPolicy) -> Result<(), NetError> {
        let plumbing = Arc::clone(&self.plumbing);
        let config = Arc::clone(&self.config);
        let policy = policy.clone();
        blocking(move || plumbing.set_policy(&config, &policy)).await?
    }

    /// What was refused to this guest within the last hour, the latest first.
    ///
    /// # Errors
    /// [`NetError::Step`] if the kernel's lists cannot be read.
    pub async fn denials(&self) -> Result<Vec<Denial>, NetError> {
        let plumbing = Arc::clone(&self.plumbing);
        let config = Arc::clone(&self.config);
        let found = blocking(move || plumbing.denials(&config)).await??;
        Ok(denials::sorted(found, MOST_LISTED))
    }
}

/// Denials listed at most: as many as a slot remembers.
const MOST_LISTED: usize = 1024;

/// Runs blocking work that stays in the host's namespace.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NetError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| NetError::step("finish work on a slot", "task", io::Error::other(error)))
}

/// Opens connections to a slot's guest, from sockets inside the slot's namespace.
#[derive(Debug, Clone)]
pub struct GuestDialer {
    namespace: Arc<Namespace>,
    held: Arc<AtomicBool>,
    visitor: Visitor,
}

impl GuestDialer {
    /// Connects to a TCP port of the guest. There is no time limit beside the kernel's own of
    /// about two minutes: a guest that does not run yet answers nothing, and the kernel repeats
    /// its attempt after one second only, so callers that wait for a guest try anew.
    ///
    /// # Errors
    /// Those of connect(2), and `NotConnected` once the slot was given back.
    pub async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        self.check()?;
        let socket = self
            .visitor
            .visit(&self.namespace, || {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                Ok(rustix::net::socket_with(
                    AddressFamily::INET,
                    SocketType::STREAM,
                    flags,
                    None,
                )?)
            })
            .await?;
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let stream = socket.connect(SocketAddr::from((GUEST_ADDR, port))).await?;
        // Given back meanwhile: this may be the next tenant's guest.
        self.check()?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn check(&self) -> io::Result<()> {
        if self.held.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::NotConnected,
            "the sandbox has ended and its network slot was given back",
        ))
    }
}
