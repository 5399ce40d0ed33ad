//! Traffic from outside to ports inside sandboxes.
//!
//! ```text
//! request ──Proxy::target──▶ Target{sandbox, port} ──Proxy::handle──▶ pool ──Dial──▶ guest
//!    │                                                 │
//!    └ none: the API's own request                      └ headers cleaned, bodies streamed,
//!                                                         upgrades tunnelled
//! ```
//!
//! A request names its sandbox by the host `{port}-{sandbox}.{domain}`, or, where there is no
//! wildcard name, by the headers that E2B's clients send. Nothing is buffered in either
//! direction. Connections into a guest are kept alive and shared by requests to the same port;
//! [`Proxy::forget`] ends all of a sandbox's at once.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod answer;
mod body;
mod dial;
mod headers;
mod pool;
mod proxy;
mod target;

pub use dial::{Dial, DialError, GuestIo, GuestStream};
pub use headers::{ENVD_PORT, PLATFORM_COOKIE};
pub use proxy::{Activity, Proxy};
pub use target::{PORT_HEADER, SANDBOX_HEADER, Target, TargetError};
