//! All SQL of the project.
//!
//! [`Store`] is the database; its methods are grouped by noun, a file each: teams, API keys,
//! sandboxes, idempotency keys. Stored is what the control plane must know after a restart and
//! cannot ask a host for: who may do what, and which sandboxes should be. Not stored are
//! secrets (keys are hashed; a sandbox's access token stays with its host), environment
//! variables, and whatever changes by itself, such as the time of last use of a sandbox.
//!
//! SQLite, in WAL mode: one connection writes, each transaction begun with `BEGIN IMMEDIATE` so that
//! it never fails half way for the lock; others read beside it. Statements are static text with
//! `$n` parameters, so that PostgreSQL can be put under the same methods.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod db;
mod error;
mod events;
mod idempotency;
mod keys;
mod row;
mod sandboxes;
mod snapshots;
mod teams;
mod time;

pub use db::Store;
pub use error::StoreError;
pub use events::{Death, EventRow, NewEvent};
pub use idempotency::{IDEMPOTENCY_KEEP_MS, Remembered, RequestHash};
pub use keys::{KeyRow, NewKey};
pub use sandboxes::{Change, Inserted, NewSandbox, Page, SandboxFilter, SandboxRow};
pub use snapshots::{Named, NewSnapshot, SnapshotKind, SnapshotPage, SnapshotRow};
pub use teams::Team;
pub use time::Timestamp;
