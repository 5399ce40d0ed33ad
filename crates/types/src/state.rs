//! The states of a sandbox, in the words of the native API.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! states {
    ($($(#[$doc:meta])* $variant:ident = $word:literal,)*) => {
        /// Where a sandbox is in its life. Words ending in "-ing" are transitional: the
        /// owner of the sandbox is at work and will leave them by itself.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum SandboxState { $($(#[$doc])* $variant,)* }

        impl SandboxState {
            /// All of them, in the order of a life.
            pub const ALL: &'static [SandboxState] = &[$(SandboxState::$variant,)*];

            /// The word on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(SandboxState::$variant => $word,)* }
            }
        }

        impl FromStr for SandboxState {
            type Err = UnknownState;
            fn from_str(word: &str) -> Result<Self, UnknownState> {
                match word {
                    $($word => Ok(SandboxState::$variant),)*
                    _ => Err(UnknownState(word.to_owned())),
                }
            }
        }
    };
}

states! {
    /// Accepted, not yet given to a host.
    Pending = "pending",
    /// A host restores its machine.
    Starting = "starting",
    /// Ready for use.
    Running = "running",
    /// Being frozen and saved.
    Pausing = "pausing",
    /// Saved; holds nothing but disk.
    Paused = "paused",
    /// Saved while it runs on.
    Snapshotting = "snapshotting",
    /// Being restored from its save.
    Resuming = "resuming",
    /// Being ended.
    Stopping = "stopping",
    /// Ended; everything was given back.
    Stopped = "stopped",
    /// Its host is away, so nobody knows.
    Missing = "missing",
    /// It failed; the reason is kept with it.
    Error = "error",
}

impl SandboxState {
    /// Whether its owner is at work and will leave this state without being asked.
    pub const fn is_transitional(self) -> bool {
        use SandboxState::*;
        match self {
            Pending | Starting | Pausing | Snapshotting | Resuming | Stopping => true,
            Running | Paused | Stopped | Missing | Error => false,
        }
    }

    /// Whether it is over for good.
    pub const fn is_final(self) -> bool {
        matches!(self, SandboxState::Stopped | SandboxState::Error)
    }

    /// The one of two words that E2B's clients know, or `None` for a sandbox they must
    /// not see.
    pub const fn as_e2b(self) -> Option<&'static str> {
        use SandboxState::*;
        match self {
            Running | Snapshotting | Pausing => Some("running"),
            Paused | Resuming => Some("paused"),
            Pending | Starting | Stopping | Stopped | Missing | Error => None,
        }
    }
}

impl fmt::Display for SandboxState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no state of a sandbox")]
pub struct UnknownState(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for state in SandboxState::ALL {
            assert_eq!(state.as_str().parse(), Ok(*state));
            let json = serde_json::to_string(state).expect("a state is a word");
            assert_eq!(json, format!("\"{state}\""));
        }
        assert!("running ".parse::<SandboxState>().is_err());
    }
}
