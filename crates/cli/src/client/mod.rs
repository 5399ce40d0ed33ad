//! The server's HTTP API, as this program uses it.
//!
//! `Client` is made of the settings: the address of `--url`, else the one that the server
//! on this machine has left in its data folder, else the default; the key likewise.

mod error;
mod exec;
mod files;
mod ids;
mod network;
mod pty;
mod sandboxes;
mod snapshots;
mod socket;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use reqwest::header::{HeaderName, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::Value;

pub(crate) use error::{ClientError, KeyOrigin, hint_for};
pub(crate) use exec::{Ended, ExecEvent, ExecInput, ExecStream};
pub(crate) use pty::{PtyEvent, PtyInput, PtyStart, PtyStream};
pub(crate) use sandboxes::Created;
pub(crate) use wire::{Command, CreateRequest, HostInfo, Network, Sandbox};

use crate::server_file::ServerFile;
use crate::settings::{DEFAULT_URL, Settings};

/// The header that carries the key.
pub(crate) const KEY_HEADER: HeaderName = HeaderName::from_static("x-api-key");
/// A server on this machine answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For what only looks something up.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to the server.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Url,
    key: HeaderValue,
    key_origin: KeyOrigin,
    data_dir: PathBuf,
}

impl Client {
    /// The client that the settings describe. Connects to nothing yet.
    pub(crate) fn new(settings: &Settings) -> Result<Self, ClientError> {
        Self::with_base(settings, address(settings)?)
    }

    /// The same for a server at `url`, whatever the settings say.
    pub(crate) fn at(settings: &Settings, url: &str) -> Result<Self, ClientError> {
        Self::with_base(settings, parse_address(url)?)
    }

    fn with_base(settings: &Settings, base: Url) -> Result<Self, ClientError> {
        let (key, key_origin) = key(settings)?;
        let mut key = HeaderValue::from_str(&key).map_err(|_| ClientError::KeyFile {
            path: settings.data_dir.join(KEY_FILE),
            reason: "it holds characters that no key has".to_owned(),
        })?;
        key.set_sensitive(true);
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("wrenn/", env!("CARGO_PKG_VERSION")))
            // A redirect would carry the key to another place.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|source| ClientError::Setup { source })?;
        Ok(Client {
            http,
            base,
            key,
            key_origin,
            data_dir: settings.data_dir.clone(),
        })
    }

    /// Where the server is.
    pub(crate) fn base(&self) -> &Url {
        &self.base
    }

    /// The data folder, should the server be on this machine.
    pub(crate) fn data_dir(&self) -> &std::path::Path {
        &self.data_dir
    }

    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        url
    }

    fn request(&self, method: Method, segments: &[&str]) -> RequestBuilder {
        self.http
            .request(method, self.url(segments))
            .header(KEY_HEADER, self.key.clone())
    }

    fn lookup(&self, segments: &[&str]) -> RequestBuilder {
        self.request(Method::GET, segments).timeout(LOOKUP_TIMEOUT)
    }

    /// Sends and returns the answer, if it says that all went well.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let answer = request
            .send()
            .await
            .map_err(|error| self.transport(error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let body = answer.bytes().await.unwrap_or_default();
        Err(self.refused(status, &body))
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, ClientError> {
        let answer = self.send(request).await?;
        self.read_json(answer).await
    }

    async fn read_json(&self, answer: Response) -> Result<Value, ClientError> {
        let url = answer.url().to_string();
        let body = answer
            .bytes()
            .await
            .map_err(|error| self.transport(error))?;
        serde_json::from_slice(&body).map_err(|source| ClientError::Answer { url, source })
    }

    /// What an answer that is not 2xx means.
    fn refused(&self, status: StatusCode, body: &[u8]) -> ClientError {
        if status == StatusCode::UNAUTHORIZED {
            return ClientError::Unauthorized {
                url: self.base.to_string(),
                origin: self.key_origin.clone(),
            };
        }
        let error = serde_json::from_slice::<wire::ErrorBody>(body)
            .ok()
            .map(|body| body.error);
        match error {
            Some(error) => ClientError::Api {
                status: status.as_u16(),
                code: error.code,
                message: error.message,
            },
            None => ClientError::NotOurs {
                url: self.base.to_string(),
                status: status.as_u16(),
            },
        }
    }

    fn transport(&self, error: reqwest::Error) -> ClientError {
        if error.is_connect() {
            ClientError::NoServer {
                url: self.shown(),
                source: Box::new(error.without_url()),
            }
        } else if error.is_timeout() {
            ClientError::Timeout { url: self.shown() }
        } else {
            ClientError::Broken {
                url: self.shown(),
                source: Box::new(error.without_url()),
            }
        }
    }

    /// The address as people write it.
    fn shown(&self) -> String {
        self.base.as_str().trim_end_matches('/').to_owned()
    }

    /// What the host has and runs.
    pub(crate) async fn host(&self) -> Result<HostInfo, ClientError> {
        wire::read(self.host_json().await?, "/v1/host")
    }

    /// The same in the server's own words.
    pub(crate) async fn host_json(&self) -> Result<Value, ClientError> {
        self.json(self.lookup(&["v1", "host"])).await
    }

    /// An answer's body to its end.
    pub(crate) async fn read_bytes(&self, answer: Response) -> Result<Vec<u8>, ClientError> {
        let body = answer.bytes().await;
        Ok(body.map_err(|error| self.transport(error))?.to_vec())
    }

    /// Has the host drain, or drain no more. Answers since when it does.
    pub(crate) async fn set_draining(&self, draining: bool) -> Result<Option<String>, ClientError> {
        let method = if draining {
            Method::PUT
        } else {
            Method::DELETE
        };
        let request = self.request(method, &["v1", "host", "drain"]);
        let answer = self.json(request.timeout(LOOKUP_TIMEOUT)).await?;
        Ok(answer["draining_since"].as_str().map(str::to_owned))
    }

    /// Pauses all that runs on the host; the server's own words about which and which not.
    pub(crate) async fn pause_all(&self) -> Result<Value, ClientError> {
        let request = self.request(Method::POST, &["v1", "host", "pause"]);
        self.json(request).await
    }
}

/// The file with the first key of a server, in its data folder.
const KEY_FILE: &str = "api-key";

fn address(settings: &Settings) -> Result<Url, ClientError> {
    let text = match &settings.url {
        Some(url) => url.clone(),
        None => match ServerFile::read(&settings.data_dir) {
            Ok(Some(server)) => server.url(),
            // Unreadable means that the folder is root's, and then the default is likely.
            Ok(None) | Err(_) => DEFAULT_URL.to_owned(),
        },
    };
    parse_address(&text)
}

fn parse_address(text: &str) -> Result<Url, ClientError> {
    let wrong = |reason: &str| ClientError::Address {
        given: text.to_owned(),
        reason: reason.to_owned(),
    };
    let url = Url::parse(text).map_err(|error| wrong(&error.to_string()))?;
    match url.scheme() {
        "http" if url.has_host() => Ok(url),
        "https" => Err(wrong(
            "this wrenn speaks plain HTTP only; put a tunnel in between, such as `ssh -L`",
        )),
        _ => Err(wrong("expected `http://host:port`")),
    }
}

fn key(settings: &Settings) -> Result<(String, KeyOrigin), ClientError> {
    if let Some((key, origin)) = &settings.api_key {
        return Ok((key.reveal(), KeyOrigin::Said(origin.clone())));
    }
    let path = settings.data_dir.join(KEY_FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let key: wrenn_types::ApiKey =
                text.trim()
                    .parse()
                    .map_err(|error: wrenn_types::SecretError| ClientError::KeyFile {
                        path: path.clone(),
                        reason: error.to_string(),
                    })?;
            Ok((key.reveal(), KeyOrigin::File(path)))
        }
        Err(source) => Err(ClientError::NoKey { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_http_with_a_host() {
        assert!(parse_address("http://127.0.0.1:3000").is_ok());
        assert!(parse_address("http://[::1]:3000/").is_ok());
        for wrong in [
            "127.0.0.1:3000",
            "localhost:3000",
            "ftp://x",
            "https://x",
            "",
        ] {
            assert!(parse_address(wrong).is_err(), "{wrong}");
        }
    }
}
