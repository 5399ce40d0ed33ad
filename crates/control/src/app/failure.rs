//! Why a request was not fulfilled, in the words of the API.

use connectrpc::{ConnectError, ErrorCode};
use serde_json::{Map, Value};
use wrenn_store::StoreError;
use wrenn_types::SandboxState;

/// E2B's word where a guest agent does not answer, which is ours too.
const E2B_GUEST_UNRESPONSIVE: &str = "sandbox_snapshot_guest_agent_unresponsive";

/// The stable words for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The request itself is wrong.
    InvalidRequest,
    /// No valid credential.
    Unauthorized,
    /// The user in the sandbox may not.
    Forbidden,
    /// No such thing, or another team's.
    NotFound,
    /// The method does not exist on this path.
    MethodNotAllowed,
    /// It contradicts something that is there.
    Conflict,
    /// Another template has the name.
    TemplateNameTaken,
    /// The name belongs to an image's template.
    NameReserved,
    /// Not in the state the sandbox is in.
    InvalidState,
    /// The body is larger than allowed.
    TooLarge,
    /// Our fault.
    InternalError,
    /// Not offered by this server.
    NotImplemented,
    /// The host or the guest agent failed.
    AgentError,
    /// The host does not answer.
    HostUnavailable,
    /// The host drains: it starts nothing until its operator says so.
    Draining,
    /// No host has room.
    NoHostsAvailable,
    /// The host's disk is full: nothing can be started or saved there.
    HostDiskFull,
    /// The sandbox's disk is full.
    NoSpace,
    /// The sandbox's machine died while this was under way.
    SandboxDied,
    /// The guest agent does not answer, without which a sandbox cannot be saved.
    GuestUnresponsive,
}

impl Code {
    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::InvalidRequest => "invalid_request",
            Code::Unauthorized => "unauthorized",
            Code::Forbidden => "forbidden",
            Code::NotFound => "not_found",
            Code::MethodNotAllowed => "method_not_allowed",
            Code::Conflict => "conflict",
            Code::TemplateNameTaken => "template_name_taken",
            Code::NameReserved => "name_reserved",
            Code::InvalidState => "invalid_state",
            Code::TooLarge => "too_large",
            Code::InternalError => "internal_error",
            Code::NotImplemented => "not_implemented",
            Code::AgentError => "agent_error",
            Code::HostUnavailable => "host_unavailable",
            Code::Draining => "draining",
            Code::NoHostsAvailable => "no_hosts_available",
            Code::HostDiskFull => "host_disk_full",
            Code::NoSpace => "no_space",
            Code::SandboxDied => "sandbox_died",
            Code::GuestUnresponsive => E2B_GUEST_UNRESPONSIVE,
        }
    }

    /// Its HTTP status.
    pub const fn status(self) -> u16 {
        match self {
            Code::InvalidRequest => 400,
            Code::Unauthorized => 401,
            Code::Forbidden => 403,
            Code::NotFound => 404,
            Code::MethodNotAllowed => 405,
            Code::Conflict | Code::TemplateNameTaken | Code::NameReserved | Code::InvalidState => {
                409
            }
            Code::GuestUnresponsive => 409,
            Code::TooLarge => 413,
            Code::InternalError => 500,
            Code::NotImplemented => 501,
            Code::AgentError | Code::SandboxDied => 502,
            Code::HostUnavailable | Code::NoHostsAvailable | Code::Draining => 503,
            Code::NoSpace | Code::HostDiskFull => 507,
        }
    }
}

/// Why a request was not fulfilled.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: Code,
    /// For people: what, to what, and what to do.
    pub message: String,
    /// More for programs, beside `code` and `message`.
    pub details: Map<String, Value>,
    /// E2B's own word for it.
    pub e2b: Option<&'static str>,
}

impl Failure {
    /// A failure with its two texts.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Failure {
            code,
            message: message.into(),
            details: Map::new(),
            e2b: None,
        }
    }

    /// The request itself is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Failure::new(Code::InvalidRequest, message)
    }

    /// There is nothing of that name.
    pub fn not_found(message: impl Into<String>) -> Self {
        Failure::new(Code::NotFound, message)
    }

    /// Adds something for programs.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.details.insert(key.to_owned(), value.into());
        self
    }

    /// Adds the state that the sandbox is in, where a state is what is wrong.
    pub(crate) fn in_state(self, state: SandboxState) -> Self {
        match self.code {
            Code::InvalidState if !self.details.contains_key("state") => {
                self.with("state", state.as_str())
            }
            _ => self,
        }
    }

    /// Adds E2B's word.
    pub fn with_e2b(mut self, word: &'static str) -> Self {
        self.e2b = Some(word);
        self
    }
}

/// An error with all its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let more = e.to_string();
        // Some libraries repeat their cause in their own text.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = e.source();
    }
    text
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        tracing::error!(error = %chain(&error), "the database failed");
        if error.is_disk_full() {
            return Failure::new(
                Code::HostDiskFull,
                "the disk of the server's database is full: make room, and ask again",
            );
        }
        Failure::new(
            Code::InternalError,
            "the server's database failed; its log says why",
        )
    }
}

impl From<crate::host::Garbled> for Failure {
    fn from(error: crate::host::Garbled) -> Self {
        tracing::error!(%error, "the host agent is not understood");
        Failure::new(Code::AgentError, error.to_string())
    }
}

/// The header in which a host says more than the code does.
const REASON: &str = "wrenn-reason";
/// With [`SANDBOX_DIED`]: the class of the cause, as in a death certificate.
const CAUSE: &str = "wrenn-cause";
/// The host starts nothing.
const DRAINING: &str = "draining";
/// The host's disk is full.
const HOST_DISK_FULL: &str = "host_disk_full";
/// The machine died meanwhile.
const SANDBOX_DIED: &str = "sandbox_died";
/// The guest agent does not answer.
const GUEST_UNRESPONSIVE: &str = "guest_unresponsive";

/// What a host says in a header; at the end of a stream that has begun, in a trailer.
fn said<'a>(error: &'a ConnectError, header: &str) -> Option<&'a str> {
    let headers = error.response_headers().get(header);
    let value = headers.or_else(|| error.trailers().get(header))?;
    value.to_str().ok()
}

/// What the host says of its own, besides the code; with it, the code says nothing more.
pub(super) fn told(error: &ConnectError) -> Option<Code> {
    match said(error, REASON)? {
        DRAINING => Some(Code::Draining),
        HOST_DISK_FULL => Some(Code::HostDiskFull),
        SANDBOX_DIED => Some(Code::SandboxDied),
        GUEST_UNRESPONSIVE => Some(Code::GuestUnresponsive),
        _ => None,
    }
}

/// The host's error about one of several things that one request was about.
pub(super) fn error_of_one(message: String, reason: &str) -> ConnectError {
    let mut error = match reason {
        "no_capacity" | HOST_DISK_FULL => ConnectError::resource_exhausted(message),
        _ => ConnectError::internal(message),
    };
    if let Ok(reason) = http::HeaderValue::from_str(reason) {
        error.response_headers_mut().insert(REASON, reason);
    }
    error
}

/// What the host agent's refusal means to a client. The agent's messages name the thing, so they
/// are passed on.
impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let code = told(&error).unwrap_or(match error.code {
            ErrorCode::InvalidArgument | ErrorCode::OutOfRange => Code::InvalidRequest,
            // The host vouches for itself: what is not permitted is so for the guest's user.
            ErrorCode::PermissionDenied => Code::Forbidden,
            ErrorCode::NotFound => Code::NotFound,
            ErrorCode::AlreadyExists => Code::Conflict,
            ErrorCode::FailedPrecondition | ErrorCode::Aborted => Code::InvalidState,
            ErrorCode::ResourceExhausted => Code::NoHostsAvailable,
            ErrorCode::Unavailable => Code::HostUnavailable,
            ErrorCode::Unimplemented => Code::NotImplemented,
            _ => Code::AgentError,
        });
        let message = match &error.message {
            Some(message) if !message.is_empty() => message.clone(),
            _ => format!("the host agent answered `{}`", error.code.as_str()),
        };
        match code {
            Code::AgentError => tracing::warn!(error = %chain(&error), "the host agent failed"),
            // Said once, by who looks whether it is there all the time.
            Code::HostUnavailable => {
                tracing::debug!(error = %chain(&error), "the host agent cannot be asked");
            }
            _ => {}
        }
        let failure = Failure::new(code, message);
        match code {
            Code::SandboxDied => {
                let cause = said(&error, CAUSE).unwrap_or_default().to_owned();
                let state = SandboxState::Error.as_str();
                failure.with("cause", cause).with("state", state)
            }
            Code::GuestUnresponsive => failure.with_e2b(E2B_GUEST_UNRESPONSIVE),
            _ => failure,
        }
    }
}
