//! A client of Firecracker's HTTP interface: one request on each connection, since the
//! requests of a machine's whole life are a few dozen, and a connection that is not kept
//! cannot be in a state that nobody knows.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Body;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// The longest answer that is read: a whole configuration has a few KiB.
const MAX_ANSWER: usize = 1 << 20;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// There is no connection.
    #[error("cannot connect to its socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The connection ended before the answer.
    #[error("it closed the connection without an answer: {0}")]
    Closed(String),
    /// Firecracker says no.
    #[error("it refused, with status {status}: {message}")]
    Refused {
        /// Status of the answer.
        status: u16,
        /// Firecracker's words.
        message: String,
    },
    /// The answer is not what Firecracker documents.
    #[error("its answer is not understood: {0}")]
    Malformed(String),
    /// Nothing came in time.
    #[error("it did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
}

/// Firecracker's words in an answer that is an error.
#[derive(serde::Deserialize)]
struct Fault {
    fault_message: String,
}

/// The interface of one machine.
#[derive(Debug)]
pub(super) struct Api {
    folder: PathBuf,
    name: &'static str,
}

impl Api {
    /// The interface at socket `name` in `folder`.
    pub(super) fn new(folder: PathBuf, name: &'static str) -> Api {
        Api { folder, name }
    }

    /// A connection. Through the folder's descriptor, since a socket's path may have no more
    /// than 107 bytes.
    async fn connect(&self) -> Result<UnixStream, ApiError> {
        let connecting = async {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let held = rustix::fs::open(&self.folder, flags, Mode::empty())?;
            let path = format!("/proc/self/fd/{}/{}", held.as_raw_fd(), self.name);
            UnixStream::connect(Path::new(&path)).await
        };
        connecting.await.map_err(|source| ApiError::Connect {
            path: self.folder.join(self.name),
            source,
        })
    }

    /// Asks for something.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        patience: Duration,
    ) -> Result<T, ApiError> {
        let answer = self.request(Method::GET, path, Bytes::new(), patience);
        let answer = answer.await?;
        serde_json::from_slice(&answer).map_err(|error| ApiError::Malformed(error.to_string()))
    }

    /// Sets or does something.
    pub(super) async fn put(
        &self,
        path: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Result<(), ApiError> {
        self.send(Method::PUT, path, body, patience).await
    }

    /// Changes something.
    pub(super) async fn patch(
        &self,
        path: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Result<(), ApiError> {
        self.send(Method::PATCH, path, body, patience).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Result<(), ApiError> {
        let body = serde_json::to_vec(body)
            .map_err(|error| ApiError::Malformed(format!("of the request itself, {error}")))?;
        let sent = self.request(method, path, Bytes::from(body), patience);
        sent.await.map(drop)
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<Bytes, ApiError> {
        match tokio::time::timeout(patience, self.exchange(method, path, body)).await {
            Ok(answer) => answer,
            Err(_) => Err(ApiError::TimedOut(patience)),
        }
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ApiError> {
        let stream = TokioIo::new(self.connect().await?);
        let closed = |error: hyper::Error| ApiError::Closed(error.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
            .await
            .map_err(closed)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| ApiError::Malformed(format!("of the request itself, {error}")))?;
        let answering = async {
            let answer = sender.send_request(request).await.map_err(understand)?;
            let status = answer.status();
            let too_long = || ApiError::Malformed(format!("it has more than {MAX_ANSWER} bytes"));
            if answer.body().size_hint().lower() > MAX_ANSWER as u64 {
                return Err(too_long());
            }
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| match error.downcast::<LengthLimitError>() {
                Ok(_) => too_long(),
                Err(error) => ApiError::Closed(error.to_string()),
            })?;
            judge(status, body.to_bytes())
        };
        tokio::pin!(connection, answering);
        tokio::select! {
            answer = &mut answering => return answer,
            // Also where the answer has just come with the connection's end; and where it has
            // not, `answering` is told why.
            _ = &mut connection => {}
        }
        answering.await
    }
}

/// Tells an answer that is no HTTP from none at all.
fn understand(error: hyper::Error) -> ApiError {
    if error.is_parse() {
        ApiError::Malformed(error.to_string())
    } else {
        ApiError::Closed(error.to_string())
    }
}

fn judge(status: StatusCode, body: Bytes) -> Result<Bytes, ApiError> {
    if status.is_success() {
        return Ok(body);
    }
    let message = match serde_json::from_slice::<Fault>(&body) {
        Ok(fault) => fault.fault_message,
        // Its HTTP server has errors of its own, in plain text.
        Err(_) => String::from_utf8_lossy(&body[..body.len().min(1024)]).into_owned(),
    };
    Err(ApiError::Refused {
        status: status.as_u16(),
        message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    const PATIENCE: Duration = Duration::from_secs(5);

    /// Answers one request with these bytes, and returns the request.
    fn answering(answer: &'static [u8]) -> (tempfile::TempDir, Api, JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("api")).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut part = [0; 4096];
            while !request.ends_with(b"}") && !request.ends_with(b"\r\n\r\n") {
                let count = stream.read(&mut part).unwrap();
                assert!(count > 0, "the request is cut");
                request.extend_from_slice(&part[..count]);
            }
            // The client may have had enough.
            let _ = stream.write_all(answer);
            String::from_utf8(request).unwrap()
        });
        let api = Api::new(dir.path().to_owned(), "api");
        (dir, api, serving)
    }

    async fn get(answer: &'static [u8]) -> Result<Value, ApiError> {
        let (_dir, api, serving) = answering(answer);
        let result = api.get("/", PATIENCE).await;
        assert!(serving.join().unwrap().starts_with("GET / HTTP/1.1\r\n"));
        result
    }

    #[tokio::test]
    async fn requests_are_as_documented() {
        let (_dir, api, serving) = answering(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n");
        let body = json!({ "state": "Paused" });
        api.patch("/vm", &body, PATIENCE).await.unwrap();
        let request = serving.join().unwrap().to_lowercase();
        assert!(request.starts_with("patch /vm http/1.1\r\n"), "{request}");
        assert!(request.contains("\r\ncontent-type: application/json\r\n"));
        assert!(request.contains("\r\ncontent-length: 18\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n{\"state\":\"paused\"}"));
    }

    #[tokio::test]
    async fn refusals_carry_firecrackers_words() {
        let answer =
            b"HTTP/1.1 400 \r\nContent-Length: 36\r\n\r\n{\"fault_message\":\"No such drive: x\"}";
        let error = get(answer).await.unwrap_err();
        let ApiError::Refused { status, message } = &error else {
            panic!("{error:?}")
        };
        assert_eq!((*status, message.as_str()), (400, "No such drive: x"));
        let error = get(b"HTTP/1.1 503 \r\nContent-Length: 9\r\n\r\ntoo many!").await;
        assert!(error.unwrap_err().to_string().contains("too many!"));
    }

    #[tokio::test]
    async fn what_is_no_answer_is_told_as_such() {
        let malformed: [&[u8]; 4] = [
            b"hello\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\n{\"a\"",
            b"HTTP/1.1 204 \r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 99999999\r\n\r\n{",
        ];
        for answer in malformed {
            let error = get(answer).await.unwrap_err();
            assert!(matches!(error, ApiError::Malformed(_)), "{error:?}");
        }
        let cut: [&[u8]; 4] = [
            b"",
            b"HTTP/1.1 200",
            b"HTTP/1.1 200 \r\nContent-Length: 40\r\n\r\n{\"a\"",
            b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n8\r\n{",
        ];
        for answer in cut {
            let error = get(answer).await.unwrap_err();
            assert!(matches!(error, ApiError::Closed(_)), "{error:?}");
        }
    }

    #[tokio::test]
    async fn silence_and_absence_end_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let api = Api::new(dir.path().to_owned(), "api");
        let error = api.get::<Value>("/", PATIENCE).await.unwrap_err();
        assert!(error.to_string().ends_with("api"), "{error}");
        // Connects to the queue of a listener that accepts nothing.
        let _listener = UnixListener::bind(dir.path().join("api")).unwrap();
        let brief = Duration::from_millis(50);
        let error = api.get::<Value>("/", brief).await.unwrap_err();
        assert!(matches!(error, ApiError::TimedOut(_)), "{error:?}");
        assert_eq!(error.to_string(), "it did not answer within 50 ms");
    }
}
