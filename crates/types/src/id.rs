//! Typed ids: a UUIDv7 inside, `{prefix}-{uuid}` outside.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Why a text is not an id of the kind that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is not a {kind} id: expected `{prefix}-` and a UUID, such as `{prefix}-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00`"
)]
pub struct IdError {
    kind: &'static str,
    prefix: &'static str,
    given: String,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// Ordered by the time of its making (UUIDv7, RFC 9562).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Uuid);

        impl $name {
            /// The text before the dash.
            pub const PREFIX: &'static str = $prefix;

            /// A new id, unlike any other.
            #[allow(clippy::new_without_default, reason = "a random value is no default")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// The id that wraps this UUID; for the store, which keeps the bare UUID.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The bare UUID.
            pub const fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0.hyphenated())
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            /// Accepts the outside form only: the prefix, a dash, and the UUID in its
            /// hyphenated lower-case form, so that one id has one spelling.
            fn from_str(text: &str) -> Result<Self, IdError> {
                let wrong = || IdError {
                    kind: $kind,
                    prefix: $prefix,
                    // What a stranger sent is shown, but not at any length.
                    given: text.chars().take(80).collect(),
                };
                let bare = text.strip_prefix(concat!($prefix, "-")).ok_or_else(wrong)?;
                let uuid = Uuid::try_parse(bare).map_err(|_| wrong())?;
                if uuid.hyphenated().to_string() != bare {
                    return Err(wrong());
                }
                Ok(Self(uuid))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    )*};
}

ids! {
    /// A sandbox.
    SandboxId, "sandbox", "sb";
    /// A person's account.
    UserId, "user", "usr";
    /// A team: what owns sandboxes, templates and keys.
    TeamId, "team", "team";
    /// An API key; not the key itself.
    KeyId, "API key", "key";
    /// A machine that runs sandboxes.
    HostId, "host", "host";
    /// A template: a frozen machine that sandboxes start from.
    TemplateId, "template", "tpl";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_id_has_one_spelling() {
        let id = SandboxId::new();
        let text = id.to_string();
        assert_eq!(text.len(), "sb-".len() + 36);
        assert_eq!(text.parse::<SandboxId>(), Ok(id));
        assert!(text.to_uppercase().parse::<SandboxId>().is_err());
        assert!(text.replace('-', "").parse::<SandboxId>().is_err());
        assert!(text.replace("sb-", "usr-").parse::<SandboxId>().is_err());
        assert!(format!("{text} ").parse::<SandboxId>().is_err());
    }

    #[test]
    fn ids_sort_by_age() {
        let older = SandboxId::new();
        let newer = SandboxId::new();
        assert!(older < newer);
    }

    proptest! {
        #[test]
        fn no_text_panics_or_is_read_as_another_id(text in ".*") {
            if let Ok(id) = text.parse::<SandboxId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
