//! The accept loop: HTTP/1.1 and HTTP/2 (prior knowledge) on one port.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt;

use super::connections::{Connections, Guard, Order};

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16_384;
/// Idle connections live longer than those of any proxy in front of us, so that never we
/// are the one to close a connection that is just being used.
const IDLE: Duration = Duration::from_secs(640);
/// Pause after an accept error that time may cure (out of descriptors or memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long before a freeze a connection that has carried no request yet is left open for
/// its first: whoever opened it is about to send one.
const FIRST_REQUEST: Duration = Duration::from_secs(5);
/// Streams on one HTTP/2 connection.
const MAX_STREAMS: u32 = 1024;

/// Serves `router` until the task is dropped. `identity` tells what machine this is now.
pub async fn serve(
    listener: TcpListener,
    router: axum::Router,
    connections: Arc<Connections>,
    identity: impl Fn() -> Option<String> + Clone + Send + 'static,
) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                let gone = matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
                );
                if !gone {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        // Output comes in pieces that must not wait for each other.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let guard = connections.accepted(&identity);
        let router = router.clone();
        tokio::spawn(async move {
            connection(stream, router, guard).await;
            drop(slot);
        });
    }
}

async fn connection(stream: TcpStream, router: axum::Router, mut guard: Guard) {
    let reset = Arc::new(AtomicBool::new(false));
    let io = TokioIo::new(Socket {
        stream,
        reset: Arc::clone(&reset),
    });
    let id = guard.id;
    let (begin, mut begun) = watch::channel(false);
    let brief = Arc::clone(&guard.brief);
    let service = router
        .map_request(move |mut request: http::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(id);
            begin.send_replace(true);
            request.map(axum::body::Body::new)
        })
        .map_response(move |mut response| {
            if brief.load(Ordering::Relaxed) {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            response
        });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS);
    let serving = builder.serve_connection_with_upgrades(io, TowerToHyperService::new(service));
    tokio::pin!(serving);
    let mut finishing = false;
    loop {
        tokio::select! {
            ended = serving.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error, "connection ended early");
                }
                return;
            }
            changed = guard.orders.changed() => match (changed, *guard.orders.borrow()) {
                (Err(_), _) | (_, Order::Serve) => {}
                // One that has carried a request is idle or busy, and it is known which. One that
                // has not would be closed under the hands of whoever is sending the first.
                (_, Order::Finish) if *begun.borrow() => serving.as_mut().graceful_shutdown(),
                (_, Order::Finish) => finishing = true,
                (_, Order::Close) => {
                    // The other end is gone, or is not the one it was: nothing that is
                    // still in our buffers may reach anybody.
                    reset.store(true, Ordering::Relaxed);
                    return;
                }
            },
            () = first_request(&mut begun), if finishing => {
                finishing = false;
                serving.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Waits for a connection's first request, but not for ever.
async fn first_request(begun: &mut watch::Receiver<bool>) {
    // Either way it is time to finish.
    drop(tokio::time::timeout(FIRST_REQUEST, begun.wait_for(|begun| *begun)).await);
}

/// A socket that can be told to close without lingering.
struct Socket {
    stream: TcpStream,
    reset: Arc<AtomicBool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Relaxed)
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(%error, "an old connection lingers");
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    /// Nothing: it is closed right afterwards, which says the same to the other end. So that end
    /// knows by it that nothing is left here, and may stop this machine.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
