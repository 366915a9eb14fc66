//! What a line looks like: logfmt, JSON, or words for a person. Pure.
//!
//! Whatever it is given, a line is one line and holds no control character, so that nobody's model name can move a
//! terminal's cursor or forge an entry.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use super::Level;

/// How a line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `key=value` pairs, as Go's kit/log and Heroku write them; a value with a space or quotes is quoted.
    Logfmt,
    /// One JSON object a line.
    Json,
}

/// A particular of an event.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Field<'a> {
    /// A text from anywhere.
    Text(&'a str),
    /// A number of things.
    Count(u64),
    /// In milliseconds, to the tenth.
    Millis(Duration),
    /// Yes or no.
    Flag(bool),
    /// In UTC, to the millisecond (RFC 3339).
    Time(SystemTime),
}

/// Where lines are read, which decides what they need not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// A terminal or a file: each line has its time.
    Plain,
    /// The journal, which knows the time itself and takes the level from a prefix (sd-daemon(3)).
    Journal,
}

/// Appends one line in `format`.
pub(super) fn append(
    line: &mut String,
    (format, reader): (Format, Reader),
    now: SystemTime,
    level: Level,
    message: &str,
    fields: &[(&str, Field<'_>)],
) {
    if reader == Reader::Journal {
        line.push_str(priority(level));
    }
    let time = (reader == Reader::Plain).then_some(("ts", Field::Time(now)));
    let first = time
        .into_iter()
        .chain([("level", Field::Text(level.name())), ("msg", Field::Text(message))]);
    let fields = first.chain(fields.iter().copied());
    match format {
        Format::Logfmt => logfmt(line, fields),
        Format::Json => json(line, fields),
    }
    line.push('\n');
}

/// Appends a message for a person.
pub(super) fn append_words(lines: &mut String, message: &str) {
    lines.push_str("limitrate: ");
    lines.push_str(message);
    lines.push('\n');
}

fn logfmt<'a>(line: &mut String, fields: impl Iterator<Item = (&'a str, Field<'a>)>) {
    for (at, (name, value)) in fields.enumerate() {
        if at > 0 {
            line.push(' ');
        }
        line.push_str(name);
        line.push('=');
        match value {
            Field::Text(text) if is_bare(text) => line.push_str(text),
            Field::Time(at) => rfc3339(line, at),
            value => plain(line, value),
        }
    }
}

fn json<'a>(line: &mut String, fields: impl Iterator<Item = (&'a str, Field<'a>)>) {
    for (at, (name, value)) in fields.enumerate() {
        line.push(if at == 0 { '{' } else { ',' });
        quoted(line, name);
        line.push(':');
        plain(line, value);
    }
    line.push('}');
}

fn plain(line: &mut String, value: Field<'_>) {
    let written = match value {
        Field::Text(text) => return quoted(line, text),
        Field::Count(count) => write!(line, "{count}"),
        Field::Millis(time) => write!(line, "{:.1}", time.as_secs_f64() * 1e3),
        Field::Flag(flag) => write!(line, "{flag}"),
        Field::Time(at) => {
            line.push('"');
            rfc3339(line, at);
            line.push('"');
            return;
        }
    };
    written.expect("a String takes whatever is written to it");
}

/// Whether logfmt needs no quotes around it.
fn is_bare(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'=' | b'\\'))
}

/// A JSON string (RFC 8259 section 7), which logfmt's readers take as well.
fn quoted(line: &mut String, text: &str) {
    line.push('"');
    for char in text.chars() {
        match char {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            char if is_harmful(char) => unicode(line, char),
            char => line.push(char),
        }
    }
    line.push('"');
}

/// Whether a terminal would do something about it, or a reader be deceived: control characters, line separators, what turns
/// the direction of writing. All are below U+FFFF.
pub fn is_harmful(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn unicode(line: &mut String, char: char) {
    write!(line, "\\u{:04x}", u32::from(char)).expect("a String takes whatever is written to it");
}

/// The syslog priority in front of a line (sd-daemon(3)).
fn priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug => "<7>",
    }
}

/// `2026-11-25T07:36:50.123Z`
fn rfc3339(line: &mut String, at: SystemTime) {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (second, millis) = (second % 60, since.subsec_millis());
    write!(line, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
        .expect("a String takes whatever is written to it");
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar. Years are counted from March, so that
/// a leap day is the last of its year and the months before it have 153 days in each five.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_IN_400_YEARS: u64 = 146_097;
    const DAYS_FROM_MARCH_OF_YEAR_0: u64 = 719_468;
    let days = days + DAYS_FROM_MARCH_OF_YEAR_0;
    let (era, day_of_era) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let year = 400 * era + year_of_era + u64::from(month >= 10);
    (year, if month < 10 { month + 3 } else { month - 9 }, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: Format, reader: Reader, fields: &[(&str, Field<'_>)]) -> String {
        let mut out = String::new();
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_592_210_123);
        append(&mut out, (format, reader), now, Level::Warn, "it broke", fields);
        out
    }

    #[test]
    fn a_line_of_each_kind() {
        let fields = [
            ("model", Field::Text("z-ai/glm-5.1")),
            ("empty", Field::Text("")),
            ("sent", Field::Count(2)),
            ("total_ms", Field::Millis(Duration::from_micros(1_250))),
            ("stream", Field::Flag(true)),
        ];
        let logfmt = "level=warn msg=\"it broke\" model=z-ai/glm-5.1 empty=\"\" sent=2 total_ms=1.2 stream=true\n";
        assert_eq!(
            line(Format::Logfmt, Reader::Plain, &fields),
            format!("ts=2026-11-25T07:36:50.123Z {logfmt}")
        );
        assert_eq!(line(Format::Logfmt, Reader::Journal, &fields), format!("<4>{logfmt}"));
        assert_eq!(
            line(Format::Json, Reader::Journal, &fields),
            "<4>{\"level\":\"warn\",\"msg\":\"it broke\",\"model\":\"z-ai/glm-5.1\",\"empty\":\"\",\"sent\":2,\
             \"total_ms\":1.2,\"stream\":true}\n"
        );
    }

    #[test]
    fn nothing_breaks_out_of_its_value() {
        for hostile in [
            "a b",
            "a=b",
            "\"",
            "\\",
            "x\nlevel=info",
            "\u{1b}[2J",
            "\u{85}",
            "\u{2028}",
            "\u{202e}gpj",
            "é",
        ] {
            let fields = [("model", Field::Text(hostile))];
            let json = line(Format::Json, Reader::Plain, &fields);
            let value: serde_json::Value = serde_json::from_str(&json).unwrap();
            assert_eq!(value["model"], hostile, "{json}");
            let logfmt = line(Format::Logfmt, Reader::Plain, &fields);
            let quoted = logfmt.split_once("model=").unwrap().1.trim_end_matches('\n');
            assert_eq!(serde_json::from_str::<String>(quoted).unwrap(), hostile, "{logfmt}");
            for line in [json, logfmt] {
                let deceiving =
                    |char: char| char.is_control() || matches!(char, '\u{2028}'..='\u{202e}');
                assert!(!line.trim_end_matches('\n').chars().any(deceiving), "{line:?}");
            }
        }
    }

    #[test]
    fn dates() {
        for (days, want) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_781, (2026, 11, 24)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), want, "{days}");
        }
    }
}
