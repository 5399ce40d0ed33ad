//! How the proxy reaches a port inside a sandbox.

use tokio::io::{AsyncRead, AsyncWrite};
use wrenn_types::SandboxId;

/// Both directions of a connection to a port in a sandbox.
pub trait GuestIo: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> GuestIo for T {}

/// An open connection to a port in a sandbox.
pub type GuestStream = Box<dyn GuestIo>;

/// Opens connections into sandboxes. The host agent implements it; in a fleet, something
/// that reaches the agent of the sandbox's host.
#[async_trait::async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Connects to `port` in `sandbox`. One attempt: who calls decides about another.
    async fn dial(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, DialError>;
}

/// Why a port in a sandbox could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No such sandbox here.
    #[error("{0} was not found")]
    NotFound(SandboxId),
    /// The sandbox is there, but not running.
    #[error("{sandbox} is {state}, not running")]
    NotRunning {
        /// Which one.
        sandbox: SandboxId,
        /// What it is instead, as a word of the API.
        state: String,
    },
    /// The sandbox refused the connection: nothing listens there.
    #[error("nothing listens on port {port} of {sandbox}")]
    PortClosed {
        /// Which sandbox.
        sandbox: SandboxId,
        /// Which port.
        port: u16,
    },
    /// The connection failed in another way: no answer, no descriptor left.
    #[error("port {port} of {sandbox} could not be reached")]
    Io {
        /// Which sandbox.
        sandbox: SandboxId,
        /// Which port.
        port: u16,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}
