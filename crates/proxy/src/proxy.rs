//! One request on its way to a guest and back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ConnectInfo;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::client::conn::http1::SendRequest;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use wrenn_types::SandboxId;

use crate::body::Passing;
use crate::headers::{ENVD_PORT, clean_request, is_host_route, remove_hop_by_hop, wants_upgrade};
use crate::pool::Pool;
use crate::target::{self, Target, TargetError};
use crate::{Dial, DialError, answer};

/// Connects to a closed port are tried so often: a program that was just started may listen a moment
/// later.
const ATTEMPTS: u32 = 5;
/// Between two of them.
const BETWEEN: Duration = Duration::from_millis(100);
/// One connect to a guest on the same machine takes microseconds; one that takes this long is lost.
const DIAL_WITHIN: Duration = Duration::from_secs(5);
/// How often idle connections are looked through.
const PRUNE_EVERY: Duration = Duration::from_secs(15);
/// Bytes moved at a time in a tunnel.
const TUNNEL_BUFFER: usize = 64 * 1024;

/// Told of each use of a sandbox through the proxy: at each request, and at each piece of a body
/// or tunnel. Called often, so it must return at once.
pub trait Activity: Send + Sync + 'static {
    /// This sandbox was used just now.
    fn used(&self, sandbox: SandboxId);
}

/// Carries requests to ports inside sandboxes. Cheap to clone.
#[derive(Clone)]
pub struct Proxy {
    inner: Arc<Inner>,
}

struct Inner {
    domain: String,
    dialer: Arc<dyn Dial>,
    activity: Arc<dyn Activity>,
    pool: Pool,
}

impl Proxy {
    /// A proxy for sandboxes under this domain. Must be called in a tokio runtime.
    pub fn new(domain: String, dialer: Arc<dyn Dial>, activity: Arc<dyn Activity>) -> Proxy {
        let inner = Arc::new(Inner {
            domain,
            dialer,
            activity,
            pool: Pool::default(),
        });
        let weak = Arc::downgrade(&inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PRUNE_EVERY).await;
                let Some(inner) = weak.upgrade() else { return };
                inner.pool.prune();
            }
        });
        Proxy { inner }
    }

    /// Whom a request is for: a sandbox, or (`None`) the API itself.
    pub fn target(&self, parts: &Parts) -> Option<Result<Target, TargetError>> {
        target::of(parts, &self.inner.domain)
    }

    /// Ends all connections of a sandbox: it is gone, or will not go on.
    pub fn forget(&self, sandbox: SandboxId) {
        self.inner.pool.forget(sandbox);
    }

    /// Closes the idle connections of a sandbox: it is about to be frozen.
    pub fn drop_idle(&self, sandbox: SandboxId) {
        self.inner.pool.drop_idle(sandbox);
    }

    /// How many connections and tunnels into a sandbox are open.
    pub fn connections(&self, sandbox: SandboxId) -> usize {
        self.inner.pool.count(sandbox)
    }

    /// Carries a request to its target and the answer back, as both come.
    pub async fn handle(
        &self,
        target: Result<Target, TargetError>,
        request: Request<Body>,
    ) -> Response<Body> {
        let target = match target {
            Ok(target) => target,
            Err(e) => return answer::malformed(&e, request.headers()),
        };
        if target.port == ENVD_PORT && is_host_route(request.uri().path()) {
            return answer::host_route(target.sandbox, request.headers());
        }
        self.inner.activity.used(target.sandbox);
        // What the refusals need once the request is on its way.
        let accept = request.headers().clone();
        match self.carry(target, request).await {
            Ok(response) => response,
            Err(Failed::Dial(e)) => {
                tracing::debug!(sandbox = %target.sandbox, port = target.port, error = %e, "not reached");
                answer::unreachable(&e, &accept)
            }
            Err(Failed::Exchange(e)) => {
                tracing::debug!(sandbox = %target.sandbox, port = target.port, error = %e, "broke off");
                answer::broke_off(target.sandbox, target.port, &accept)
            }
        }
    }

    async fn carry(
        &self,
        target: Target,
        request: Request<Body>,
    ) -> Result<Response<Body>, Failed> {
        let (mut parts, body) = request.into_parts();
        let upgrade = wants_upgrade(&parts.headers);
        let client = upgrade
            .is_some()
            .then(|| parts.extensions.remove::<OnUpgrade>())
            .flatten();
        prepare(&mut parts, upgrade.as_ref().filter(|_| client.is_some()));
        let replayable = body.is_end_stream() && matches!(parts.method, Method::GET | Method::HEAD);
        let spare = replayable.then(|| parts.clone());
        let body = Body::new(self.passing(target.sandbox, body));
        let request = Request::from_parts(parts, body);
        let (mut response, sender) = self.exchange(target, request, spare).await?;

        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let guest = response.extensions_mut().remove::<OnUpgrade>();
            if let (Some(client), Some(guest)) = (client, guest) {
                self.tunnel(target.sandbox, client, guest);
            }
            let protocol = response.headers().get(UPGRADE).cloned();
            remove_hop_by_hop(response.headers_mut());
            if let Some(protocol) = protocol {
                response.headers_mut().insert(UPGRADE, protocol);
                response
                    .headers_mut()
                    .insert(CONNECTION, HeaderValue::from_static("upgrade"));
            }
            return Ok(response);
        }
        self.inner.pool.give_back(target, sender);
        remove_hop_by_hop(response.headers_mut());
        *response.version_mut() = Version::default();
        Ok(response.map(|body| Body::new(self.passing(target.sandbox, body))))
    }

    /// Sends a request on an idle connection if there is one, else on a new one. One that turns out to be
    /// closed is replaced as long as the request is still whole.
    async fn exchange(
        &self,
        target: Target,
        mut request: Request<Body>,
        mut spare: Option<Parts>,
    ) -> Result<(Response<Body>, SendRequest<Body>), Failed> {
        while let Some(mut sender) = self.inner.pool.take(target) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response.map(Body::new), sender)),
                Err(mut e) => match (e.take_message(), spare.take()) {
                    (Some(whole), parts) => {
                        request = whole;
                        spare = parts;
                    }
                    (None, Some(parts)) => {
                        // The guest closed it while we wrote. This changes nothing, so once more.
                        request = Request::from_parts(parts, Body::empty());
                        break;
                    }
                    (None, None) => return Err(Failed::Exchange(e.into_error())),
                },
            }
        }
        let stream = self.dial(target).await.map_err(Failed::Dial)?;
        let mut sender = self
            .inner
            .pool
            .open(target, stream)
            .await
            .map_err(Failed::Exchange)?;
        let response = sender
            .send_request(request)
            .await
            .map_err(Failed::Exchange)?;
        Ok((response.map(Body::new), sender))
    }

    async fn dial(&self, target: Target) -> Result<crate::GuestStream, DialError> {
        let Target { sandbox, port } = target;
        let mut attempt = 1;
        loop {
            let dial = self.inner.dialer.dial(sandbox, port);
            let result = match tokio::time::timeout(DIAL_WITHIN, dial).await {
                Ok(result) => result,
                Err(_) => Err(DialError::Io {
                    sandbox,
                    port,
                    source: std::io::ErrorKind::TimedOut.into(),
                }),
            };
            match result {
                Err(DialError::PortClosed { .. }) if attempt < ATTEMPTS => {
                    attempt += 1;
                    tokio::time::sleep(BETWEEN).await;
                }
                result => return result,
            }
        }
    }

    /// Joins both ends of an upgraded connection, such as a WebSocket, until one ends.
    fn tunnel(&self, sandbox: SandboxId, client: OnUpgrade, guest: OnUpgrade) {
        let activity = Arc::clone(&self.inner.activity);
        self.inner.pool.run(sandbox, async move {
            let (client, guest) = match tokio::try_join!(client, guest) {
                Ok(both) => both,
                Err(e) => {
                    tracing::debug!(%sandbox, error = %e, "an upgrade was not completed");
                    return;
                }
            };
            let (from_client, to_client) = tokio::io::split(TokioIo::new(client));
            let (from_guest, to_guest) = tokio::io::split(TokioIo::new(guest));
            // A half that ends closes the other's writing half only; both must end.
            tokio::join!(
                pump(from_client, to_guest, sandbox, &*activity),
                pump(from_guest, to_client, sandbox, &*activity),
            );
        });
    }

    fn passing(&self, sandbox: SandboxId, inner: Body) -> Passing<Body> {
        let activity = Arc::clone(&self.inner.activity);
        Passing {
            inner,
            sandbox,
            activity,
        }
    }
}

/// Why a request was not answered by the guest.
enum Failed {
    Dial(DialError),
    Exchange(hyper::Error),
}

/// Makes an incoming request one for the guest: its headers cleaned, in HTTP/1.1 form.
fn prepare(parts: &mut Parts, upgrade: Option<&HeaderValue>) {
    let authority = parts.uri.authority().map(|a| a.to_string());
    let host = parts.headers.get(HOST).cloned();
    let host = host.or_else(|| HeaderValue::from_str(authority.as_deref()?).ok());
    clean_request(&mut parts.headers);
    let headers = &mut parts.headers;
    if let Some(host) = host {
        headers.insert("x-forwarded-host", host.clone());
        headers.insert(HOST, host);
    }
    if !headers.contains_key("x-forwarded-proto") {
        headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    }
    if let Some(ConnectInfo(peer)) = parts.extensions.get::<ConnectInfo<SocketAddr>>() {
        let ip = peer.ip().to_string();
        let chain = match headers.get("x-forwarded-for").and_then(|v| v.to_str().ok()) {
            Some(before) => format!("{before}, {ip}"),
            None => ip,
        };
        if let Ok(chain) = HeaderValue::from_str(&chain) {
            headers.insert("x-forwarded-for", chain);
        }
    }
    if let Some(protocol) = upgrade {
        headers.insert(UPGRADE, protocol.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    parts.uri = path.parse().unwrap_or_else(|_| Uri::from_static("/"));
    parts.version = Version::HTTP_11;
}

/// Copies one direction of a tunnel; every piece counts as use.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    sandbox: SandboxId,
    activity: &dyn Activity,
) {
    let mut buffer = vec![0; TUNNEL_BUFFER];
    loop {
        match from.read(&mut buffer).await {
            // An end and a broken connection are the same to the other side: it learns that
            // nothing more will come.
            Ok(0) | Err(_) => break,
            Ok(n) => {
                activity.used(sandbox);
                if to.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        }
    }
    // Already closed is as good.
    let _ = to.shutdown().await;
}
