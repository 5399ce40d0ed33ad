//! What the end-to-end tests stand on: the real `wrenn` binary as a server and as a
//! client, an HTTP client that looks at every answer, and a picture of the host that
//! shows what was left behind.
//!
//! Everything here reports by panicking: in a test the panic is the report.

mod api;
mod cli;
mod host_state;
mod paths;
mod server;

pub use api::{Answer, Api};
pub use cli::{Cli, Ran};
pub use host_state::HostState;
pub use paths::{data_root, repository, wrenn_binary};
pub use server::{Server, free_address};

use std::future::Future;
use std::time::{Duration, Instant};

/// Asks again and again until `probe` gives something, and fails with `what` when
/// `patience` is over.
pub async fn eventually<T, F, P>(what: &str, patience: Duration, mut probe: P) -> T
where
    F: Future<Output = Option<T>>,
    P: FnMut() -> F,
{
    let start = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(
            start.elapsed() < patience,
            "{what}: not within {patience:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Bytes without a pattern that a compressor or a block-wise copy could hide behind, the
/// same for the same seed (xorshift64*).
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// SHA-256 in hexadecimal, as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(bytes))
}
