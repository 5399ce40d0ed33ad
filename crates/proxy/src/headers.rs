//! What of a request and a response may pass between outside and guest.

use http::header::{
    AUTHORIZATION, CONNECTION, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue,
    TRANSFER_ENCODING, UPGRADE,
};
use percent_encoding::percent_decode_str;
use wrenn_types::ApiKey;

/// The guest agent's port.
pub const ENVD_PORT: u16 = 49983;

/// Cookies of the platform begin with this.
pub const PLATFORM_COOKIE: &str = "wrenn_";

/// Headers that carry a credential for the platform or for the proxy itself, never for a guest.
const PLATFORM: [&str; 5] = [
    "x-api-key",
    "x-admin-token",
    "x-team-id",
    "e2b-traffic-access-token",
    "proxy-authorization",
];

/// Headers about one connection, not about the message (RFC 9110, 7.6.1).
const HOP_BY_HOP: [&str; 7] = [
    "keep-alive",
    "proxy-authenticate",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Routes of the guest agent that only the host may call, by their first segment.
const HOST_ROUTES: [&str; 8] = [
    "init", "snapshot", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "upgrade",
];

/// Whether a path of the guest agent is one for the host alone, however it is spelled.
pub(crate) fn is_host_route(path: &str) -> bool {
    // Whoever decodes twice must not be led around this, so it is decoded until nothing changes.
    let mut path = path.to_owned();
    loop {
        let decoded = percent_decode_str(&path).decode_utf8_lossy().into_owned();
        if decoded == path {
            break;
        }
        path = decoded;
    }
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split(['/', '\\']) {
        // What follows a NUL, `;` or `?` is not part of a name, whoever looks at it.
        let name = segment
            .split(['\0', ';', '?', '#'])
            .next()
            .unwrap_or_default()
            .trim();
        match name {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            name => segments.push(name),
        }
    }
    segments
        .first()
        .is_some_and(|first| HOST_ROUTES.iter().any(|r| r.eq_ignore_ascii_case(first)))
}

/// The protocol a request wants to switch to, if it does (RFC 9110, 7.8).
pub(crate) fn wants_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .any(|option| option.trim().eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| asked).cloned()
}

/// Takes out what is about one connection: the fixed list and what `Connection` names.
pub(crate) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        // A client must not have the host name dropped that way.
        if name != HOST {
            headers.remove(name);
        }
    }
    headers.remove(CONNECTION);
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Cleans a request's headers for a guest: nothing about this connection, and no credential of
/// the platform.
pub(crate) fn clean_request(headers: &mut HeaderMap) {
    // Before anything is cut out, so that it does not matter what `Connection` names.
    for name in PLATFORM {
        headers.remove(name);
    }
    if headers
        .get_all(AUTHORIZATION)
        .iter()
        .any(is_platform_authorization)
    {
        headers.remove(AUTHORIZATION);
    }
    clean_cookies(headers);
    // This side answers it by itself.
    headers.remove(EXPECT);
    remove_hop_by_hop(headers);
    debug_assert!(!headers.contains_key(TRANSFER_ENCODING));
}

/// Whether an `Authorization` holds an API key, as bearer or as part of basic credentials. A guest's own
/// tokens pass.
fn is_platform_authorization(value: &HeaderValue) -> bool {
    let Ok(text) = value.to_str() else {
        return false;
    };
    let Some((scheme, credentials)) = text.trim().split_once(' ') else {
        return text.trim().parse::<ApiKey>().is_ok();
    };
    let credentials = credentials.trim();
    if scheme.eq_ignore_ascii_case("basic") {
        return decode_base64(credentials)
            .is_some_and(|plain| plain.split(':').any(|part| part.parse::<ApiKey>().is_ok()));
    }
    credentials.parse::<ApiKey>().is_ok()
}

/// Basic credentials as text; lenient, since a guest may be too.
fn decode_base64(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0u32, 0);
    for c in text.bytes().filter(|c| *c != b'=') {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    String::from_utf8(bytes).ok()
}

/// Takes the platform's cookies out and leaves the guest's.
fn clean_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<HeaderValue> = headers.get_all(COOKIE).iter().cloned().collect();
    let is_platform = |c: &[u8]| {
        c.trim_ascii()
            .to_ascii_lowercase()
            .starts_with(PLATFORM_COOKIE.as_bytes())
    };
    if !cookies
        .iter()
        .any(|v| v.as_bytes().split(|b| *b == b';').any(is_platform))
    {
        return;
    }
    headers.remove(COOKIE);
    for value in cookies {
        let kept: Vec<&[u8]> = value
            .as_bytes()
            .split(|b| *b == b';')
            .filter(|c| !is_platform(c))
            .map(<[u8]>::trim_ascii)
            .collect();
        if let Ok(value) = HeaderValue::from_bytes(&kept.join(&b"; "[..]))
            && !value.is_empty()
        {
            headers.append(COOKIE, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_routes_are_found_however_they_are_spelled() {
        for path in [
            "/init",
            "/init/",
            "//init",
            "/./init",
            "/x/../init",
            "/%69nit",
            "/%2569nit",
            "/snapshot/prepare",
            "/snapshot",
            "/INIT",
            "/init;x",
            "/%2e/init",
            "/..%2finit",
            "/freeze",
            "/fsthaw",
            "\\init",
            "/ init",
        ] {
            assert!(is_host_route(path), "{path}");
        }
        for path in [
            "/",
            "/health",
            "/files",
            "/initial",
            "/process.Process/Start",
            "/x/init",
        ] {
            assert!(!is_host_route(path), "{path}");
        }
    }

    #[test]
    fn g37_platform_credentials_are_taken_out_and_others_stay() {
        let key = ApiKey::generate().unwrap();
        let mut headers = HeaderMap::new();
        let mut add = |name: &'static str, value: &str| {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        };
        add("x-api-key", &key.reveal());
        add("connection", "x-mine, host, close");
        add("x-mine", "hop");
        add("host", "h");
        add("cookie", "a=1; wrenn_session=secret; b=2");
        add("cookie", "Wrenn_csrf=x");
        add("authorization", &format!("bearer {}", key.reveal_e2b()));
        add("x-access-token", "for envd");
        clean_request(&mut headers);
        let mut left: Vec<String> = headers
            .iter()
            .map(|(n, v)| format!("{n}: {}", v.to_str().unwrap()))
            .collect();
        left.sort();
        assert_eq!(
            left,
            ["cookie: a=1; b=2", "host: h", "x-access-token: for envd"]
        );
    }

    #[test]
    fn g37_a_guests_own_authorization_stays() {
        let key = ApiKey::generate().unwrap();
        // "user:" and "user:" with the key, in Base64 without padding.
        for (value, stays) in [
            ("Bearer ey.j.wt".to_owned(), true),
            ("Basic dXNlcjo=".to_owned(), true),
            (format!("Bearer {}", key.reveal()), false),
            (key.reveal(), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, HeaderValue::from_str(&value).unwrap());
            clean_request(&mut headers);
            assert_eq!(headers.contains_key(AUTHORIZATION), stays, "{value}");
        }
        assert_eq!(decode_base64("dXNlcjo=").as_deref(), Some("user:"));
    }
}
