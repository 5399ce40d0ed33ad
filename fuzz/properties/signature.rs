//! Signed addresses: nothing opens a file but the signature that was made for it.

use std::sync::{Arc, LazyLock};

use axum::http::{HeaderMap, HeaderValue};
use wrenn_envd::auth::{AccessToken, Operation, Signature, TOKEN_HEADER, sign, signature_allows};
use wrenn_envd::cgroups::Cgroups;
use wrenn_envd::state::{Config, Settings, State};

const TOKEN: &str = "the-token";

static STATE: LazyLock<Arc<State>> = LazyLock::new(|| {
    let state = State::new(
        Settings {
            in_vm: false,
            port: 0,
            default_user: "user".into(),
            child_open_files: None,
        },
        Cgroups::none(),
        None,
    );
    state.set_config(Config {
        access_token: AccessToken::new(TOKEN.into()),
        initialised: true,
        ..Config::default()
    });
    state
});

/// A line each: path, user, signature, expiration, now, token, and whether it is an upload.
pub fn check(data: &[u8]) {
    let Ok(data) = std::str::from_utf8(data) else {
        return;
    };
    let mut lines = data
        .split('\n')
        .map(|line| Some(line).filter(|line| !line.is_empty()));
    let mut next = || lines.next().flatten();
    let (path, user) = (next().unwrap_or_default(), next().unwrap_or_default());
    let (value, expiration) = (next(), next());
    let now: i64 = next().and_then(|text| text.parse().ok()).unwrap_or(1000);
    let header = next();
    let write = next().is_some();
    let operation = if write {
        Operation::Write
    } else {
        Operation::Read
    };
    let mut headers = HeaderMap::new();
    if let Some(value) = header.and_then(|value| HeaderValue::from_str(value).ok()) {
        headers.insert(TOKEN_HEADER, value);
    }
    let allows = |headers: &HeaderMap, operation, path: &str, signature| {
        signature_allows(&STATE, headers, operation, path, user, signature, now).is_ok()
    };
    let given = Signature { value, expiration };
    let has_token = headers
        .get(TOKEN_HEADER)
        .is_some_and(|v| v.as_bytes() == TOKEN.as_bytes());
    if headers.contains_key(TOKEN_HEADER) {
        assert_eq!(allows(&headers, operation, path, given), has_token);
        return;
    }
    let time = expiration
        .filter(|text| !text.is_empty())
        .map(|text| text.parse::<i64>());
    let token = AccessToken::new(TOKEN.into()).expect("a token");
    // What somebody made up does not open it; libFuzzer does not guess SHA-256.
    let readable = match time {
        None => Some(None),
        Some(Ok(time)) => Some(Some(time)),
        Some(Err(_)) => None,
    };
    let Some(time) = readable else {
        assert!(!allows(&headers, operation, path, given));
        return;
    };
    let right = sign(&token, operation, path, user, time);
    let is_right = value.is_some_and(|value| value.trim_end_matches('=') == right);
    let in_time = time.is_none_or(|time| time >= now);
    assert_eq!(
        allows(&headers, operation, path, given),
        is_right && in_time
    );
    // The right one does, for this file, this operation and this time.
    let right = Signature {
        value: Some(&right),
        expiration,
    };
    assert_eq!(allows(&headers, operation, path, right), in_time);
    let other = if write {
        Operation::Read
    } else {
        Operation::Write
    };
    assert!(!allows(&headers, other, path, right));
    assert!(!allows(&headers, operation, &format!("{path}/x"), right));
}
