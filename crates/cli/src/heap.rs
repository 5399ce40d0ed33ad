//! Keeps a server small: memory that it has freed goes back to the system.
//!
//! The C library keeps what is freed, for each of its arenas, and a server would have as many of
//! those as it had threads at its busiest: after a burst of creates, or an image built, three
//! quarters of its memory were free (measured) and would stay its own for weeks.
#![allow(unsafe_code)]

use std::fs;
use std::time::Duration;

/// How often is looked whether there may be something to give back.
const EVERY: Duration = Duration::from_secs(10);
/// In less growth than this, in bytes, nothing is looked for.
const WORTH_IT: u64 = 512 << 10;

/// Arenas that threads share: as many as work at the same time on a small host. What a server does
/// is to wait for others.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;

/// To be called before there are threads.
#[cfg(target_env = "gnu")]
pub(crate) fn share_arenas() {
    // SAFETY: mallopt takes numbers and is called while this process has one thread.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    if set != 1 {
        tracing::debug!("the number of arenas could not be limited");
    }
}

/// Other C libraries have none.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn share_arenas() {}

/// Gives back what is freed, for as long as it is polled.
pub(crate) async fn keep_small() {
    let mut least = 0;
    loop {
        tokio::time::sleep(EVERY).await;
        // What cannot be read cannot have grown.
        let now = own_bytes().unwrap_or(0);
        if now >= least + WORTH_IT {
            // It holds the locks of the arenas, each for a moment.
            let given_back = tokio::task::spawn_blocking(give_back).await;
            least = own_bytes().unwrap_or(0);
            tracing::debug!(
                before = now,
                after = least,
                ok = given_back.is_ok(),
                "memory given back"
            );
        }
        least = least.min(now);
    }
}

/// Bytes of this process's memory that no file is behind.
fn own_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let mut pages = text.split_whitespace().skip(1).map(str::parse::<u64>);
    let (resident, shared) = (pages.next()?.ok()?, pages.next()?.ok()?);
    Some(resident.saturating_sub(shared) * rustix::param::page_size() as u64)
}

#[cfg(target_env = "gnu")]
fn give_back() {
    // SAFETY: malloc_trim takes a number, may be called from any thread at any time, and leaves
    // everything that is allocated where it is.
    unsafe { libc::malloc_trim(0) };
}

/// Other C libraries give back by themselves.
#[cfg(not(target_env = "gnu"))]
fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_freed_is_given_back() {
        // Small pieces, which the C library does not take from the system one by one; every one
        // in a hundred stays.
        let mut pieces: Vec<Vec<u8>> = (0..400_000).map(|_| vec![1; 100]).collect();
        let full = own_bytes().unwrap();
        let mut n = 0;
        pieces.retain(|_| {
            n += 1;
            n % 4000 == 0
        });
        give_back();
        let trimmed = own_bytes().unwrap();
        assert!(trimmed + (20 << 20) < full, "{full} to {trimmed}");
        drop(pieces);
    }
}
