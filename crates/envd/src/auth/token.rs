//! The sandbox's access token, as a type that cannot be printed.

use std::fmt;

use sha2::{Digest, Sha512};
use subtle::ConstantTimeEq;

/// The token that requests must carry.
#[derive(Clone)]
pub struct AccessToken(String);

impl AccessToken {
    /// A token as it was given; empty is none.
    pub fn new(text: String) -> Option<Self> {
        (!text.is_empty()).then_some(AccessToken(text))
    }

    /// Whether `given` is this token, in a time that does not tell how much was right.
    pub fn matches(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }

    /// For signatures, which are made from it, and for the agent that follows us.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(…)")
    }
}

/// Whether SHA-512 of `given` is `hash` (hexadecimal, either case).
pub(crate) fn hash_matches(given: &[u8], hash: &str) -> bool {
    let Ok(expected) = hex::decode(hash) else {
        return false;
    };
    Sha512::digest(given)[..].ct_eq(&expected).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn g33_a_token_matches_itself_only_and_does_not_print() {
        let token = AccessToken::new("secret".into()).unwrap();
        assert!(token.matches(b"secret"));
        assert!(!token.matches(b"secre") && !token.matches(b"") && !token.matches(b"secrets"));
        assert!(!format!("{token:?}").contains("secret"));
        assert!(AccessToken::new(String::new()).is_none());
    }

    #[test]
    fn a_hash_matches_its_token() {
        let hash = hex::encode(Sha512::digest(b"secret"));
        assert!(hash_matches(b"secret", &hash) && hash_matches(b"secret", &hash.to_uppercase()));
        assert!(!hash_matches(b"secret", "") && !hash_matches(b"other", &hash));
        assert!(!hash_matches(b"", ""));
    }
}
