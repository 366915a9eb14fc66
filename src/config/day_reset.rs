//! `day_resets_at`: a time of day with its zone's offset, or `rolling`.

use std::time::Duration;

use super::DayReset;

/// What to write instead of what [`parse`] does not take.
pub(super) const REMEDY: &str =
    r#"write "00:00" (UTC), with an offset "00:00-08:00" or "07:30+05:30", or rolling"#;

const DAY_MINUTES: u32 = 24 * 60;

/// `rolling`, or RFC 3339's `HH:MM` with `Z`, `+HH:MM`, `-HH:MM` or, for UTC, nothing behind it.
pub(super) fn parse(text: &str) -> Option<DayReset> {
    if text == "rolling" {
        return Some(DayReset::Rolling);
    }
    let (time, zone) = text.split_at_checked(5)?;
    let offset = if let Some(east) = zone.strip_prefix('+') {
        // The day starts that much earlier: modulo a day, the rest of a day later.
        DAY_MINUTES - minutes(east)?
    } else if let Some(west) = zone.strip_prefix('-') {
        minutes(west)?
    } else if matches!(zone, "" | "Z") {
        0
    } else {
        return None;
    };
    let after_midnight = (minutes(time)? + offset) % DAY_MINUTES;
    Some(DayReset::At(Duration::from_secs(60 * u64::from(after_midnight))))
}

/// Those of `HH:MM`, below a day.
fn minutes(text: &str) -> Option<u32> {
    let [h1 @ b'0'..=b'2', h2 @ b'0'..=b'9', b':', m1 @ b'0'..=b'5', m2 @ b'0'..=b'9'] =
        *text.as_bytes()
    else {
        return None;
    };
    let two = |tens: u8, ones: u8| u32::from(tens - b'0') * 10 + u32::from(ones - b'0');
    Some(two(h1, h2) * 60 + two(m1, m2)).filter(|minutes| *minutes < DAY_MINUTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads() {
        for (text, hours, minutes) in [
            ("00:00", 0, 0),
            ("00:00Z", 0, 0),
            ("23:59", 23, 59),
            ("00:00-08:00", 8, 0),
            ("17:00-08:00", 1, 0),
            ("07:30+05:30", 2, 0),
            ("00:00+08:00", 16, 0),
            ("00:00+00:00", 0, 0),
            ("12:00-00:30", 12, 30),
        ] {
            let at = Duration::from_secs(60 * (60 * hours + minutes));
            assert_eq!(parse(text), Some(DayReset::At(at)), "{text}");
        }
        assert_eq!(parse("rolling"), Some(DayReset::Rolling));
    }

    #[test]
    fn refuses() {
        for text in [
            "",
            "0",
            "7:30",
            "24:00",
            "12:60",
            "12.30",
            "12:30z",
            "12:30 Z",
            "12:30ZZ",
            "12:30+5",
            "12:30+24:00",
            "12:30+05:60",
            "12:30*05:30",
            "12:30-",
            "+1:30",
            "1\u{e9}:30",
            "12:3\u{e9}",
            "12:30\u{e9}",
            "Rolling",
            "midnight",
            "00:00 UTC",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
