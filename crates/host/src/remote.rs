//! The agent on a socket, for a control plane that is another process.
//!
//! ```text
//! POST /wrenn.host.v1.HostService/…                        Connect RPC, HTTP/2 or 1.1
//! GET  /dial/{sandbox}/{port}   Upgrade: wrenn-dial        101, then the bytes of that port
//!                                                          404 no such sandbox, 409 it does
//!                                                          not run, 502 nothing listens there
//! ```
//!
//! Who may ask is a matter of the socket's folder, or of a token where there is none.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::{ConnectRpcBody, ConnectRpcService};
use http::header::{AUTHORIZATION, CONNECTION, HeaderValue, UPGRADE};
use http::{Request, Response, StatusCode};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tower::ServiceExt;
use wrenn_types::{AccessToken, SandboxId};

use crate::agent::{HostAgent, InProcessHost};
use crate::sandbox::DialFailure;

/// What a connection is upgraded to that becomes one to a sandbox's port.
pub const DIAL_PROTOCOL: &str = "wrenn-dial";
/// Streams at once on one connection: each followed program is one.
const MOST_STREAMS: u32 = 10_000;
/// What may be under way in one direction of one stream before it is acknowledged.
const WINDOW: u32 = 1 << 20;
/// After a connection could not be accepted, for want of descriptors most likely.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Requests that are under way when the agent is told to end get this long.
const LINGER: Duration = Duration::from_secs(3);

/// The path of a request for a connection to this port.
pub fn dial_path(sandbox: SandboxId, port: u16) -> String {
    format!("/dial/{sandbox}/{port}")
}

fn parse_dial_path(path: &str) -> Option<(SandboxId, u16)> {
    let (sandbox, port) = path.strip_prefix("/dial/")?.split_once('/')?;
    Some((sandbox.parse().ok()?, port.parse().ok()?))
}

/// Where an agent listens.
#[derive(Debug)]
pub enum Listener {
    /// Whoever may pass its folder may ask.
    Socket(UnixListener),
    /// Whoever has the token may ask.
    Network(TcpListener, AccessToken),
}

/// One of the two kinds of connection.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Io>> {
        match self {
            Listener::Socket(listener) => Ok(Box::new(listener.accept().await?.0)),
            Listener::Network(listener, _) => Ok(Box::new(listener.accept().await?.0)),
        }
    }

    /// The token that a request must show, if any.
    fn token(&self) -> Option<AccessToken> {
        match self {
            Listener::Socket(_) => None,
            Listener::Network(_, token) => Some(token.clone()),
        }
    }
}

/// What answers requests. Cheap to clone.
#[derive(Clone)]
struct Front {
    rpc: ConnectRpcService,
    dialer: InProcessHost,
    token: Option<AccessToken>,
}

type Reply = Response<Either<ConnectRpcBody, Full<Bytes>>>;

impl HostAgent {
    /// Serves a control plane until `shutdown` completes, and a little longer for what is under
    /// way.
    pub async fn serve(&self, listener: Listener, shutdown: impl Future<Output = ()>) {
        let front = Front {
            rpc: ConnectRpcService::new(self.router()),
            dialer: self.dialer(),
            token: listener.token(),
        };
        let mut server = auto::Builder::new(TokioExecutor::new());
        server
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MOST_STREAMS)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(16 * WINDOW);
        server.http1().timer(TokioTimer::new());
        let graceful = GracefulShutdown::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let io = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(io) => io,
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_AGAIN).await;
                        continue;
                    }
                },
                () = &mut shutdown => break,
            };
            let front = front.clone();
            let service = service_fn(move |request| {
                let front = front.clone();
                async move { Ok::<_, Infallible>(front.answer(request).await) }
            });
            let connection = server.serve_connection_with_upgrades(TokioIo::new(io), service);
            let connection = graceful.watch(connection.into_owned());
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(error = %error, "a control plane's connection ended");
                }
            });
        }
        // Streams that are followed do not end by themselves.
        drop(tokio::time::timeout(LINGER, graceful.shutdown()).await);
    }
}

impl Front {
    async fn answer(&self, request: Request<Incoming>) -> Reply {
        if !self.admits(&request) {
            tracing::warn!("a request without the agent's token was refused");
            return refuse(StatusCode::UNAUTHORIZED, "show the agent's token");
        }
        match parse_dial_path(request.uri().path()) {
            Some((sandbox, port)) => self.dial(sandbox, port, request).await,
            None => {
                let Ok(reply): Result<_, Infallible> = self.rpc.clone().oneshot(request).await;
                reply.map(Either::Left)
            }
        }
    }

    fn admits(&self, request: &Request<Incoming>) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let given = request.headers().get(AUTHORIZATION);
        given
            .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
            .is_some_and(|given| token.matches(given))
    }

    async fn dial(&self, sandbox: SandboxId, port: u16, mut request: Request<Incoming>) -> Reply {
        let asked = request.headers().get(UPGRADE);
        if asked.is_none_or(|value| value != DIAL_PROTOCOL) {
            return refuse(StatusCode::UPGRADE_REQUIRED, "ask for an upgrade");
        }
        let (mut guest, in_use) = match self.dialer.dial(sandbox, port).await {
            Ok(dialled) => dialled,
            Err(failure) => {
                let status = match &failure {
                    DialFailure::NotFound => StatusCode::NOT_FOUND,
                    DialFailure::NotRunning => StatusCode::CONFLICT,
                    DialFailure::PortClosed(error)
                        if error.kind() == io::ErrorKind::ConnectionRefused =>
                    {
                        StatusCode::BAD_GATEWAY
                    }
                    DialFailure::PortClosed(_) => StatusCode::GATEWAY_TIMEOUT,
                };
                return refuse(status, &failure.to_string());
            }
        };
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            // It counts as use until both ends have hung up.
            let _in_use = in_use;
            match upgrade.await {
                Ok(client) => {
                    let mut client = TokioIo::new(client);
                    // Either end may hang up as it likes.
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut guest).await;
                }
                Err(error) => {
                    tracing::debug!(%sandbox, port, %error, "nobody took the connection up");
                }
            }
        });
        let mut reply = Response::new(Either::Right(Full::default()));
        *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = reply.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static(DIAL_PROTOCOL));
        reply
    }
}

fn refuse(status: StatusCode, why: &str) -> Reply {
    let mut reply = Response::new(Either::Right(Full::from(why.to_owned())));
    *reply.status_mut() = status;
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_to_a_port_is_read_as_it_is_written() {
        let sandbox = SandboxId::new();
        let path = dial_path(sandbox, 8080);
        assert_eq!(parse_dial_path(&path), Some((sandbox, 8080)));
        for wrong in ["/dial/", "/dial/x/80", "/wrenn.host.v1.HostService/GetInfo"] {
            assert_eq!(parse_dial_path(wrong), None, "{wrong}");
        }
        assert_eq!(parse_dial_path(&format!("{path}0000")), None);
    }
}
