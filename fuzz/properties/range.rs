//! `Range` and the conditional headers of downloads.

use std::time::{Duration, SystemTime};

use super::conditions::{self, Range, Verdict, Version};
use http::{HeaderMap, HeaderName, HeaderValue, header};

const NAMES: [HeaderName; 6] = [
    header::RANGE,
    header::IF_RANGE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_UNMODIFIED_SINCE,
];

fn is_inside(first: u64, last: u64, size: u64) {
    assert!(first <= last && last < size, "{first}-{last} of {size}");
}

/// The size in one byte of leading zeros and the time in another, then a line per header.
pub fn check(data: &[u8]) {
    let [zeros, time, lines @ ..] = data else {
        return;
    };
    let size = u64::MAX.checked_shr((*zeros).into()).unwrap_or(0);
    let mut headers = HeaderMap::new();
    for (name, line) in NAMES.into_iter().zip(lines.split(|byte| *byte == b'\n')) {
        if line.is_empty() {
            continue;
        }
        if name == header::RANGE
            && let Ok(text) = std::str::from_utf8(line)
            && let Range::Part(first, last) = conditions::parse_range(text, size)
        {
            is_inside(first, last, size);
        }
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.insert(name, value);
        }
    }
    let version = Version {
        tag: "1-2".to_owned(),
        fresh: time % 2 == 0,
        modified: SystemTime::UNIX_EPOCH
            + Duration::from_secs(784_111_777 - 100 + u64::from(*time)),
    };
    let verdict = conditions::judge(&headers, &version, size);
    if let Verdict::Partial { first, last } = verdict {
        is_inside(first, last, size);
    }
    if headers.is_empty() {
        assert!(matches!(verdict, Verdict::Full), "{verdict:?}");
    }
}
