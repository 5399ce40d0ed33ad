//! The generated RPC code of the project, and nothing else.
//!
//! - [`process`] and [`filesystem`]: the guest agent's services, as E2B's clients speak them;
//! - [`wrenn::host::v1`]: what the control plane asks of a host agent.
//!
//! Generated types stay at the borders: each crate turns them into its own at once.
#![allow(missing_docs, clippy::all, clippy::unwrap_used, rustdoc::all)]

connectrpc::include_generated!();
