//! Two clocks of life: an inactivity limit and an absolute end, either, both or none.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use wrenn_wire::wrenn::host::v1 as rpc;

use crate::activity::{from_unix_ms, unix_ms};

/// When a sandbox expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Lifetime {
    /// So long without use, and it is over.
    pub idle: Option<Duration>,
    /// At this moment it is over, used or not.
    pub end_at: Option<SystemTime>,
}

impl Lifetime {
    /// The moment it expires when it was last used at `last_active` and nothing changes.
    pub fn deadline(&self, last_active: SystemTime) -> Option<SystemTime> {
        // A limit beyond what the clock can hold is no limit.
        let idle = self.idle.and_then(|limit| last_active.checked_add(limit));
        match (idle, self.end_at) {
            (Some(idle), Some(end)) => Some(idle.min(end)),
            (one, other) => one.or(other),
        }
    }
}

impl From<&rpc::Lifetime> for Lifetime {
    fn from(wire: &rpc::Lifetime) -> Self {
        Lifetime {
            idle: (wire.idle_timeout_secs != 0)
                .then(|| Duration::from_secs(wire.idle_timeout_secs.into())),
            end_at: (wire.end_at_unix_ms != 0).then(|| from_unix_ms(wire.end_at_unix_ms)),
        }
    }
}

impl From<Lifetime> for rpc::Lifetime {
    fn from(lifetime: Lifetime) -> Self {
        rpc::Lifetime {
            idle_timeout_secs: lifetime
                .idle
                .map_or(0, |idle| u32::try_from(idle.as_secs()).unwrap_or(u32::MAX)),
            end_at_unix_ms: lifetime.end_at.map_or(0, unix_ms),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(secs: u64) -> SystemTime {
        T0 + Duration::from_secs(secs)
    }

    #[test]
    fn g09_the_earlier_of_the_two_clocks_counts() {
        let idle = Some(Duration::from_secs(10));
        let both = Lifetime {
            idle,
            end_at: Some(at(100)),
        };
        assert_eq!(
            both.deadline(at(20)),
            Some(at(30)),
            "use moves the idle limit"
        );
        assert_eq!(
            both.deadline(at(95)),
            Some(at(100)),
            "use never moves the absolute end"
        );
        assert_eq!(
            Lifetime { idle, end_at: None }.deadline(at(7)),
            Some(at(17))
        );
        assert_eq!(Lifetime::default().deadline(at(7)), None);
    }

    #[test]
    fn an_endless_limit_is_none() {
        let endless = Lifetime {
            idle: Some(Duration::MAX),
            end_at: None,
        };
        assert_eq!(endless.deadline(at(1)), None);
    }

    #[test]
    fn zero_on_the_wire_means_no_limit() {
        assert_eq!(
            Lifetime::from(&rpc::Lifetime::default()),
            Lifetime::default()
        );
        let limits = Lifetime {
            idle: Some(Duration::from_secs(5)),
            end_at: Some(at(9)),
        };
        assert_eq!(Lifetime::from(&rpc::Lifetime::from(limits)), limits);
    }
}
