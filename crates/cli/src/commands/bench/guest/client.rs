//! A client of the guest agent that costs as little as it can, in both codecs, so that what
//! is measured is the agent.
//!
//! One HTTP/1.1 connection each, as E2B's clients make them over plain HTTP. Output is
//! compared with what it must be where it lies, without decoding or copying it.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;

use buffa::Message;
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::TcpStream;
use wrenn_wire::process::__buffa::oneof::process_event::{Event, data_event::Output};
use wrenn_wire::process::StartResponse;

/// Length of an envelope's head: flags and size.
const HEAD: usize = 5;
/// Flag of the envelope that ends a stream and carries its error.
const END_STREAM: u8 = 2;
/// How much of a body is read at once.
const READ_BUFFER: usize = 1 << 20;
/// No message of the agent is larger but a listing, which is no stream.
const MAX_MESSAGE: usize = 64 << 20;

/// Why a call did not work.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error("cannot connect to the guest agent")]
    Connect(#[source] io::Error),
    #[error("the connection to the guest agent broke")]
    Http(#[from] hyper::Error),
    #[error("the request cannot be made")]
    Request(#[from] hyper::http::Error),
    #[error("the request cannot be written as JSON")]
    Encode(#[from] serde_json::Error),
    #[error("{path} was answered with {status}: {text}")]
    Status {
        path: String,
        status: StatusCode,
        text: String,
    },
    #[error("the guest agent ended a stream with an error: {0}")]
    Stream(String),
    #[error("the guest agent's answer is not what it should be: {0}")]
    Wrong(String),
}

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    Json,
    Binary,
}

impl Codec {
    /// The name for people.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Codec::Json => "JSON",
            Codec::Binary => "binary",
        }
    }

    fn encode<M: Serialize + Message>(self, message: &M) -> Result<Vec<u8>, CallError> {
        Ok(match self {
            Codec::Json => serde_json::to_vec(message)?,
            Codec::Binary => message.encode_to_vec(),
        })
    }

    const fn unary(self) -> &'static str {
        match self {
            Codec::Json => "application/json",
            Codec::Binary => "application/proto",
        }
    }

    const fn stream(self) -> &'static str {
        match self {
            Codec::Json => "application/connect+json",
            Codec::Binary => "application/connect+proto",
        }
    }
}

/// A body of a request.
pub(super) type Body = BoxBody<Bytes, Infallible>;

/// One connection, which carries one request at a time.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Body>,
    address: SocketAddr,
}

impl Connection {
    pub(super) async fn open(address: SocketAddr) -> Result<Connection, CallError> {
        let stream = TcpStream::connect(address)
            .await
            .map_err(CallError::Connect)?;
        stream.set_nodelay(true).map_err(CallError::Connect)?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(READ_BUFFER)
            .handshake(TokioIo::new(stream))
            .await?;
        tokio::spawn(async move {
            // Whoever waits for an answer is told of the error as well.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection of the benchmark ended");
            }
        });
        Ok(Connection { sender, address })
    }

    /// Sends a request; what is not an answer of success is an error.
    pub(super) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Body,
    ) -> Result<Response<Incoming>, CallError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.address.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.sender.ready().await?;
        let response = self.sender.send_request(request.body(body)?).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.into_body().collect().await?.to_bytes();
        Err(CallError::Status {
            path: path.to_owned(),
            status,
            text: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    /// Calls a unary RPC; its answer is not decoded.
    pub(super) async fn call<M: Serialize + Message>(
        &mut self,
        codec: Codec,
        path: &str,
        message: &M,
    ) -> Result<Bytes, CallError> {
        let body = full(codec.encode(message)?);
        let headers = [
            ("content-type", codec.unary()),
            ("connect-protocol-version", "1"),
        ];
        let answer = self.send(Method::POST, path, &headers, body).await?;
        Ok(answer.into_body().collect().await?.to_bytes())
    }

    /// Calls an RPC that answers with a stream of process events.
    pub(super) async fn stream<M: Serialize + Message>(
        &mut self,
        codec: Codec,
        path: &str,
        message: &M,
    ) -> Result<Events, CallError> {
        let message = codec.encode(message)?;
        let size = u32::try_from(message.len())
            .map_err(|_| CallError::Wrong("a request of 4 GiB".to_owned()))?;
        let mut body = vec![0];
        body.extend(size.to_be_bytes());
        body.extend(message);
        let headers = [
            ("content-type", codec.stream()),
            ("connect-protocol-version", "1"),
        ];
        let answer = self.send(Method::POST, path, &headers, full(body)).await?;
        Ok(Events {
            body: answer.into_body(),
            codec,
            envelopes: Envelopes::default(),
        })
    }
}

/// A body that is there already.
pub(super) fn full(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).boxed()
}

/// What a reader of events is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told<'a> {
    /// The program's id.
    Started(u32),
    /// So many bytes of output; all of them zeros, where that is known.
    Zeros(u64),
    /// Output.
    Output(&'a [u8]),
    /// Its exit code.
    Ended(i32),
}

/// A stream of a process's events.
#[derive(Debug)]
pub(super) struct Events {
    body: Incoming,
    codec: Codec,
    envelopes: Envelopes,
}

impl Events {
    /// Waits for more and tells it; `false` when the stream has ended as it should.
    pub(super) async fn next(&mut self, mut tell: impl FnMut(Told<'_>)) -> Result<bool, CallError> {
        let codec = self.codec;
        match self.body.frame().await.transpose()? {
            Some(frame) => {
                if let Ok(data) = frame.into_data() {
                    self.envelopes.feed(&data, |flags, message| {
                        one(codec, flags, message, &mut tell)
                    })?;
                }
                Ok(true)
            }
            None if self.envelopes.ended => Ok(false),
            None => Err(CallError::Wrong("a stream without an end".to_owned())),
        }
    }

    /// Reads to the end; the exit code.
    pub(super) async fn finish(mut self, mut tell: impl FnMut(Told<'_>)) -> Result<i32, CallError> {
        let mut code = None;
        while self
            .next(|told| match told {
                Told::Ended(exit) => code = Some(exit),
                other => tell(other),
            })
            .await?
        {}
        code.ok_or_else(|| CallError::Wrong("a stream without the program's end".to_owned()))
    }
}

/// Cuts a body into envelopes, copying only those that lie across two chunks.
#[derive(Debug, Default)]
struct Envelopes {
    partial: Vec<u8>,
    ended: bool,
}

impl Envelopes {
    fn feed(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(u8, &[u8]) -> Result<(), CallError>,
    ) -> Result<(), CallError> {
        loop {
            if self.partial.is_empty() {
                let Some((flags, message, rest)) = split(bytes)? else {
                    self.partial.extend_from_slice(bytes);
                    return Ok(());
                };
                self.ended |= flags & END_STREAM != 0;
                each(flags, message)?;
                bytes = rest;
            } else {
                let wanted = match self.partial.first_chunk::<HEAD>() {
                    Some(head) => HEAD + size_of(*head)?,
                    None => HEAD,
                };
                let take = (wanted - self.partial.len()).min(bytes.len());
                self.partial.extend_from_slice(&bytes[..take]);
                bytes = &bytes[take..];
                if let Some((flags, message, _)) = split(&self.partial)? {
                    self.ended |= flags & END_STREAM != 0;
                    each(flags, message)?;
                    self.partial.clear();
                } else if bytes.is_empty() {
                    return Ok(());
                }
            }
        }
    }
}

fn size_of([_, size @ ..]: [u8; HEAD]) -> Result<usize, CallError> {
    match u32::from_be_bytes(size) as usize {
        size if size <= MAX_MESSAGE => Ok(size),
        size => Err(CallError::Wrong(format!("a message of {size} bytes"))),
    }
}

/// The first envelope of these bytes, if all of it is there, and what follows it.
#[allow(clippy::type_complexity)]
fn split(bytes: &[u8]) -> Result<Option<(u8, &[u8], &[u8])>, CallError> {
    let Some(head) = bytes.first_chunk::<HEAD>() else {
        return Ok(None);
    };
    let end = HEAD + size_of(*head)?;
    Ok(bytes
        .get(HEAD..end)
        .map(|message| (head[0], message, &bytes[end..])))
}

/// Tells what one message says.
fn one(
    codec: Codec,
    flags: u8,
    message: &[u8],
    tell: &mut impl FnMut(Told<'_>),
) -> Result<(), CallError> {
    if flags & END_STREAM != 0 {
        let text = String::from_utf8_lossy(message);
        return if text.contains("\"error\"") {
            Err(CallError::Stream(text.into_owned()))
        } else {
            Ok(())
        };
    }
    let zeros = match codec {
        Codec::Json => zeros_in_json(message),
        Codec::Binary => zeros_in_binary(message),
    };
    if let Some(count) = zeros {
        tell(Told::Zeros(count));
        return Ok(());
    }
    let response: StartResponse = match codec {
        Codec::Json => serde_json::from_slice(message)?,
        Codec::Binary => StartResponse::decode_from_slice(message)
            .map_err(|error| CallError::Wrong(error.to_string()))?,
    };
    match response.event.into_option().and_then(|event| event.event) {
        Some(Event::Start(start)) => tell(Told::Started(start.pid)),
        Some(Event::Data(data)) => match &data.output {
            Some(Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes)) => {
                tell(Told::Output(bytes));
            }
            None => return Err(CallError::Wrong("data without output".to_owned())),
        },
        Some(Event::End(end)) => tell(Told::Ended(end.exit_code)),
        Some(Event::Keepalive(_)) => {}
        None => return Err(CallError::Wrong("an empty event".to_owned())),
    }
    Ok(())
}

/// More than the agent puts into one message.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
static ZEROS_IN_BASE64: [u8; 96 << 10] = [b'A'; 96 << 10];

/// The number of bytes, where this is standard output of nothing but zeros.
fn zeros_in_binary(message: &[u8]) -> Option<u64> {
    let mut data = message;
    // ProcessEvent in field 1, DataEvent in field 2, stdout in field 1.
    for key in [0x0a, 0x12, 0x0a] {
        let (first, rest) = data.split_first()?;
        if *first != key {
            return None;
        }
        let (length, rest) = varint(rest)?;
        if length != rest.len() {
            return None;
        }
        data = rest;
    }
    (data == ZEROS.get(..data.len())?).then_some(data.len() as u64)
}

fn varint(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut value = 0;
    for (place, byte) in bytes.iter().enumerate().take(5) {
        value |= usize::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some((value, &bytes[place + 1..]));
        }
    }
    None
}

/// The same for JSON.
fn zeros_in_json(message: &[u8]) -> Option<u64> {
    let text = message
        .strip_prefix(br#"{"event":{"data":{"stdout":""#)?
        .strip_suffix(br#""}}}"#)?;
    let padding = text.iter().rev().take_while(|b| **b == b'=').count();
    let digits = text.get(..text.len() - padding)?;
    let zeros = digits == ZEROS_IN_BASE64.get(..digits.len())?;
    (zeros && text.len() % 4 == 0).then(|| (text.len() / 4 * 3 - padding) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Binary `{event: {data: {stdout}}}`.
    fn stdout(data: &[u8]) -> Vec<u8> {
        let mut message = data.to_vec();
        for key in [0x0a_u8, 0x12, 0x0a] {
            let length = message.len();
            assert!(length < 128);
            message.splice(0..0, [key, length as u8]);
        }
        message
    }

    fn told(codec: Codec, message: &[u8]) -> Vec<String> {
        let mut all = Vec::new();
        one(codec, 0, message, &mut |told| all.push(format!("{told:?}"))).unwrap();
        all
    }

    #[test]
    fn zeros_are_counted_and_other_output_is_told() {
        assert_eq!(told(Codec::Binary, &stdout(&[0; 100])), ["Zeros(100)"]);
        assert_eq!(told(Codec::Binary, &stdout(b"\0a")), ["Output([0, 97])"]);
        for (text, expected) in [
            ("AAAA", "Zeros(3)"),
            ("AAA=", "Zeros(2)"),
            ("AAAAAA==", "Zeros(4)"),
            ("AGE=", "Output([0, 97])"),
        ] {
            let message = format!(r#"{{"event":{{"data":{{"stdout":"{text}"}}}}}}"#);
            assert_eq!(told(Codec::Json, message.as_bytes()), [expected]);
        }
        assert_eq!(
            told(Codec::Json, br#"{"event":{"end":{"exitCode":3}}}"#),
            ["Ended(3)"]
        );
    }

    #[test]
    fn envelopes_are_found_however_a_body_is_cut() {
        let mut body = Vec::new();
        for message in [&b"first"[..], b"", b"third one"] {
            body.push(0);
            body.extend((message.len() as u32).to_be_bytes());
            body.extend(message);
        }
        body.extend([END_STREAM, 0, 0, 0, 2]);
        body.extend(b"{}");
        for cut in 1..body.len() {
            let mut envelopes = Envelopes::default();
            let mut found = Vec::new();
            for chunk in body.chunks(cut) {
                envelopes
                    .feed(chunk, |_, message| {
                        found.push(String::from_utf8(message.to_vec()).unwrap());
                        Ok(())
                    })
                    .unwrap();
            }
            assert_eq!(found, ["first", "", "third one", "{}"], "chunks of {cut}");
            assert!(envelopes.ended);
        }
    }

    #[test]
    fn an_error_at_the_end_is_an_error() {
        let error = one(
            Codec::Json,
            END_STREAM,
            br#"{"error":{"code":"x"}}"#,
            &mut |_| {},
        );
        assert!(matches!(error, Err(CallError::Stream(_))), "{error:?}");
    }
}
