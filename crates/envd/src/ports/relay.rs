//! One relay: from a port on the guest's address to the same port on loopback.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

const BACKLOG: u32 = 1024;
/// Connections through one relay at a time.
const MAX_CONNECTIONS: usize = 1024;
const BUFFER: usize = 16 * 1024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub(super) struct Relay {
    inode: u64,
    /// No new connections; those there are may go on.
    close: CancellationToken,
    task: JoinHandle<()>,
}

impl Relay {
    /// Listens at `from` and connects to `to`.
    pub(super) fn start(from: SocketAddr, to: SocketAddr) -> io::Result<Relay> {
        let socket = if from.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(from)?;
        let listener = socket.listen(BACKLOG)?;
        let inode = rustix::fs::fstat(listener.as_fd())?.st_ino;
        let close = CancellationToken::new();
        let task = tokio::spawn(accept(listener, to, close.clone()));
        Ok(Relay { inode, close, task })
    }

    /// Of its own listening socket, which must not be taken for a program's.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Its listener is gone: takes no new connections; those there are end with their
    /// programs.
    pub(super) async fn close(self) {
        self.close.cancel();
        // The socket is closed by the task; whoever looks next must not find it.
        tokio::task::yield_now().await;
    }

    /// Ends it with all its connections.
    pub(super) async fn stop(self) {
        self.task.abort();
        match self.task.await {
            Ok(()) => {}
            Err(error) if error.is_cancelled() => {}
            Err(error) => tracing::error!(%error, "a relay broke"),
        }
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, close: CancellationToken) {
    // Dropped with this task, and all connections with it.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = close.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(relay(stream, to));
                }
                Err(error) => {
                    tracing::debug!(%error, "a relay cannot accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn relay(mut outside: TcpStream, to: SocketAddr) {
    let Ok(mut inside) = TcpStream::connect(to).await else {
        return;
    };
    for stream in [&outside, &inside] {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
    }
    // How it ends is between the two ends.
    if let Err(error) =
        tokio::io::copy_bidirectional_with_sizes(&mut outside, &mut inside, BUFFER, BUFFER).await
    {
        tracing::debug!(%error, "a relayed connection ended early");
    }
}
