//! An `envd` as a plain process, and a client that sees every byte.
#![allow(dead_code)]

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

/// Nothing here takes longer, also on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Envd {
    child: Child,
    pub address: String,
}

impl Drop for Envd {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Envd {
    pub fn start() -> Envd {
        Envd::start_by(Command::new("env"))
    }

    /// Started by another program, which takes it and its arguments as its own last ones, and
    /// becomes it.
    pub fn start_by(mut command: Command) -> Envd {
        let mut child = command
            .arg(env!("CARGO_BIN_EXE_envd"))
            .args(["--no-vm", "--port", "0"])
            .env("ENVD_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = line
            .split_whitespace()
            .find_map(|word| word.parse::<std::net::SocketAddr>().ok())
            .unwrap_or_else(|| panic!("no address in {line:?}"));
        Envd {
            child,
            address: address.to_string(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn send<B>(&self, request: Request<B>) -> Response<Incoming>
    where
        B: hyper::body::Body + Send + Unpin + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = TcpStream::connect(&self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let response = tokio::time::timeout(PATIENCE, sender.send_request(request));
        response.await.expect("an answer in time").unwrap()
    }

    pub fn request(
        &self,
        method: Method,
        target: &str,
        headers: &[(&str, &str)],
    ) -> http::request::Builder {
        let mut builder = Request::builder()
            .method(method)
            .uri(target)
            .header("host", &self.address);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder
    }

    pub async fn get(&self, query: &str, headers: &[(&str, &str)]) -> Answer {
        let request = self.request(Method::GET, &format!("/files?{query}"), headers);
        let request = request.body(Full::new(Bytes::new())).unwrap();
        Answer::of(self.send(request).await).await
    }

    pub async fn post(
        &self,
        target: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let request = self.request(Method::POST, target, headers);
        let request = request.body(Full::new(body.into())).unwrap();
        Answer::of(self.send(request).await).await
    }

    /// Uploads as an octet stream.
    pub async fn put(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut all = vec![("content-type", "application/octet-stream")];
        all.extend_from_slice(headers);
        self.post(&format!("/files?path={}", escape(path)), &all, body)
            .await
    }

    /// Calls a unary RPC in a codec; the error is code and message.
    pub async fn call<Q, A>(
        &self,
        codec: Codec,
        user: Option<&str>,
        method: &str,
        question: &Q,
    ) -> Result<A, (String, String)>
    where
        Q: Serialize + buffa::Message,
        A: DeserializeOwned + buffa::Message,
    {
        let (kind, body) = match codec {
            Codec::Json => ("application/json", serde_json::to_vec(question).unwrap()),
            Codec::Proto => ("application/proto", question.encode_to_vec()),
        };
        let basic = user.map(basic);
        let mut headers = vec![("content-type", kind), ("connect-protocol-version", "1")];
        if let Some(basic) = &basic {
            headers.push(("authorization", basic));
        }
        let target = format!("/filesystem.Filesystem/{method}");
        let answer = self.post(&target, &headers, body).await;
        if answer.status == StatusCode::OK {
            return Ok(match codec {
                Codec::Json => serde_json::from_slice(&answer.body).unwrap(),
                Codec::Proto => A::decode_from_slice(&answer.body).unwrap(),
            });
        }
        let error = answer.json();
        let text = |key: &str| error[key].as_str().unwrap_or("").to_owned();
        Err((text("code"), text("message")))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    Json,
    Proto,
}

pub const CODECS: [Codec; 2] = [Codec::Json, Codec::Proto];

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub async fn of(response: Response<Incoming>) -> Answer {
        let (head, body) = response.into_parts();
        let body = tokio::time::timeout(PATIENCE, body.collect())
            .await
            .expect("a body in time");
        Answer {
            status: head.status,
            headers: head.headers,
            body: body.unwrap().to_bytes(),
        }
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {:?} {:?}", self.status, self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }

    /// `{"code", "message"}` with the status as code.
    pub fn message(&self) -> String {
        let error = self.json();
        assert_eq!(error["code"], self.status.as_u16(), "{error}");
        error["message"].as_str().unwrap().to_owned()
    }
}

pub fn basic(user: &str) -> String {
    use base64::Engine;
    format!(
        "Basic {}",
        base64::prelude::BASE64_STANDARD.encode(format!("{user}:"))
    )
}

pub fn escape(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

/// A directory anybody may use, like `/tmp` without its sticky bit.
pub fn shared_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    dir
}

pub fn names(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
