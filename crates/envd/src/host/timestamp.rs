//! A time in a request.

use std::time::Duration;

use serde::Deserialize;

/// RFC 3339, or nanoseconds since 1970 as number or text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Timestamp {
    Nanos(i64),
    Text(String),
}

/// What was to be a time and is none.
#[derive(Debug, thiserror::Error)]
#[error("timestamp '{0}' is neither RFC 3339 nor nanoseconds since 1970")]
pub(super) struct NoTimestamp(String);

impl Timestamp {
    /// The time since 1970.
    pub(super) fn nanos(&self) -> Result<Duration, NoTimestamp> {
        let wrong = || {
            NoTimestamp(match self {
                Timestamp::Nanos(n) => n.to_string(),
                Timestamp::Text(text) => text.clone(),
            })
        };
        match self {
            Timestamp::Nanos(n) => u64::try_from(*n)
                .map(Duration::from_nanos)
                .map_err(|_| wrong()),
            Timestamp::Text(text) => text
                .parse::<u64>()
                .map(Duration::from_nanos)
                .ok()
                .or_else(|| rfc3339(text))
                .ok_or_else(wrong),
        }
    }
}

/// `2026-11-22T13:05:00.123456789+01:00` as time since 1970.
fn rfc3339(text: &str) -> Option<Duration> {
    let number = |range: std::ops::Range<usize>| -> Option<i64> {
        let digits = text.get(range)?;
        digits
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| digits.parse().ok())?
    };
    let bytes = text.as_bytes();
    let at = |index: usize| bytes.get(index).copied();
    let shape = at(4)? == b'-' && at(7)? == b'-' && matches!(at(10)?, b'T' | b't' | b' ');
    if !shape || at(13)? != b':' || at(16)? != b':' {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let rest = &text[19..];
    let (fraction, zone) = match rest.strip_prefix('.') {
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit())?;
            (&rest[..end], &rest[end..])
        }
        None => ("", rest),
    };
    let mut nanos = 0u32;
    for digit in fraction.bytes().chain(std::iter::repeat(b'0')).take(9) {
        nanos = nanos * 10 + u32::from(digit - b'0');
    }
    let offset = match zone {
        "Z" | "z" => 0,
        zone => {
            let sign = match zone.as_bytes().first()? {
                b'+' => 1,
                b'-' => -1,
                _ => return None,
            };
            let (hours, minutes) = zone.get(1..)?.split_once(':')?;
            if hours.len() != 2 || minutes.len() != 2 {
                return None;
            }
            sign * (hours.parse::<i64>().ok()? * 3600 + minutes.parse::<i64>().ok()? * 60)
        }
    };
    // Days since 1970 of the proleptic Gregorian calendar, counted in years that begin in
    // March, so that the leap day is the last.
    let shifted = if month > 2 { year } else { year - 1 };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100
        + day_of_year
        - 719_468;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - offset;
    Some(Duration::new(u64::try_from(seconds).ok()?, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_comes_in_three_forms() {
        for (json, nanos) in [
            (r#""1970-01-01T00:00:00Z""#, 0),
            (r#""2026-11-22T13:05:00.5Z""#, 1_795_352_700_500_000_000),
            (
                r#""2026-11-22T14:05:00.500000000+01:00""#,
                1_795_352_700_500_000_000,
            ),
            (r#""2024-02-29T23:59:59-00:30""#, 1_709_252_999_000_000_000),
            ("1795352700500000000", 1_795_352_700_500_000_000),
            (r#""1795352700500000000""#, 1_795_352_700_500_000_000),
        ] {
            let timestamp: Timestamp = serde_json::from_str(json).unwrap();
            assert_eq!(
                timestamp.nanos().unwrap(),
                Duration::from_nanos(nanos),
                "{json}"
            );
        }
        for wrong in [
            "",
            "now",
            "2026-13-01T00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.",
            "2026-01-01",
        ] {
            assert!(Timestamp::Text(wrong.into()).nanos().is_err(), "{wrong}");
        }
        assert!(Timestamp::Nanos(-1).nanos().is_err());
    }
}
