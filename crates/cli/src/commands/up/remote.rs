//! A host agent that is another process: the way to ask it, and to its sandboxes' ports.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{ClientConfig, Http2Connection};
use http_body_util::Empty;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST, HeaderValue, UPGRADE};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use wrenn_control::HostClient;
use wrenn_host::remote::{DIAL_PROTOCOL, dial_path};
use wrenn_proxy::{Dial, DialError, GuestStream};
use wrenn_types::SandboxId;

use crate::error::Failure;
use crate::host_address::HostAddress;

/// Requests that wait for their turn to be sent.
const BACKLOG: usize = 1024;
/// What may be under way in one direction of one stream before it is acknowledged.
const WINDOW: u32 = 1 << 20;
/// A machine that is paused may have to be resumed first.
const DIAL_WITHIN: Duration = Duration::from_secs(120);
/// An agent that is there answers at once.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Where the agent is, and what it asks for. Cheap to clone.
#[derive(Clone)]
pub(super) struct RemoteHost {
    address: HostAddress,
    authorization: Option<HeaderValue>,
    client: Arc<HostClient>,
}

impl RemoteHost {
    /// Takes note of it; whether it is there shows later.
    pub(super) fn new(address: HostAddress, token_file: &Path) -> Result<RemoteHost, Failure> {
        let authorization = match &address {
            HostAddress::Socket(_) => None,
            HostAddress::Network(_) => Some(read_token(token_file)?),
        };
        let mut config = ClientConfig::new(base(&address)?);
        if let Some(value) = &authorization {
            config = config.with_default_header(AUTHORIZATION, value.clone());
        }
        let builder = Http2Connection::builder()
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(16 * WINDOW)
            .establishment_timeout(CONNECT_WITHIN);
        // Made with the first request, and anew whenever it broke.
        let connection = match &address {
            HostAddress::Socket(path) => builder.lazy_unix(path, base(&address)?),
            HostAddress::Network(_) => builder.lazy_plaintext(base(&address)?),
        };
        Ok(RemoteHost {
            client: Arc::new(wrenn_control::host::over(
                connection.shared(BACKLOG),
                config,
            )),
            address,
            authorization,
        })
    }

    /// Where it is.
    pub(super) fn address(&self) -> &HostAddress {
        &self.address
    }

    /// The way to ask it.
    pub(super) fn client(&self) -> HostClient {
        HostClient::clone(&self.client)
    }

    async fn tunnel(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, Refused> {
        let io = async {
            let io: Box<dyn Io> = match &self.address {
                HostAddress::Socket(path) => Box::new(UnixStream::connect(path).await?),
                HostAddress::Network(address) => Box::new(TcpStream::connect(address).await?),
            };
            Ok::<_, io::Error>(io)
        };
        let io = tokio::time::timeout(CONNECT_WITHIN, io)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Empty<Bytes>>(TokioIo::new(io)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%sandbox, port, %error, "a connection to the host agent ended");
            }
        });
        let mut request = Request::get(dial_path(sandbox, port))
            .header(HOST, "localhost")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, DIAL_PROTOCOL);
        if let Some(value) = &self.authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        let request = request.body(Empty::new()).map_err(io::Error::other)?;
        let answer = sender.send_request(request).await?;
        match answer.status() {
            StatusCode::SWITCHING_PROTOCOLS => {
                let upgraded = hyper::upgrade::on(answer).await?;
                Ok(Box::new(TokioIo::new(upgraded)))
            }
            status => Err(Refused::Status(status)),
        }
    }
}

/// What a connection to the agent is made of.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Why there is no tunnel.
enum Refused {
    /// The agent says so.
    Status(StatusCode),
    /// It does not answer.
    Io(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Refused::Io(error)
    }
}

impl From<hyper::Error> for Refused {
    fn from(error: hyper::Error) -> Self {
        Refused::Io(io::Error::other(error))
    }
}

#[async_trait::async_trait]
impl Dial for RemoteHost {
    async fn dial(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, DialError> {
        let failed = |source| DialError::Io {
            sandbox,
            port,
            source,
        };
        let tunnel = tokio::time::timeout(DIAL_WITHIN, self.tunnel(sandbox, port));
        match tunnel.await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(Refused::Status(StatusCode::NOT_FOUND))) => Err(DialError::NotFound(sandbox)),
            Ok(Err(Refused::Status(StatusCode::CONFLICT))) => Err(DialError::NotRunning {
                sandbox,
                state: "not running".to_owned(),
            }),
            Ok(Err(Refused::Status(StatusCode::BAD_GATEWAY))) => {
                Err(DialError::PortClosed { sandbox, port })
            }
            Ok(Err(Refused::Status(status))) => Err(failed(io::Error::other(format!(
                "the host agent answered with {status}"
            )))),
            Ok(Err(Refused::Io(error))) => Err(failed(error)),
            Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// Requests need an absolute URI; that of a socket is nobody's.
fn base(address: &HostAddress) -> Result<Uri, Failure> {
    let text = match address {
        HostAddress::Socket(_) => "http://localhost".to_owned(),
        HostAddress::Network(address) => format!("http://{address}"),
    };
    text.parse()
        .map_err(|error| Failure::message(format!("{text} is no address: {error}")))
}

fn read_token(path: &Path) -> Result<HeaderValue, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::message(format!(
            "cannot read the host agent's token in {}: {error}",
            path.display()
        ))
        .code("host_token")
        .hint("`wrenn host-agent --listen ADDRESS:PORT` makes one, host-token in its data folder; name the file with --host-token-file")
    })?;
    let mut value = HeaderValue::from_str(&format!("Bearer {}", text.trim())).map_err(|_| {
        Failure::message(format!("{} does not hold a token", path.display())).code("host_token")
    })?;
    value.set_sensitive(true);
    Ok(value)
}
