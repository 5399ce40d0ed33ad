//! Which sandbox and port a request is for, by its host name or its headers.

use std::net::IpAddr;

use http::header::HOST;
use http::request::Parts;
use wrenn_types::SandboxId;

/// The sandbox, for clients that cannot use the host name.
pub const SANDBOX_HEADER: &str = "e2b-sandbox-id";
/// The port in it.
pub const PORT_HEADER: &str = "e2b-sandbox-port";

/// Length of a sandbox id as text: `sb-` and a hyphenated UUID.
const ID_LEN: usize = 3 + 36;

/// A port in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// The port in it.
    pub port: u16,
}

/// Why a request that is meant for a sandbox names none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The host name begins like a sandbox's, but does not go on so.
    #[error("the host `{0}` is not of the form {{port}}-{{sandbox id}}.{{domain}}")]
    Host(String),
    /// The header is no sandbox id.
    #[error("the header {SANDBOX_HEADER} is no sandbox id: {0}")]
    Id(String),
    /// The header is no port.
    #[error("the header {PORT_HEADER} must be a port from 1 to 65535, not `{0}`")]
    Port(String),
}

/// Whom a request is for: a sandbox, or (`None`) the API itself. `domain` is the one under which
/// sandboxes are reached, with or without a port.
pub fn of(parts: &Parts, domain: &str) -> Option<Result<Target, TargetError>> {
    // HTTP/2 has the host in the URI, HTTP/1.1 in a header.
    let host = match parts.uri.host() {
        Some(host) => host,
        None => without_port(parts.headers.get(HOST)?.to_str().ok()?),
    };
    if let Some(target) = by_host(host) {
        return Some(target);
    }
    by_headers(parts, host, without_port(domain))
}

/// `{port}-{id}` up to the first dot; older clients put more between the id and that dot.
fn by_host(host: &str) -> Option<Result<Target, TargetError>> {
    let (label, domain) = host.split_once('.')?;
    let (port, rest) = label.split_once('-')?;
    if domain.is_empty() || port.is_empty() || !port.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    // Host names have no case.
    let rest = rest.to_ascii_lowercase();
    let tail = rest.get(ID_LEN..);
    let id = rest.get(..ID_LEN).and_then(|id| id.parse().ok());
    let sandbox: Option<SandboxId> = match tail {
        Some(tail) if tail.is_empty() || tail.starts_with('-') => id,
        _ => None,
    };
    let port = port.parse().ok().filter(|port| *port != 0);
    Some(match (sandbox, port) {
        (Some(sandbox), Some(port)) => Ok(Target { sandbox, port }),
        _ => Err(TargetError::Host(host.chars().take(100).collect())),
    })
}

/// The headers count only where the host cannot name a sandbox, so that a page of one sandbox cannot
/// make a browser reach another under the page's own origin.
fn by_headers(parts: &Parts, host: &str, domain: &str) -> Option<Result<Target, TargetError>> {
    let text = |name: &str| {
        let value = parts.headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let id = text(SANDBOX_HEADER)?;
    let literal = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
        .is_ok();
    let shared = host
        .strip_prefix("sandbox.")
        .is_some_and(|rest| rest.eq_ignore_ascii_case(domain));
    if !(literal || shared || host.eq_ignore_ascii_case("localhost")) {
        return None;
    }
    let sandbox = match id.trim().parse() {
        Ok(sandbox) => sandbox,
        Err(e) => return Some(Err(TargetError::Id(format!("{e}")))),
    };
    let port = text(PORT_HEADER).unwrap_or_default();
    Some(match port.trim().parse() {
        Ok(port) if port != 0 => Ok(Target { sandbox, port }),
        _ => Err(TargetError::Port(port.chars().take(40).collect())),
    })
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|c| c.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "sb-0192f0c8-6a3e-7c3a-9d1e-5b8f3c2a1d00";

    fn ask(host: &str, headers: &[(&str, &str)]) -> Option<Result<Target, TargetError>> {
        let mut request = http::Request::builder().uri("/x").header(HOST, host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        of(&request.body(()).unwrap().into_parts().0, "sbx.test:8443")
    }

    fn is(port: u16) -> Option<Result<Target, TargetError>> {
        let sandbox = ID.parse().unwrap();
        Some(Ok(Target { sandbox, port }))
    }

    #[test]
    fn a_host_names_port_and_sandbox() {
        for (host, port) in [
            (format!("8080-{ID}.sbx.test"), 8080),
            (format!("8080-{ID}.sbx.test:8443"), 8080),
            (format!("8080-{}.SBX.test", ID.to_uppercase()), 8080),
            (format!("49983-{ID}-client1.sbx.test"), 49983),
            (format!("1-{ID}.127.0.0.1:3000"), 1),
        ] {
            assert_eq!(ask(&host, &[]), is(port), "{host}");
        }
    }

    #[test]
    fn other_hosts_are_the_api() {
        for host in [
            "api.sbx.test",
            "localhost:3000",
            "127.0.0.1",
            "[::1]:3000",
            "x-1.test",
            "sbx.test",
        ] {
            assert_eq!(ask(host, &[]), None, "{host}");
        }
        assert_eq!(ask(&format!("8080-{ID}"), &[]), None, "no domain");
    }

    #[test]
    fn a_host_that_only_begins_like_one_is_refused() {
        for host in [
            format!("0-{ID}.sbx.test"),
            format!("70000-{ID}.sbx.test"),
            format!("80-{ID}x.sbx.test"),
            "80-sb-1.sbx.test".to_owned(),
            "80-.sbx.test".to_owned(),
            "80-sb-öäü-öäüöäüöäüöäüöäüöäüöä.test".to_owned(),
        ] {
            if let Ok(value) = http::HeaderValue::from_str(&host) {
                if value.to_str().is_err() {
                    continue;
                }
                assert!(
                    matches!(ask(&host, &[]), Some(Err(TargetError::Host(_)))),
                    "{host}"
                );
            }
        }
    }

    #[test]
    fn headers_count_where_the_host_says_nothing() {
        let headers = [(SANDBOX_HEADER, ID), (PORT_HEADER, "49983")];
        for host in [
            "127.0.0.1:3000",
            "[::1]:3000",
            "localhost",
            "sandbox.sbx.test:8443",
        ] {
            assert_eq!(ask(host, &headers), is(49983), "{host}");
        }
        assert_eq!(ask("api.sbx.test", &headers), None);
        assert_eq!(
            ask(&format!("8080-{ID}.sbx.test"), &headers),
            is(8080),
            "the host wins"
        );
        let wrong = ask("localhost", &[(SANDBOX_HEADER, "x"), (PORT_HEADER, "1")]);
        assert!(matches!(wrong, Some(Err(TargetError::Id(_)))));
        for port in ["", "0", "65536", "-1", "x"] {
            let wrong = ask("localhost", &[(SANDBOX_HEADER, ID), (PORT_HEADER, port)]);
            assert!(matches!(wrong, Some(Err(TargetError::Port(_)))), "{port}");
        }
    }
}
