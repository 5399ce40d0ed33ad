//! What counts as use of a sandbox: a request moves the moment of last use, and an open
//! stream, terminal, transfer or proxied connection is use for as long as it is open.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970; negative before.
pub fn unix_ms(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
    }
}

/// The moment so many milliseconds after 1970; what the clock cannot hold becomes 1970.
pub fn from_unix_ms(ms: i64) -> SystemTime {
    let span = Duration::from_millis(ms.unsigned_abs());
    let time = if ms >= 0 {
        UNIX_EPOCH.checked_add(span)
    } else {
        UNIX_EPOCH.checked_sub(span)
    };
    time.unwrap_or(UNIX_EPOCH)
}

/// When a sandbox was last used, and how many uses are open.
#[derive(Debug)]
pub struct Activity {
    last_ms: AtomicI64,
    open: AtomicUsize,
}

impl Activity {
    /// Last used at `time`.
    pub fn since(time: SystemTime) -> Arc<Self> {
        Arc::new(Activity {
            last_ms: AtomicI64::new(unix_ms(time)),
            open: AtomicUsize::new(0),
        })
    }

    /// The moment of last use: now, while a use is open.
    pub fn last(&self) -> SystemTime {
        if self.open.load(Ordering::Acquire) > 0 {
            return SystemTime::now();
        }
        from_unix_ms(self.last_ms.load(Ordering::Acquire))
    }

    /// Used now.
    pub fn touch(&self) {
        self.last_ms
            .fetch_max(unix_ms(SystemTime::now()), Ordering::AcqRel);
    }

    /// In use until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> InUse {
        self.open.fetch_add(1, Ordering::AcqRel);
        InUse(self.clone())
    }
}

/// A use that lasts; see [`Activity::begin`].
#[derive(Debug)]
pub struct InUse(Arc<Activity>);

impl Drop for InUse {
    fn drop(&mut self) {
        // First the moment, then the count: a reader in between sees "now" either way.
        self.0.touch();
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g09_an_open_stream_is_use_until_it_ends() {
        let activity = Activity::since(UNIX_EPOCH);
        assert_eq!(activity.last(), UNIX_EPOCH);
        let stream = activity.begin();
        assert!(activity.last() > UNIX_EPOCH + Duration::from_secs(1));
        drop(stream);
        let ended = activity.last();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(activity.last(), ended, "after the end the clock stands");
    }

    #[test]
    fn times_survive_the_wire() {
        for ms in [0, 1, -1, 1_700_000_000_000] {
            assert_eq!(unix_ms(from_unix_ms(ms)), ms);
        }
        assert_eq!(from_unix_ms(i64::MIN + 1), from_unix_ms(i64::MIN + 1));
    }
}
