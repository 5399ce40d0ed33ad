//! The last call before a freeze.
//!
//! What of a connection's end is still under way when a guest is stopped it has to work through
//! when it is restored, while somebody waits and, under emulation, code must be translated first.
//! Each clone of a template would do so for minutes, and tell a host that knows nothing of it.
//! So the guest closes its end before, and is told by a reset that there is no other any more.

use std::time::Duration;

use http::{Request, Response, header};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use wrenn_net::GuestDialer;

use super::{ENVD_PORT, GuestBody};

/// A guest that does not close its end so soon is stopped as it is, and that is all.
const PATIENCE: Duration = Duration::from_millis(20);

/// A connection that carries one request.
pub(super) struct Farewell {
    served: JoinHandle<Option<TokioIo<TcpStream>>>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        self.served.abort();
    }
}

/// Why a call failed.
type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Farewell {
    /// Sends a request over a connection of its own.
    pub(super) async fn call(
        dialer: &GuestDialer,
        request: Request<GuestBody>,
    ) -> Result<(Response<Incoming>, Farewell), Failure> {
        Farewell::call_over(dialer.connect(ENVD_PORT).await?, request).await
    }

    async fn call_over(
        stream: TcpStream,
        mut request: Request<GuestBody>,
    ) -> Result<(Response<Incoming>, Farewell), Failure> {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The end that is left comes back whole, and is not closed on the way.
        let served = tokio::spawn(async move {
            let parts = connection.without_shutdown().await;
            parts.ok().map(|parts| parts.io)
        });
        let farewell = Farewell { served };
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.map_or_else(Default::default, Into::into);
        let headers = request.headers_mut();
        headers.insert(header::HOST, header::HeaderValue::from_static("guest"));
        headers.insert(
            header::CONNECTION,
            header::HeaderValue::from_static("close"),
        );
        Ok((sender.send_request(request).await?, farewell))
    }

    /// Waits a little for the guest to close its end, and resets ours then: it has all that was
    /// sent, and nobody there listens.
    pub(super) async fn seen_off(mut self) {
        let left = async {
            let end = (&mut self.served).await.ok().flatten()?;
            closed_by_peer(end.inner()).await;
            end.inner().set_zero_linger().ok()
        };
        // Where its end was broken off or takes its time ours is closed like any other.
        let _ = tokio::time::timeout(PATIENCE, left).await;
    }
}

/// Comes when the other side has sent its last.
async fn closed_by_peer(stream: &TcpStream) {
    let mut rest = [0; 256];
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut rest) {
            Ok(0) => return,
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn g25_nothing_is_left_of_a_connection_that_the_guest_has_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let guest = tokio::spawn(async move {
            let (mut guest, _) = listener.accept().await.unwrap();
            let mut asked = [0; 1024];
            let length = guest.read(&mut asked).await.unwrap();
            let answer = b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n";
            guest.write_all(answer).await.unwrap();
            guest.shutdown().await.unwrap();
            (
                guest,
                String::from_utf8_lossy(&asked[..length]).into_owned(),
            )
        });
        let request = Request::post("http://guest:1/snapshot/prepare?x=y");
        let request = request.body(super::super::full("")).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let (answer, farewell) = Farewell::call_over(stream, request).await.unwrap();
        assert_eq!(answer.status(), 204);
        farewell.seen_off().await;
        let (mut guest, asked) = guest.await.unwrap();
        assert!(
            asked.starts_with("POST /snapshot/prepare?x=y HTTP/1.1\r\n"),
            "{asked}"
        );
        let told = guest.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(told.kind(), std::io::ErrorKind::ConnectionReset);
    }
}
