//! The control plane over real connections, on a host without machines. One program, as each
//! that is linked takes as long to be linked as all of these tests to be compiled.

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
