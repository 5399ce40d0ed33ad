//! The proxy's way into sandboxes when the host agent lives in the same process.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use wrenn_host::{DialFailure, InProcessHost, InUse};
use wrenn_proxy::{Dial, DialError, GuestStream};
use wrenn_types::SandboxId;

/// Dials through the agent of this process.
pub(super) struct AgentDialer(pub(super) InProcessHost);

#[async_trait::async_trait]
impl Dial for AgentDialer {
    async fn dial(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, DialError> {
        match self.0.dial(sandbox, port).await {
            Ok((stream, in_use)) => Ok(Box::new(Used {
                stream,
                _in_use: in_use,
            })),
            Err(DialFailure::NotFound) => Err(DialError::NotFound(sandbox)),
            Err(DialFailure::NotRunning) => Err(DialError::NotRunning {
                sandbox,
                state: "not running".to_owned(),
            }),
            Err(DialFailure::PortClosed(error))
                if error.kind() == io::ErrorKind::ConnectionRefused =>
            {
                Err(DialError::PortClosed { sandbox, port })
            }
            Err(DialFailure::PortClosed(source)) => Err(DialError::Io {
                sandbox,
                port,
                source,
            }),
        }
    }
}

/// A connection that counts as use of its sandbox while it is open.
struct Used {
    stream: TcpStream,
    _in_use: InUse,
}

impl AsyncRead for Used {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Used {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
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

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
