//! Secrets as types that cannot be printed, compared in constant time.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Why a text is no secret of the kind that was asked for. Never repeats the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Neither `wrn_` nor `e2b_` and 64 hexadecimal digits.
    #[error("not an API key: expected `wrn_` and 64 lower-case hexadecimal digits")]
    ApiKey,
    /// The kernel gave no random bytes.
    #[error("the kernel gave no random bytes: {0}")]
    Random(String),
}

fn random_hex<const N: usize>() -> Result<String, SecretError> {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes).map_err(|e| SecretError::Random(e.to_string()))?;
    Ok(hex::encode(bytes))
}

/// An API key as its holder sends it. Its 256 random bits stand behind `wrn_`, or behind
/// `e2b_` for older E2B clients, which check the prefix; both name the same key.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A new random key.
    pub fn generate() -> Result<Self, SecretError> {
        random_hex::<32>().map(ApiKey)
    }

    /// The form for native clients. The caller takes care where it goes.
    pub fn reveal(&self) -> String {
        format!("wrn_{}", self.0)
    }

    /// The form for E2B's clients.
    pub fn reveal_e2b(&self) -> String {
        format!("e2b_{}", self.0)
    }

    /// The first characters, which tell keys apart in a list or a log without giving
    /// them away.
    pub fn prefix(&self) -> String {
        format!("wrn_{}", &self.0[..8])
    }

    /// What is stored. A key is 256 random bits, so a plain hash cannot be searched.
    pub fn hash(&self) -> ApiKeyHash {
        ApiKeyHash(Sha256::digest(self.0.as_bytes()).into())
    }
}

impl FromStr for ApiKey {
    type Err = SecretError;
    fn from_str(text: &str) -> Result<Self, SecretError> {
        let digits = text
            .strip_prefix("wrn_")
            .or_else(|| text.strip_prefix("e2b_"))
            .ok_or(SecretError::ApiKey)?;
        let is_digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        if digits.len() != 64 || !digits.bytes().all(is_digit) {
            return Err(SecretError::ApiKey);
        }
        Ok(ApiKey(digits.to_owned()))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({}…)", self.prefix())
    }
}

/// SHA-256 of an API key's digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApiKeyHash(pub [u8; 32]);

/// The token a sandbox's guest agent demands: 256 random bits in hexadecimal.
#[derive(Clone)]
pub struct AccessToken(String);

impl AccessToken {
    /// A new random token.
    pub fn generate() -> Result<Self, SecretError> {
        random_hex::<32>().map(AccessToken)
    }

    /// A token that was kept, in the journal or by the guest agent.
    pub fn from_kept(text: String) -> Self {
        AccessToken(text)
    }

    /// The token itself. The caller takes care where it goes.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `given` is this token, in a time that does not tell how much was right.
    pub fn matches(&self, given: &str) -> bool {
        self.0.as_bytes().ct_eq(given.as_bytes()).into()
    }
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_prefixes_name_the_same_key() {
        let key = ApiKey::generate().expect("random bytes");
        let native: ApiKey = key.reveal().parse().expect("our own form");
        let e2b: ApiKey = key.reveal_e2b().parse().expect("E2B's form");
        assert_eq!(native.hash(), e2b.hash());
        for wrong in [
            "",
            "wrn_",
            "wrn_zz",
            &key.reveal()[..20],
            &key.reveal().to_uppercase(),
        ] {
            assert_eq!(wrong.parse::<ApiKey>(), Err(SecretError::ApiKey));
        }
    }

    #[test]
    fn g40_secrets_do_not_print() {
        let key = ApiKey::generate().expect("random bytes");
        let token = AccessToken::generate().expect("random bytes");
        let printed = format!("{key:?} {token:?}");
        assert!(!printed.contains(&key.reveal()[12..]));
        assert!(!printed.contains(token.reveal()));
        assert!(token.matches(token.reveal()));
        assert!(!token.matches("") && !token.matches(&token.reveal()[1..]));
    }
}
