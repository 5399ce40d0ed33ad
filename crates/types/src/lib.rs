//! The words every part of Wrenn shares: ids, units, secrets and the states of a sandbox.
//!
//! Pure: no I/O, no clock. A value of these types is valid by construction, so that the
//! code behind the API and RPC borders never sees a malformed id or an impossible shape.

mod id;
mod secret;
mod shape;
mod state;

pub use id::{HostId, IdError, KeyId, SandboxId, TeamId, TemplateId, UserId};
pub use secret::{AccessToken, ApiKey, ApiKeyHash, SecretError};
pub use shape::{MemoryMib, Shape, ShapeError, ShapeLimits, Vcpus};
pub use state::{SandboxState, UnknownState};
