//! Numbers and times for people.

use std::time::Duration;

use jiff::Timestamp;

/// Bytes in binary units with three digits: `1.50 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 999.5 would print as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A duration in its two largest units: `3d 4h`, `12m 5s`, `480 ms`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..=59 => format!("{:.1} s", duration.as_secs_f64()),
        60..=3599 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..=86_399 => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Milliseconds with the digits that matter: `0.42 ms`, `48.1 ms`, `1,204 ms`.
pub(crate) fn milliseconds(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    if ms < 9.995 {
        format!("{ms:.2} ms")
    } else if ms < 99.95 {
        format!("{ms:.1} ms")
    } else {
        let whole = ms.round() as u64;
        match whole {
            0..=999 => format!("{whole} ms"),
            _ => format!("{},{:03} ms", whole / 1000, whole % 1000),
        }
    }
}

/// How long ago an RFC 3339 time was; the text itself where it is none.
pub(crate) fn age(text: &str, now: Timestamp) -> String {
    let Ok(then) = text.parse::<Timestamp>() else {
        return text.to_owned();
    };
    let seconds = now.as_second().saturating_sub(then.as_second());
    match u64::try_from(seconds) {
        Ok(0) => "now".to_owned(),
        Ok(seconds @ 1..=59) => format!("{seconds}s ago"),
        Ok(seconds) => {
            let text = duration(Duration::from_secs(seconds));
            let largest = text.split(' ').next().unwrap_or(&text);
            format!("{largest} ago")
        }
        // The server's clock may be a little ahead of ours.
        Err(_) => "now".to_owned(),
    }
}

/// `1 sandbox`, `7 sandboxes`.
pub(crate) fn sandboxes(count: usize) -> String {
    match count {
        1 => "1 sandbox".to_owned(),
        count => format!("{count} sandboxes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 << 20, "1.50 GiB"),
            (512 << 20, "512 MiB"),
            (1023 << 10, "1.00 MiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn durations_have_two_units() {
        for (ms, text) in [
            (480, "480 ms"),
            (1500, "1.5 s"),
            (125_000, "2m 5s"),
            (7_500_000, "2h 5m"),
            (277_200_000, "3d 5h"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn milliseconds_keep_what_matters() {
        for (us, text) in [
            (420, "0.42 ms"),
            (48_130, "48.1 ms"),
            (250_400, "250 ms"),
            (1_204_000, "1,204 ms"),
        ] {
            assert_eq!(milliseconds(Duration::from_micros(us)), text);
        }
    }

    #[test]
    fn ages_are_rough_and_never_negative() {
        let now: Timestamp = "2026-11-22T12:00:00Z".parse().unwrap();
        assert_eq!(age("2026-11-22T11:59:30Z", now), "30s ago");
        assert_eq!(age("2026-11-22T11:55:00.123456Z", now), "5m ago");
        assert_eq!(age("2026-11-20T11:00:00+00:00", now), "2d ago");
        assert_eq!(age("2026-11-22T12:00:05Z", now), "now");
        assert_eq!(age("yesterday", now), "yesterday");
    }
}
