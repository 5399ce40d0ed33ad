//! The way into ports of sandboxes.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::net::TcpStream;
use wrenn_proxy::{Dial, DialError, GuestStream};
use wrenn_types::SandboxId;

use super::Sim;

/// Every port of every sandbox is one local server, if there is one.
pub struct SimDialer {
    pub sim: Arc<Sim>,
    pub guest: Mutex<Option<SocketAddr>>,
}

#[async_trait::async_trait]
impl Dial for SimDialer {
    async fn dial(&self, sandbox: SandboxId, port: u16) -> Result<GuestStream, DialError> {
        if self.sim.get(&sandbox.to_string()).is_err() {
            return Err(DialError::NotFound(sandbox));
        }
        let guest = *self.guest.lock().unwrap();
        let Some(guest) = guest else {
            return Err(DialError::PortClosed { sandbox, port });
        };
        match TcpStream::connect(guest).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(source) => Err(DialError::Io {
                sandbox,
                port,
                source,
            }),
        }
    }
}
