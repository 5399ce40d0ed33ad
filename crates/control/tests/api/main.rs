//! The control plane over real connections, on a host without machines. One program: with all
//! that it serves each has a hundred megabytes, and takes long to be linked.

#![allow(missing_docs, clippy::unwrap_used)]

mod diff;
mod drain;
mod e2b;
mod failures;
mod history;
mod idempotency;
mod native;
mod network;
mod programs;
mod restarts;
mod snapshots;
mod sockets;
mod support;
mod surface;
