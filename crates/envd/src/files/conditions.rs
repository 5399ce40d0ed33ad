//! Conditional and range requests, as RFC 9110 sections 13 and 14 have them. Pure.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, header};

/// What tells one version of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The opaque part of the entity tag, without quotes.
    pub tag: String,
    /// The file was changed so recently that a second change could carry the same times.
    pub fresh: bool,
    /// Last modification.
    pub modified: SystemTime,
}

impl Version {
    /// The `ETag` of the bytes as they are on disk, weak while the file is fresh.
    pub fn etag(&self) -> String {
        if self.fresh {
            format!("W/\"{}\"", self.tag)
        } else {
            format!("\"{}\"", self.tag)
        }
    }

    /// The `ETag` of the compressed form.
    pub fn etag_gzip(&self) -> String {
        format!("W/\"{}{GZIP_SUFFIX}\"", self.tag)
    }
}

const GZIP_SUFFIX: &str = "-gzip";

/// What to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// 200 with all of it.
    Full,
    /// 206 with the bytes from `first` to `last`, both included.
    Partial {
        /// Position of the first byte.
        first: u64,
        /// Position of the last byte.
        last: u64,
    },
    /// 304.
    NotModified,
    /// 412.
    Failed,
    /// 416.
    Unsatisfiable,
}

/// Whether a request has any header that [`judge`] looks at.
pub fn is_conditional(headers: &HeaderMap) -> bool {
    const ALL: [HeaderName; 6] = [
        header::RANGE,
        header::IF_RANGE,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        header::IF_MODIFIED_SINCE,
        header::IF_UNMODIFIED_SINCE,
    ];
    ALL.iter().any(|name| headers.contains_key(name))
}

/// Judges a GET of a file of `size` bytes, in the order of RFC 9110 section 13.2.2.
pub fn judge(headers: &HeaderMap, version: &Version, size: u64) -> Verdict {
    let strong = |tag: &str| !version.fresh && tag == version.tag;
    let weak = |tag: &str| tag.strip_suffix(GZIP_SUFFIX).unwrap_or(tag) == version.tag;
    if headers.contains_key(header::IF_MATCH) {
        if !any_tag(headers, header::IF_MATCH, |is_weak, tag| {
            !is_weak && strong(tag)
        }) {
            return Verdict::Failed;
        }
    } else if let Some(date) = date(headers, header::IF_UNMODIFIED_SINCE)
        && whole_seconds(version.modified) > date
    {
        return Verdict::Failed;
    }
    if headers.contains_key(header::IF_NONE_MATCH) {
        if any_tag(headers, header::IF_NONE_MATCH, |_, tag| weak(tag)) {
            return Verdict::NotModified;
        }
    } else if let Some(date) = date(headers, header::IF_MODIFIED_SINCE)
        && whole_seconds(version.modified) <= date
    {
        return Verdict::NotModified;
    }
    match headers.get(header::RANGE).map(|value| value.to_str()) {
        Some(Ok(range)) if if_range_holds(headers, version, strong) => {
            match parse_range(range, size) {
                Range::Whole => Verdict::Full,
                Range::Part(first, last) => Verdict::Partial { first, last },
                Range::Outside => Verdict::Unsatisfiable,
            }
        }
        _ => Verdict::Full,
    }
}

fn if_range_holds(headers: &HeaderMap, version: &Version, strong: impl Fn(&str) -> bool) -> bool {
    let Some(value) = headers.get(header::IF_RANGE) else {
        return true;
    };
    let Ok(text) = value.to_str() else {
        return false;
    };
    match tag(text.trim()) {
        Some((is_weak, tag, "")) => !is_weak && strong(tag),
        _ => {
            // A date is only as good as a strong tag when the file is not fresh.
            let same = |date| date == whole_seconds(version.modified);
            !version.fresh && httpdate::parse_http_date(text).is_ok_and(same)
        }
    }
}

fn date(headers: &HeaderMap, name: HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(name)?.to_str().ok()?.trim()).ok()
}

/// HTTP dates have no fractions.
fn whole_seconds(time: SystemTime) -> SystemTime {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs()),
        // Before 1970: HTTP dates can say that, but nobody compares by it.
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}

/// Whether a list of tags holds `*` or one that `fits` (weak?, opaque part).
fn any_tag(headers: &HeaderMap, name: HeaderName, fits: impl Fn(bool, &str) -> bool) -> bool {
    for value in headers.get_all(name) {
        let Ok(text) = value.to_str() else { continue };
        let mut rest = text.trim();
        if rest == "*" {
            return true;
        }
        while let Some((is_weak, opaque, after)) = tag(rest) {
            if fits(is_weak, opaque) {
                return true;
            }
            rest = after.trim_start_matches([',', ' ', '\t']);
        }
    }
    false
}

/// The first tag of a list: weak?, opaque part, what follows.
fn tag(text: &str) -> Option<(bool, &str, &str)> {
    let (is_weak, text) = match text.strip_prefix("W/") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (opaque, rest) = text.strip_prefix('"')?.split_once('"')?;
    Some((is_weak, opaque, rest))
}

/// What a `Range` header asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// Nothing we serve in part: another unit, several ranges, or not understood. All of it.
    Whole,
    /// From the first to the last byte, both included.
    Part(u64, u64),
    /// Nothing that the file has.
    Outside,
}

/// Reads `bytes=first-last`, `bytes=first-` or `bytes=-suffix` for a file of `size` bytes.
pub fn parse_range(text: &str, size: u64) -> Range {
    let Some((unit, set)) = text.split_once('=') else {
        return Range::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Range::Whole;
    }
    let Some((first, last)) = set.trim().split_once('-') else {
        return Range::Whole;
    };
    match (number(first), number(last)) {
        (Number::Is(first), Number::Absent) => part(first, u64::MAX, size),
        (Number::Is(first), Number::Is(last)) if first <= last => part(first, last, size),
        (Number::Absent, Number::Is(0)) => Range::Outside,
        (Number::Absent, Number::Is(suffix)) => part(size.saturating_sub(suffix), u64::MAX, size),
        _ => Range::Whole,
    }
}

fn part(first: u64, last: u64, size: u64) -> Range {
    match size.checked_sub(1) {
        Some(end) if first <= end => Range::Part(first, last.min(end)),
        _ => Range::Outside,
    }
}

enum Number {
    Absent,
    Is(u64),
    Wrong,
}

fn number(text: &str) -> Number {
    let text = text.trim();
    if text.is_empty() {
        Number::Absent
    } else if !text.bytes().all(|b| b.is_ascii_digit()) {
        Number::Wrong
    } else {
        // More digits than fit are a position beyond any file.
        Number::Is(text.parse().unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn version(fresh: bool) -> Version {
        Version {
            tag: "a-1".into(),
            fresh,
            modified: SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000_500),
        }
    }

    fn verdict(pairs: &[(&str, &str)]) -> Verdict {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        judge(&headers, &version(false), 100)
    }

    const THEN: &str = "Sun, 09 Sep 2001 01:46:40 GMT";
    const BEFORE: &str = "Sun, 09 Sep 2001 01:46:39 GMT";

    #[test]
    fn g31_conditions_are_judged_in_their_order() {
        use Verdict::{Failed, Full, NotModified, Partial, Unsatisfiable};
        let middle = Partial {
            first: 10,
            last: 19,
        };
        for (headers, expected) in [
            (vec![], Full),
            (vec![("if-none-match", "\"a-1\"")], NotModified),
            (vec![("if-none-match", "\"x\", W/\"a-1\"")], NotModified),
            (vec![("if-none-match", "W/\"a-1-gzip\"")], NotModified),
            (vec![("if-none-match", "*")], NotModified),
            (
                vec![("if-none-match", "\"b\""), ("if-modified-since", THEN)],
                Full,
            ),
            (vec![("if-modified-since", THEN)], NotModified),
            (vec![("if-modified-since", BEFORE)], Full),
            (vec![("if-modified-since", "yesterday")], Full),
            (vec![("if-match", "\"a-1\"")], Full),
            (vec![("if-match", "W/\"a-1\"")], Failed),
            (vec![("if-match", "\"b\"")], Failed),
            (vec![("if-unmodified-since", BEFORE)], Failed),
            (vec![("if-unmodified-since", THEN)], Full),
            (vec![("range", "bytes=10-19")], middle.clone()),
            (
                vec![("range", "bytes=10-19"), ("if-range", "\"a-1\"")],
                middle.clone(),
            ),
            (vec![("range", "bytes=10-19"), ("if-range", "\"b\"")], Full),
            (
                vec![("range", "bytes=10-19"), ("if-range", "W/\"a-1\"")],
                Full,
            ),
            (vec![("range", "bytes=10-19"), ("if-range", THEN)], middle),
            (vec![("range", "bytes=10-19"), ("if-range", BEFORE)], Full),
            (vec![("range", "bytes=100-")], Unsatisfiable),
            (
                vec![("range", "bytes=100-"), ("if-none-match", "\"a-1\"")],
                NotModified,
            ),
        ] {
            assert_eq!(verdict(&headers), expected, "{headers:?}");
        }
    }

    #[test]
    fn a_fresh_file_has_no_strong_tag() {
        assert_eq!(version(true).etag(), "W/\"a-1\"");
        let mut headers = HeaderMap::new();
        headers.insert("range", "bytes=0-1".parse().unwrap());
        headers.insert("if-range", "\"a-1\"".parse().unwrap());
        assert_eq!(judge(&headers, &version(true), 100), Verdict::Full);
    }

    #[test]
    fn ranges_are_read_as_written() {
        for (text, expected) in [
            ("bytes=0-0", Range::Part(0, 0)),
            ("bytes=0-", Range::Part(0, 9)),
            ("Bytes = 2-5", Range::Part(2, 5)),
            ("bytes=5-99", Range::Part(5, 9)),
            ("bytes=-3", Range::Part(7, 9)),
            ("bytes=-99", Range::Part(0, 9)),
            ("bytes=-0", Range::Outside),
            ("bytes=10-", Range::Outside),
            ("bytes=99999999999999999999999-", Range::Outside),
            ("bytes=5-2", Range::Whole),
            ("bytes=1-2,4-5", Range::Whole),
            ("bytes=-", Range::Whole),
            ("bytes=a-b", Range::Whole),
            ("bytes=+1-2", Range::Whole),
            ("lines=1-2", Range::Whole),
            ("bytes", Range::Whole),
        ] {
            assert_eq!(parse_range(text, 10), expected, "{text}");
        }
        assert_eq!(parse_range("bytes=0-", 0), Range::Outside);
        assert_eq!(parse_range("bytes=-1", 0), Range::Outside);
    }

    proptest! {
        #[test]
        fn a_part_is_always_inside_the_file(text in "\\PC{0,30}", size in 0u64..1000) {
            for text in [text.clone(), format!("bytes={text}")] {
                if let Range::Part(first, last) = parse_range(&text, size) {
                    prop_assert!(first <= last && last < size);
                }
            }
        }

        #[test]
        fn every_written_part_is_read_back(a in 0u64..1000, b in 0u64..1000, size in 1u64..1000) {
            let (first, last) = (a.min(b), a.max(b));
            let expected = if first < size {
                Range::Part(first, last.min(size - 1))
            } else {
                Range::Outside
            };
            prop_assert_eq!(parse_range(&format!("bytes={first}-{last}"), size), expected);
        }

        #[test]
        fn no_header_makes_judging_panic(value in "\\PC{0,60}") {
            for name in ["if-match", "if-none-match", "if-range", "range", "if-modified-since"] {
                let mut headers = HeaderMap::new();
                if let Ok(value) = http::HeaderValue::from_str(&value) {
                    headers.insert(name, value);
                    headers.append("range", http::HeaderValue::from_static("bytes=0-1"));
                    judge(&headers, &version(false), 10);
                }
            }
        }
    }
}
