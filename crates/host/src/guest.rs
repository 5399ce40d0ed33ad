//! The host's side of the guest agent: its restore hook, its processes and its files,
//! over connections opened inside the sandbox's network slot.

mod farewell;
mod inventory;
mod stamped;

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use bytes::Bytes;
use connectrpc::ConnectError;
use connectrpc::client::{CallOptions, ClientConfig, ServiceTransport};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpStream;
use wrenn_net::GuestDialer;
use wrenn_types::AccessToken;
use wrenn_wire::process::ProcessClient;

use self::farewell::Farewell;
use self::stamped::Stamped;
pub use inventory::{
    FileKind, GuestFile, GuestPath, GuestPort, GuestProcess, Inventory, lists_nothing,
};

/// The guest agent's port, in every guest.
pub const ENVD_PORT: u16 = 49983;

/// The guest agent's version as E2B's clients read it: what they enable depends on it.
pub const ENVD_VERSION: &str = "0.6.13";

/// How long a unary call to a healthy guest agent may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between attempts to reach an agent that is starting.
const RETRY_PAUSE: Duration = Duration::from_millis(5);
/// How long one attempt at the restore hook may take before it is tried again; a repeated
/// attempt changes nothing, since the hook runs once per restore id.
const INIT_ATTEMPT: Duration = Duration::from_secs(5);
/// How long it may take; after more the time is told again, for a clock is to be right to the
/// second.
const LATE: Duration = Duration::from_millis(500);

/// Why the guest agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It was not reached in time.
    #[error("the guest agent did not answer {what} within {waited:?}: {last}")]
    Unreachable {
        /// What was asked.
        what: &'static str,
        /// For how long it was tried.
        waited: Duration,
        /// What the last attempt ran into.
        last: String,
    },
    /// It answered with a failure.
    #[error("the guest agent refused {what}: {status}: {message}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Its answer's status.
        status: StatusCode,
        /// Its answer's message.
        message: String,
    },
    /// The connection broke.
    #[error("the connection to the guest agent broke during {what}: {cause}")]
    Broken {
        /// What was under way.
        what: &'static str,
        /// What the transport says.
        cause: String,
    },
}

impl From<GuestError> for ConnectError {
    fn from(error: GuestError) -> Self {
        let text = error.to_string();
        match error {
            GuestError::Unreachable { .. } | GuestError::Broken { .. } => {
                ConnectError::unavailable(text)
            }
            GuestError::Refused {
                status, message, ..
            } => match status.as_u16() {
                // 401 as well: the host carries the right token, so what the agent does not
                // know is the user that the request names.
                400 | 401 | 406 => ConnectError::invalid_argument(message),
                403 => ConnectError::permission_denied(message),
                404 => ConnectError::not_found(message),
                409 => ConnectError::already_exists(message),
                // Connect has no code of its own for a full disk; 507 comes back from it
                // at the API's border.
                507 => ConnectError::resource_exhausted(message),
                _ => ConnectError::internal(text),
            },
        }
    }
}

/// Opens connections inside the slot, whatever the address says.
#[derive(Clone)]
pub struct SlotConnector(GuestDialer);

impl tower::Service<Uri> for SlotConnector {
    type Response = TokioIo<TcpStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dialer = self.0.clone();
        let port = uri.port_u16().unwrap_or(ENVD_PORT);
        Box::pin(async move {
            let stream = dialer.connect(port).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(stream))
        })
    }
}

/// A request body to the guest.
pub type GuestBody = BoxBody<Bytes, ConnectError>;
/// An HTTP client whose connections are opened inside the slot.
type Http = Client<SlotConnector, GuestBody>;
/// The generated client of the guest's `process.Process`, over a slot.
pub type Processes = ProcessClient<ServiceTransport<Http>>;

/// Who a restored machine is from now on: the body of `POST /init`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity<'a> {
    /// 128 random bits in hexadecimal; the hook runs once for each.
    #[serde(rename = "restoreID")]
    pub restore_id: &'a str,
    /// How often this machine was restored.
    pub generation: u64,
    /// What every other request must carry from now on; empty: the agent is open.
    pub access_token: &'a str,
    /// Variables of every process.
    pub env_vars: &'a BTreeMap<String, String>,
    /// The sandbox, in its outside form.
    #[serde(rename = "sandboxID")]
    pub sandbox_id: &'a str,
    /// The template's name.
    #[serde(rename = "templateID")]
    pub template_id: &'a str,
    /// Host name of the guest.
    pub hostname: &'a str,
    /// Who runs commands when nobody is named.
    pub default_user: &'a str,
}

/// What the guest's restore hook says it did; see `docs/architecture.md`. An agent that says
/// nothing certifies nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Restored {
    /// The kernel's random number generator was given fresh entropy.
    pub entropy_reseeded: bool,
    /// Machine id, host name, ids and token were replaced.
    pub ids_rotated: bool,
    /// By how many microseconds the clock was ahead of the host's before it was set.
    pub clock_offset_micros: i64,
    /// The steps in their order, with the microseconds each took.
    pub steps: Vec<(String, u64)>,
}

/// How busy a guest is; `GET /metrics` of its agent. Sizes are in bytes.
#[derive(Debug, Clone, Deserialize)]
pub struct GuestMetrics {
    /// Processors.
    pub cpu_count: u32,
    /// Of all of them, 0 to 100, since the last time it was asked.
    pub cpu_used_pct: f64,
    /// All memory.
    pub mem_total: u64,
    /// What is in use of it.
    pub mem_used: u64,
    /// What caches hold.
    pub mem_cache: u64,
    /// Size of the root file system.
    pub disk_total: u64,
    /// What is used of it.
    pub disk_used: u64,
}

/// The header of `/init`'s answer that carries [`Restored`].
const RESTORED_HEADER: &str = "x-wrenn-restored";

/// A client of one machine's guest agent.
#[derive(Clone)]
pub struct Guest {
    http: Arc<RwLock<Http>>,
    dialer: GuestDialer,
    token: Arc<RwLock<Option<AccessToken>>>,
}

impl Guest {
    /// A client that dials through this slot; nothing is sent yet.
    pub fn new(dialer: GuestDialer) -> Self {
        Guest {
            http: Arc::new(RwLock::new(http(&dialer))),
            dialer,
            token: Arc::default(),
        }
    }

    fn http(&self) -> Http {
        self.http.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Closes the connection that is kept for the next request, which opens another.
    fn hang_up(&self) {
        *self.http.write().unwrap_or_else(|e| e.into_inner()) = http(&self.dialer);
    }

    fn token(&self) -> Option<AccessToken> {
        // A poisoned lock still holds a whole token.
        self.token.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The token that requests carry from now on.
    pub fn set_token(&self, token: Option<AccessToken>) {
        *self.token.write().unwrap_or_else(|e| e.into_inner()) = token;
    }

    fn request(&self, method: Method, path_and_query: &str) -> http::request::Builder {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://guest:{ENVD_PORT}{path_and_query}"));
        if let Some(token) = self.token() {
            request = request.header("x-access-token", token.reveal());
        }
        request
    }

    /// Runs the restore hook: tries until the agent answers or `patience` is over. The
    /// host authorises itself with `host_token`, which the machine was started with.
    pub async fn init(
        &self,
        identity: &Identity<'_>,
        host_token: &AccessToken,
        patience: Duration,
    ) -> Result<Restored, GuestError> {
        const WHAT: &str = "its restore hook (/init)";
        let started = Instant::now();
        let mut last = "not tried".to_owned();
        while started.elapsed() < patience {
            let asked = Instant::now();
            let answer = tokio::time::timeout(INIT_ATTEMPT, self.init_once(identity, host_token));
            match answer.await {
                Ok(Ok(restored)) => {
                    if asked.elapsed() > LATE {
                        self.tell_time(identity, host_token).await;
                    }
                    return Ok(restored);
                }
                // It is there and says no: trying again would not change its mind.
                Ok(Err(refused @ GuestError::Refused { .. })) => return Err(refused),
                Ok(Err(other)) => last = other.to_string(),
                Err(_) => last = format!("no answer within {INIT_ATTEMPT:?}"),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        Err(GuestError::Unreachable {
            what: WHAT,
            waited: started.elapsed(),
            last,
        })
    }

    /// Tells a guest the time again: what its restore hook was told may have been on its way for
    /// as long as that took. The hook does not run again.
    async fn tell_time(&self, identity: &Identity<'_>, host_token: &AccessToken) {
        let told = tokio::time::timeout(INIT_ATTEMPT, self.init_once(identity, host_token)).await;
        match told {
            Ok(Ok(_)) => tracing::debug!("a guest was told the time again"),
            Ok(Err(error)) => {
                tracing::warn!(error = %chain(&error), "a guest's clock may be late");
            }
            Err(_) => tracing::warn!("a guest's clock may be late: it does not answer"),
        }
    }

    async fn init_once(
        &self,
        identity: &Identity<'_>,
        host_token: &AccessToken,
    ) -> Result<Restored, GuestError> {
        const WHAT: &str = "its restore hook (/init)";
        let broken = |cause: String| GuestError::Broken { what: WHAT, cause };
        let mut entropy = [0u8; 64];
        getrandom::fill(&mut entropy).map_err(|e| broken(e.to_string()))?;
        let mut body = serde_json::to_value(identity).map_err(|e| broken(e.to_string()))?;
        // Per attempt: entropy that was never sent before, and a time that is now.
        body["entropy"] = base64::engine::general_purpose::STANDARD
            .encode(entropy)
            .into();
        // The time is that when the body is sent: on a busy host a connection may take a while.
        let stamp = move || {
            body["timestamp"] = unix_nanos().into();
            Bytes::from(body.to_string())
        };
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://guest:{ENVD_PORT}/init"))
            .header("content-type", "application/json")
            .header("x-access-token", host_token.reveal())
            .body(Stamped::new(stamp).boxed())
            .map_err(|e| broken(e.to_string()))?;
        let answer = self.send(WHAT, request).await?;
        match answer.headers().get(RESTORED_HEADER) {
            Some(said) => serde_json::from_slice(said.as_bytes())
                .map_err(|e| broken(format!("what it says it did is not understood: {e}"))),
            None => Ok(Restored::default()),
        }
    }

    /// Quiesces the guest for a freeze: its own connections idle, the users' processes
    /// frozen, file systems synced.
    pub async fn prepare_snapshot(&self) -> Result<(), GuestError> {
        const WHAT: &str = "to be quiet for a snapshot (/snapshot/prepare)";
        // The guest closes it now, and a request that is sent there meanwhile is lost.
        self.hang_up();
        self.last_call(WHAT, "/snapshot/prepare").await
    }

    /// Goes through what quiescing costs, without its effects.
    pub async fn rehearse_snapshot(&self) -> Result<(), GuestError> {
        const WHAT: &str = "to rehearse a snapshot (/snapshot/rehearse)";
        self.last_call(WHAT, "/snapshot/rehearse").await
    }

    /// Has a quiesced guest go on, when there was no freeze or its machine lives on; its clock,
    /// which stood as long as the machine, too. One that is not quiesced does nothing.
    pub async fn undo_snapshot(&self) -> Result<(), GuestError> {
        const WHAT: &str = "to go on after a snapshot (/snapshot/undo)";
        let stamp = || Bytes::from(json!({"timestamp": unix_nanos()}).to_string());
        let request = self.request(Method::POST, "/snapshot/undo");
        let request = request.body(Stamped::new(stamp).boxed());
        let request = request.map_err(|e| GuestError::Broken {
            what: WHAT,
            cause: e.to_string(),
        })?;
        in_time(WHAT, async { self.send(WHAT, request).await.map(drop) }).await
    }

    /// How busy the guest is.
    pub async fn metrics(&self) -> Result<GuestMetrics, GuestError> {
        const WHAT: &str = "how busy it is (/metrics)";
        let broken = |cause: String| GuestError::Broken { what: WHAT, cause };
        let request = self
            .request(Method::GET, "/metrics")
            .body(full(""))
            .map_err(|e| broken(e.to_string()))?;
        let answer = self.send(WHAT, request).await?;
        let body = http_body_util::Limited::new(answer.into_body(), 64 << 10);
        let body = body.collect().await.map_err(|e| broken(e.to_string()))?;
        serde_json::from_slice(&body.to_bytes()).map_err(|e| broken(e.to_string()))
    }

    /// A call without content of one of the host's own routes, over a connection of its own,
    /// whose end in the guest is closed afterwards.
    async fn last_call(&self, what: &'static str, path: &str) -> Result<(), GuestError> {
        let request = self.request(Method::POST, path).body(full(""));
        let request = request.map_err(|e| GuestError::Broken {
            what,
            cause: e.to_string(),
        })?;
        in_time(what, async {
            let (answer, farewell) =
                Farewell::call(&self.dialer, request)
                    .await
                    .map_err(|e| GuestError::Broken {
                        what,
                        cause: chain(&*e),
                    })?;
            accepted(what, answer).await?;
            farewell.seen_off().await;
            Ok(())
        })
        .await
    }

    /// The guest's processes.
    pub fn processes(&self) -> Processes {
        let base = Uri::from_static("http://guest:49983");
        let mut config = ClientConfig::new(base).proto();
        if let Some(token) = self.token() {
            config = config.with_default_header("x-access-token", token.reveal());
        }
        ProcessClient::new(ServiceTransport::new(self.http()), config)
    }

    /// Opens a file of the guest for reading: its size, and its bytes as they come.
    pub async fn read_file(&self, path: &str, user: &str) -> Result<(u64, Incoming), GuestError> {
        const WHAT: &str = "to read a file";
        let request = self
            .request(Method::GET, &files_query(path, user))
            .body(full(""))
            .map_err(|e| GuestError::Broken {
                what: WHAT,
                cause: e.to_string(),
            })?;
        let response = self.send(WHAT, request).await?;
        let size = response
            .headers()
            .get(http::header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok())
            .ok_or_else(|| GuestError::Broken {
                what: WHAT,
                cause: "the answer does not say how long the file is".to_owned(),
            })?;
        Ok((size, response.into_body()))
    }

    /// Writes a file of the guest; readers see it when it is whole.
    pub async fn write_file(
        &self,
        path: &str,
        user: &str,
        body: GuestBody,
    ) -> Result<(), GuestError> {
        const WHAT: &str = "to write a file";
        let request = self
            .request(Method::POST, &files_query(path, user))
            .header(http::header::CONTENT_TYPE, "application/octet-stream")
            .body(body)
            .map_err(|e| GuestError::Broken {
                what: WHAT,
                cause: e.to_string(),
            })?;
        self.send(WHAT, request).await.map(drop)
    }

    async fn send(
        &self,
        what: &'static str,
        request: Request<GuestBody>,
    ) -> Result<Response<Incoming>, GuestError> {
        let broken = |e: &dyn std::error::Error| GuestError::Broken {
            what,
            cause: chain(e),
        };
        let response = self.http().request(request).await.map_err(|e| broken(&e))?;
        accepted(what, response).await
    }
}

/// One connection is kept for the next request; more would only be held, for nothing closes them
/// while nobody asks.
fn http(dialer: &GuestDialer) -> Http {
    Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(1)
        .build(SlotConnector(dialer.clone()))
}

async fn in_time<T>(
    what: &'static str,
    answer: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    let answer = tokio::time::timeout(CALL_TIMEOUT, answer).await;
    answer.unwrap_or_else(|_| {
        Err(GuestError::Unreachable {
            what,
            waited: CALL_TIMEOUT,
            last: "no answer".to_owned(),
        })
    })
}

/// The answer, if it is no failure.
async fn accepted(
    what: &'static str,
    response: Response<Incoming>,
) -> Result<Response<Incoming>, GuestError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    // An error's body is small; whoever sends more is cut off.
    let body = http_body_util::Limited::new(response.into_body(), 64 << 10);
    let text = body.collect().await.map_or_else(
        |e| format!("(its message could not be read: {e})"),
        |body| message_of(&body.to_bytes()),
    );
    Err(GuestError::Refused {
        what,
        status,
        message: text,
    })
}

/// Call options that name a user of the guest, as E2B's clients do.
pub fn as_user(user: &str) -> CallOptions {
    let options = CallOptions::default();
    if user.is_empty() {
        return options;
    }
    let credentials = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
    options.with_header("authorization", format!("Basic {credentials}"))
}

fn files_query(path: &str, user: &str) -> String {
    let path = utf8_percent_encode(path, NON_ALPHANUMERIC);
    if user.is_empty() {
        return format!("/files?path={path}");
    }
    format!(
        "/files?path={path}&username={}",
        utf8_percent_encode(user, NON_ALPHANUMERIC)
    )
}

fn full(body: impl Into<Bytes>) -> GuestBody {
    Full::new(body.into())
        .map_err(|never| match never {})
        .boxed()
}

/// The `message` of a JSON error, or the text as it is.
fn message_of(body: &[u8]) -> String {
    serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|json| Some(json.get("message")?.as_str()?.to_owned()))
        .unwrap_or_else(|| String::from_utf8_lossy(body).trim().to_owned())
}

fn unix_nanos() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
