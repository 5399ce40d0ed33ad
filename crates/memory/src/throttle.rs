//! How fast data is copied that nobody asked for.

use std::time::{Duration, Instant};

/// What may be copied at once after a pause, as a part of a second's worth.
const BURST: Duration = Duration::from_millis(20);

/// Counts what was copied against what the rate allows. Time is passed in.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// When what was copied so far is paid for.
    paid: Instant,
}

impl Throttle {
    pub(crate) fn new(now: Instant) -> Throttle {
        Throttle { paid: now }
    }

    /// How long to wait before copying more; `None`: not at all.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        let wait = self.paid.checked_duration_since(now + BURST)?;
        (!wait.is_zero()).then_some(wait)
    }

    /// Notes that `bytes` were copied at a rate of `rate` bytes per second, 0 for no limit.
    pub(crate) fn spend(&mut self, now: Instant, bytes: u64, rate: u64) {
        // Pauses are not saved up.
        self.paid = self.paid.max(now);
        if rate > 0 {
            // A slice is at most some MiB, so this is exact enough, and even 1 byte per
            // second gives a time that can be added.
            self.paid += Duration::from_secs_f64(bytes as f64 / rate as f64);
        }
    }

    /// Forgets what was copied, when the rate changes.
    pub(crate) fn reset(&mut self, now: Instant) {
        self.paid = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_any_time_and_pauses_are_not_saved_up() {
        let start = Instant::now();
        let mut throttle = Throttle::new(start);
        let (mut now, mut copied) = (start, 0u64);
        let rate = 10 << 20;
        while now < start + Duration::from_secs(3) {
            match throttle.wait(now) {
                Some(wait) => now += wait,
                None => {
                    throttle.spend(now, 64 << 10, rate);
                    copied += 64 << 10;
                }
            }
        }
        let expected = 3.0 * rate as f64;
        assert!((copied as f64 / expected - 1.0).abs() < 0.02, "{copied}");
        // After a pause no more than the burst at once.
        now += Duration::from_secs(100);
        let mut at_once = 0;
        while throttle.wait(now).is_none() {
            throttle.spend(now, 64 << 10, rate);
            at_once += 64 << 10;
        }
        assert!(at_once <= rate / 50 + (64 << 10), "{at_once}");
    }

    #[test]
    fn without_a_limit_there_is_no_wait_and_the_lowest_is_no_overflow() {
        let now = Instant::now();
        let mut throttle = Throttle::new(now);
        throttle.spend(now, u64::MAX >> 20, 0);
        assert_eq!(throttle.wait(now), None);
        throttle.spend(now, 1 << 20, 1);
        assert!(throttle.wait(now).unwrap() > Duration::from_secs(1_000_000));
        throttle.reset(now);
        assert_eq!(throttle.wait(now), None);
    }
}
