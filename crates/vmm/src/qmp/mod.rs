//! A client of QEMU's control protocol, QMP: JSON objects, one per line, over a Unix socket.
//!
//! One task reads: it gives each reply to the command that waits for it (matched by id, so
//! that a command that timed out cannot shift the answers of the next ones), and publishes
//! what events say about the machine. Protocol: QEMU's `docs/interop/qmp-spec.txt`.

mod client;
mod message;

pub(crate) use client::{Migration, Qmp};
pub use message::QmpError;
