//! WebSockets to the server: JSON messages one way and the other.

use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use super::{Client, ClientError, KEY_HEADER};

type Stream = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The way to the server.
#[derive(Debug)]
pub(super) struct Sender {
    sink: SplitSink<Stream, Message>,
    url: String,
}

/// The way from the server.
#[derive(Debug)]
pub(super) struct Receiver {
    stream: SplitStream<Stream>,
    url: String,
}

/// One message from the server.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A text message, as JSON.
    Json(Value),
    /// A binary message.
    Binary(Bytes),
}

impl Client {
    /// Opens a socket. Both ways can be used at the same time, which a program that reads
    /// and writes a lot needs: were one to wait for the other, both could wait for ever.
    pub(super) async fn socket(
        &self,
        segments: &[&str],
    ) -> Result<(Sender, Receiver), ClientError> {
        let mut url = self.url(segments);
        // Cannot fail: `http` to `ws` keeps the kind of URL.
        let _kept = url.set_scheme("ws");
        let mut request = url
            .as_str()
            .into_client_request()
            .map_err(|error| self.socket_error(error))?;
        request.headers_mut().insert(KEY_HEADER, self.key.clone());
        let no_delay = true;
        let (stream, _) = connect_async_with_config(request, None, no_delay)
            .await
            .map_err(|error| self.socket_error(error))?;
        let (sink, stream) = stream.split();
        let url = self.shown();
        Ok((
            Sender {
                sink,
                url: url.clone(),
            },
            Receiver { stream, url },
        ))
    }

    fn socket_error(&self, error: Error) -> ClientError {
        match error {
            Error::Http(answer) => {
                let status = answer.status();
                self.refused(status, answer.body().as_deref().unwrap_or_default())
            }
            Error::Io(source) => ClientError::NoServer {
                url: self.shown(),
                source: Box::new(source),
            },
            other => ClientError::Broken {
                url: self.shown(),
                source: Box::new(other),
            },
        }
    }
}

impl Sender {
    /// Sends one message.
    pub(super) async fn send(&mut self, message: &Value) -> Result<(), ClientError> {
        self.sink
            .send(Message::text(message.to_string()))
            .await
            .map_err(|source| ClientError::Broken {
                url: self.url.clone(),
                source: Box::new(source),
            })
    }
}

impl Receiver {
    /// The next message; `None` when the server has closed the socket.
    pub(super) async fn next(&mut self) -> Result<Option<Incoming>, ClientError> {
        loop {
            return match self.stream.next().await {
                None | Some(Ok(Message::Close(_))) => Ok(None),
                Some(Ok(Message::Text(text))) => serde_json::from_str(&text)
                    .map(|json| Some(Incoming::Json(json)))
                    .map_err(|source| ClientError::Answer {
                        url: self.url.clone(),
                        source,
                    }),
                Some(Ok(Message::Binary(data))) => Ok(Some(Incoming::Binary(data))),
                // tungstenite answers pings itself.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Err(Error::ConnectionClosed | Error::AlreadyClosed)) => Ok(None),
                Some(Err(source)) => Err(ClientError::Broken {
                    url: self.url.clone(),
                    source: Box::new(source),
                }),
            };
        }
    }
}
