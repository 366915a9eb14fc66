//! The notations of a time in an HTTP answer: durations, dates and bare numbers. Exact, without floating point; what is
//! no such notation is None, and nothing overflows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SECOND: Duration = Duration::from_secs(1);
const DAY_SECONDS: i64 = 24 * 3600;

/// A moment of the wall clock, as the time since 1970; earlier ones are 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct UnixTime(Duration);

impl UnixTime {
    pub(super) fn of(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).unwrap_or_default())
    }

    /// The time from `now` to this moment; zero if it has passed.
    pub(super) fn after(self, now: UnixTime) -> Duration {
        self.0.saturating_sub(now.0)
    }
}

/// When a limit resets, in any of the providers' notations: a Go duration, RFC 3339, or a bare number. That is a number of
/// seconds if under 1e9, a Unix time if under 1e10, and one in milliseconds above; Azure's 0 means that it does not know.
pub(super) fn reset(text: &str, now: UnixTime) -> Option<Duration> {
    const LEAST_UNIX_TIME: Duration = Duration::from_secs(1_000_000_000);
    const LEAST_UNIX_MILLISECONDS: Duration = Duration::from_secs(10_000_000_000);
    match number(text, SECOND) {
        Some(Duration::ZERO) => None,
        Some(seconds) if seconds < LEAST_UNIX_TIME => Some(seconds),
        Some(seconds) if seconds < LEAST_UNIX_MILLISECONDS => Some(UnixTime(seconds).after(now)),
        Some(_) => Some(UnixTime(number(text, Duration::from_millis(1))?).after(now)),
        None => go_duration(text).or_else(|| Some(rfc3339(text)?.after(now))),
    }
}

/// A whole text as a number of this unit, without sign or exponent: `3`, `0.25`.
pub(super) fn number(text: &str, unit: Duration) -> Option<Duration> {
    let (number, "") = leading_number(text)? else { return None };
    number.of(unit)
}

/// A whole text as a duration in the notation of Go's `time.Duration`, without sign: `1s`, `6m0s`, `12ms`, `1h2m3.5s`.
pub(super) fn go_duration(text: &str) -> Option<Duration> {
    let (duration, "") = leading_duration(text)? else { return None };
    Some(duration)
}

/// The duration that a text begins with, and what follows it: Go's notation, and units in words, `2 seconds`.
pub(super) fn leading_duration(text: &str) -> Option<(Duration, &str)> {
    let (mut sum, mut rest) = leading_quantity(text)?;
    while let Some((more, after)) = leading_quantity(rest) {
        sum = sum.checked_add(more)?;
        rest = after;
    }
    Some((sum, rest))
}

fn leading_quantity(text: &str) -> Option<(Duration, &str)> {
    let (number, rest) = leading_number(text)?;
    let rest = rest.strip_prefix(' ').unwrap_or(rest);
    let end = rest.find(|c: char| !c.is_alphabetic()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(end);
    let unit = match unit {
        "ns" => Duration::from_nanos(1),
        "us" | "µs" | "μs" => Duration::from_micros(1),
        "ms" | "millisecond" | "milliseconds" => Duration::from_millis(1),
        "s" | "sec" | "second" | "seconds" => SECOND,
        "m" | "min" | "minute" | "minutes" => 60 * SECOND,
        "h" | "hour" | "hours" => 3600 * SECOND,
        "d" | "day" | "days" => 24 * 3600 * SECOND,
        _ => return None,
    };
    Some((number.of(unit)?, rest))
}

/// A decimal number in billionths; digits after the ninth are cut off.
struct Decimal(u128);

impl Decimal {
    fn of(&self, unit: Duration) -> Option<Duration> {
        const BILLION: u128 = 1_000_000_000;
        let nanos = self.0.checked_mul(unit.as_nanos())? / BILLION;
        let (seconds, rest) = (nanos / BILLION, nanos % BILLION);
        Some(Duration::new(seconds.try_into().ok()?, rest.try_into().ok()?))
    }
}

/// The number that a text begins with. A point belongs to it only with a digit behind, since it may end a sentence.
fn leading_number(text: &str) -> Option<(Decimal, &str)> {
    let (whole, rest) = leading_digits(text)?;
    let (fraction, rest) = rest.strip_prefix('.').and_then(leading_digits).unwrap_or(("", rest));
    let billionths: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some((Decimal(format!("{whole}{billionths}").parse().ok()?), rest))
}

fn leading_digits(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// A date in one of the three notations of RFC 9110 section 5.6.7. Its day of the week is not looked at, and a year of two
/// digits is one of this century.
pub(super) fn http_date(text: &str) -> Option<UnixTime> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let parts: Vec<_> =
        text.split([' ', ',', '-']).filter(|part| !part.is_empty()).take(7).collect();
    let ([_, day, month, year, time, "GMT"] | [_, month, day, time, year]) = parts[..] else {
        return None;
    };
    let month = MONTHS.iter().position(|name| *name == month)? + 1;
    let century = if year.len() == 2 { 2000 } else { 0 };
    moment(date(century + integer(year)?, month.try_into().ok()?, integer(day)?)?, clock(time)?)
}

/// A date in the notation of RFC 3339: `2025-06-02T15:15:48.5Z`, or with an offset, `+02:00`.
fn rfc3339(text: &str) -> Option<UnixTime> {
    let (day, time) = text.split_once(['T', 't', ' '])?;
    let mut parts = day.split('-').map(integer);
    let day = date(parts.next()??, parts.next()??, parts.next()??)?;
    if let Some(time) = time.strip_suffix(['Z', 'z']) {
        return moment(day, clock(time)?);
    }
    let (time, offset) = time.split_at(time.rfind(['+', '-'])?);
    let (hours, minutes) = offset[1..].split_once(':')?;
    let offset_seconds = 3600 * integer(hours)? + 60 * integer(minutes)?;
    let east = offset.starts_with('+');
    moment(day + if east { -offset_seconds } else { offset_seconds }, clock(time)?)
}

fn moment(day_seconds: i64, time: Duration) -> Option<UnixTime> {
    Some(UnixTime(Duration::from_secs(day_seconds.max(0).try_into().ok()?).checked_add(time)?))
}

/// Seconds from 1970 to the midnight (UTC) that this day of the Gregorian calendar begins with.
fn date(year: i64, month: i64, day: i64) -> Option<i64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // A year that begins in March ends with its leap day; 153 is the days of five months there.
    let year = year - i64::from(month < 3);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days =
        365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year;
    const DAYS_BEFORE_1970: i64 = 719_468;
    Some((days - DAYS_BEFORE_1970) * DAY_SECONDS)
}

/// `08:49:37`, also with a fraction; second 60 is the next minute.
fn clock(text: &str) -> Option<Duration> {
    let mut parts = text.splitn(3, ':');
    let (hours, minutes, seconds) =
        (integer(parts.next()?)?, integer(parts.next()?)?, parts.next()?);
    let seconds = number(seconds, SECOND).filter(|seconds| *seconds < 61 * SECOND)?;
    if hours > 23 || minutes > 59 {
        return None;
    }
    Some(Duration::from_secs((3600 * hours + 60 * minutes).try_into().ok()?) + seconds)
}

/// Up to four digits: a part of a date.
fn integer(text: &str) -> Option<i64> {
    let (digits, "") = leading_digits(text)? else { return None };
    (digits.len() <= 4).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime(Duration::from_secs(seconds))
    }

    #[test]
    fn durations_of_go() {
        for (text, millis) in [
            ("1s", Some(1_000)),
            ("6m0s", Some(360_000)),
            ("12ms", Some(12)),
            ("1h2m3.5s", Some(3_723_500)),
            ("2m59.56s", Some(179_560)),
            ("1500µs", Some(1)),
            ("0s", Some(0)),
            ("", None),
            ("1", None),
            ("s", None),
            (".5s", None),
            ("1.s", None),
            ("-1s", None),
            ("1s ", None),
            ("1x", None),
            ("1s1", None),
            ("99999999999999999999999h", None),
        ] {
            assert_eq!(go_duration(text).map(|duration| duration.as_millis()), millis, "{text}");
        }
    }

    #[test]
    fn durations_in_a_text() {
        for (text, millis, rest) in [
            ("20s. visit", 20_000, ". visit"),
            ("7m59.56s. visit", 479_560, ". visit"),
            ("2 seconds.", 2_000, "."),
            ("5 hours and", 18_000_000, " and"),
            ("1 day", 86_400_000, ""),
        ] {
            assert_eq!(
                leading_duration(text),
                Some((Duration::from_millis(millis), rest)),
                "{text}"
            );
        }
        for text in ["a moment", "5. then", "5", " 5s"] {
            assert_eq!(leading_duration(text), None, "{text}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(number("0.0000000019", SECOND), Some(Duration::from_nanos(1)));
        assert_eq!(number("2.5", Duration::from_millis(1)), Some(Duration::from_micros(2_500)));
        for text in ["", "-1", "+1", "1e3", "nan", "inf", "1 ", "1.", ".1", "1,5", &"9".repeat(100)]
        {
            assert_eq!(number(text, SECOND), None, "{text}");
        }
    }

    #[test]
    fn resets() {
        let now = at(1_748_877_332);
        for (text, seconds) in [
            ("6", Some(6)),
            ("999999999", Some(999_999_999)),
            ("1000000000", Some(0)),
            ("1748877342", Some(10)),
            ("1748877331", Some(0)),
            ("1748877342000", Some(10)),
            ("6m0s", Some(360)),
            ("2025-06-02T15:15:42Z", Some(10)),
            ("0", None),
            ("-1", None),
            ("soon", None),
        ] {
            assert_eq!(reset(text, now).map(|wait| wait.as_secs()), seconds, "{text}");
        }
    }

    #[test]
    fn dates() {
        // The example of RFC 9110 section 5.6.7, and dates around leap days.
        let of_the_rfc = Some(at(784_111_777));
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), of_the_rfc);
        assert_eq!(http_date("Sun Nov  6 08:49:37 1994"), of_the_rfc);
        assert_eq!(http_date("Tuesday, 29-Feb-00 00:00:00 GMT"), Some(at(951_782_400)));
        assert_eq!(rfc3339("2100-03-01T00:00:00Z"), Some(at(4_107_542_400)));
        assert_eq!(rfc3339("1994-11-06T09:49:37+01:00"), of_the_rfc);
        assert_eq!(rfc3339("1994-11-06T03:19:37-05:30"), of_the_rfc);
        assert_eq!(rfc3339("1994-11-06t08:49:37.000z"), of_the_rfc);
        assert_eq!(rfc3339("2016-12-31T23:59:60Z"), rfc3339("2017-01-01T00:00:00Z"));
        assert_eq!(rfc3339("0001-01-01T00:00:00Z"), Some(at(0)));
        for text in [
            "",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "Sun, 06 Nov 1994 24:00:00 GMT",
            "Sun, 6 Nov 94 1:1 GMT",
        ] {
            assert_eq!(http_date(text), None, "{text}");
        }
        for text in [
            "",
            "1994-11-06",
            "1994-11-06T08:49:37",
            "1994-13-06T08:49:37Z",
            "1994-11-06T08:49:61Z",
            "TZ",
        ] {
            assert_eq!(rfc3339(text), None, "{text}");
        }
    }

    /// Year, month and day, counted day by day: slow, and sure.
    fn calendar(mut days: u64) -> (u64, usize, u64) {
        let leap = |year: u64| {
            year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)
        };
        for year in 1970.. {
            let february = if leap(year) { 29 } else { 28 };
            let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            for (month, length) in lengths.into_iter().enumerate() {
                if days < length {
                    return (year, month + 1, days + 1);
                }
                days -= length;
            }
        }
        unreachable!("the years do not end")
    }

    proptest! {
        #[test]
        fn durations_round_trip(hours in 0u64..2_000_000, minutes in 0u64..60, nanos in 0u64..60_000_000_000) {
            let duration = Duration::from_secs(3600 * hours + 60 * minutes) + Duration::from_nanos(nanos);
            let (seconds, fraction) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
            prop_assert_eq!(go_duration(&format!("{hours}h{minutes}m{seconds}.{fraction:09}s")), Some(duration));
            let plain = format!("{}.{:09}", duration.as_secs(), duration.subsec_nanos());
            prop_assert_eq!(number(&plain, SECOND), Some(duration));
        }

        #[test]
        fn dates_round_trip(days in 0u64..400_000, second in 0u64..86_400) {
            let ((year, month, day), expected) = (calendar(days), Some(at(days * 86_400 + second)));
            let name = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"][month - 1];
            let time = format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60);
            prop_assert_eq!(http_date(&format!("Thu, {day:02} {name} {year} {time} GMT")), expected);
            prop_assert_eq!(http_date(&format!("Thu {name} {day:2} {time} {year}")), expected);
            prop_assert_eq!(rfc3339(&format!("{year}-{month:02}-{day:02}T{time}Z")), expected);
        }

        #[test]
        fn any_text_is_survived(text: String, now: u64) {
            let _ = (reset(&text, at(now)), http_date(&text), rfc3339(&text), leading_duration(&text));
        }
    }
}
