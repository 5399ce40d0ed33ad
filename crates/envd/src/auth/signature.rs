//! Signed file addresses: `v1_` and base64 without padding of
//! SHA-256(`path:operation:user:token[:expiration]`).

use base64::Engine;
use base64::prelude::BASE64_STANDARD_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{AccessToken, AuthError};

/// What a signature allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Downloading.
    Read,
    /// Uploading.
    Write,
}

impl Operation {
    fn as_str(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

/// The query's `signature` and `signature_expiration` as they came.
#[derive(Debug, Clone, Copy, Default)]
pub struct Signature<'a> {
    /// `v1_…`.
    pub value: Option<&'a str>,
    /// Unix time in seconds, as text.
    pub expiration: Option<&'a str>,
}

/// The signature for an operation on `path` (exactly as the query has it) by `username`
/// (empty where the query has none).
pub fn sign(
    token: &AccessToken,
    operation: Operation,
    path: &str,
    username: &str,
    expiration: Option<i64>,
) -> String {
    let mut hash = Sha256::new();
    for part in [
        path,
        ":",
        operation.as_str(),
        ":",
        username,
        ":",
        token.reveal(),
    ] {
        hash.update(part);
    }
    if let Some(expiration) = expiration {
        hash.update(format!(":{expiration}"));
    }
    format!("v1_{}", BASE64_STANDARD_NO_PAD.encode(hash.finalize()))
}

pub(super) fn verify(
    token: &AccessToken,
    operation: Operation,
    path: &str,
    username: &str,
    signature: Signature<'_>,
    now: i64,
) -> Result<(), AuthError> {
    let given = signature.value.ok_or(AuthError::SignatureMissing)?;
    let expiration = match signature.expiration.filter(|e| !e.is_empty()) {
        // A number we cannot read was not signed by us in that form.
        Some(text) => Some(
            text.parse::<i64>()
                .map_err(|_| AuthError::SignatureInvalid)?,
        ),
        None => None,
    };
    let expected = sign(token, operation, path, username, expiration);
    // Clients differ in whether they strip the padding.
    let given = given.trim_end_matches('=');
    if !bool::from(expected.as_bytes().ct_eq(given.as_bytes())) {
        return Err(AuthError::SignatureInvalid);
    }
    match expiration {
        Some(at) if at < now => Err(AuthError::SignatureExpired),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sig: &str, exp: Option<&str>, op: Operation, user: &str) -> Result<(), AuthError> {
        let token = AccessToken::new("tok".into()).unwrap();
        let signature = Signature {
            value: Some(sig),
            expiration: exp,
        };
        verify(&token, op, "/a b", user, signature, 1_000)
    }

    #[test]
    fn g33_a_signature_opens_what_it_was_made_for_until_it_expires() {
        let token = AccessToken::new("tok".into()).unwrap();
        let plain = sign(&token, Operation::Read, "/a b", "", None);
        assert_eq!(
            plain,
            format!(
                "v1_{}",
                BASE64_STANDARD_NO_PAD.encode(Sha256::digest("/a b:read::tok"))
            )
        );
        assert!(check(&plain, None, Operation::Read, "").is_ok());
        assert!(check(&format!("{plain}="), None, Operation::Read, "").is_ok());
        for (op, user, exp) in [
            (Operation::Write, "", None),
            (Operation::Read, "root", None),
            (Operation::Read, "", Some("2000")),
            (Operation::Read, "", Some("x")),
        ] {
            let error = check(&plain, exp, op, user).unwrap_err();
            assert_eq!(error.to_string(), "invalid signature");
        }
        let timed = sign(&token, Operation::Read, "/a b", "", Some(999));
        let error = check(&timed, Some("999"), Operation::Read, "").unwrap_err();
        assert_eq!(error.to_string(), "signature is already expired");
        let timed = sign(&token, Operation::Read, "/a b", "", Some(1_000));
        assert!(check(&timed, Some("1000"), Operation::Read, "").is_ok());
        let none = verify(&token, Operation::Read, "/", "", Signature::default(), 0).unwrap_err();
        assert_eq!(none.to_string(), "missing signature query parameter");
    }
}
