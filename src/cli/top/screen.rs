//! What is on the screen. Pure.
//!
//! Everything comes from another process: whatever it names, no control character reaches the terminal.

use std::fmt::Write;

use serde::Deserialize;

use crate::log;

/// How much room there is, and whether in colour.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    pub columns: usize,
    pub rows: usize,
    pub colour: bool,
}

/// What a gateway says of itself.
#[derive(Debug, Deserialize)]
pub struct Live {
    pub stats: Stats,
    pub queue: Queue,
    pub requests: Requests,
}

/// Of `/admin/stats`, what is shown.
#[derive(Debug, Deserialize)]
pub struct Stats {
    server: Server,
    providers: Vec<Provider>,
}

#[derive(Debug, Deserialize)]
struct Server {
    version: String,
    time: f64,
    uptime_seconds: f64,
}

#[derive(Debug, Deserialize)]
struct Provider {
    provider: String,
    interval_seconds: f64,
    max_queue: usize,
    queued_ahead: usize,
    in_flight: usize,
    effective_rpm: f64,
    observed_rpm: u32,
    held_by: String,
    estimated_wait_seconds: f64,
    sent: u64,
    upstream_4xx: u64,
    upstream_5xx: u64,
    upstream_errors: u64,
    cooldowns: u64,
    recent_sends: Vec<f64>,
}

/// Of `/admin/queue`, what is shown.
#[derive(Debug, Deserialize)]
pub struct Queue {
    queue: Vec<Waiting>,
}

#[derive(Debug, Deserialize)]
struct Waiting {
    provider: String,
    position: usize,
    client: String,
    model: String,
    waited_seconds: f64,
    eta_seconds: f64,
}

/// Of `/admin/requests`, what is shown.
#[derive(Debug, Deserialize)]
pub struct Requests {
    count: u64,
    requests: Vec<Request>,
}

#[derive(Debug, Deserialize)]
struct Request {
    time: f64,
    client: String,
    model: Option<String>,
    path: String,
    provider: Option<String>,
    status: u16,
    error: Option<String>,
    queued_seconds: Option<f64>,
    first_byte_seconds: f64,
    total_seconds: f64,
}

/// The longest words for a state.
const WORDS: usize = 31;

/// Those in line that are shown of each provider.
const SHOWN_WAITING: usize = 5;

/// What a name gets: where there is room for everything, and where there is not. What is left out then stands last.
const NAME_COLUMNS: (usize, usize) = (26, 16);
const WIDE_COLUMNS: usize = 120;

impl Screen {
    fn names(self) -> usize {
        if self.columns >= WIDE_COLUMNS { NAME_COLUMNS.0 } else { NAME_COLUMNS.1 }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tone {
    Plain,
    Strong,
    Soft,
    Sent,
    Good,
    Warn,
    Bad,
}

impl Tone {
    /// SGR parameters (ECMA-48 section 8.3.117), of the sixteen colours that every theme knows.
    fn code(self) -> &'static str {
        match self {
            Tone::Plain => "0",
            Tone::Strong => "1",
            Tone::Soft => "2",
            Tone::Sent => "36",
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
        }
    }
}

/// A line in pieces of one tone each.
type Line = Vec<(Tone, String)>;

/// One screen, each line ended, as much as there is room for. `Err` has what went wrong since this was seen.
pub fn draw(url: &str, seen: Result<&Live, (&str, &Live)>, screen: Screen) -> String {
    let (problem, live) = match seen {
        Ok(live) => (None, live),
        Err((problem, live)) => (Some(problem), live),
    };
    let mut lines = vec![title(url, live)];
    if let Some(problem) = problem {
        lines.push(vec![(Tone::Bad, format!("no answer, trying again: {}", clean(problem)))]);
    }
    lines.push(Line::new());
    lines.extend(providers(live, screen));
    lines.extend(requests(&live.requests, screen.names()));
    let mut text = String::new();
    // The last row stays free: a line end there would scroll.
    for line in lines.into_iter().take(screen.rows.saturating_sub(1)) {
        write_line(&mut text, line, screen);
    }
    text
}

fn title(url: &str, live: &Live) -> Line {
    let server = &live.stats.server;
    let (version, uptime, count) =
        (clean(&server.version), time(server.uptime_seconds), live.requests.count);
    let rest = format!(" {version} at {}, up for {uptime}, {count} requests", clean(url));
    vec![(Tone::Strong, "limitrate".into()), (Tone::Soft, rest)]
}

fn providers(live: &Live, screen: Screen) -> Vec<Line> {
    let names = screen.names();
    let mut lines = Vec::new();
    let head = format!(
        "{:<names$} {:>11} {:>6} {:>12} {:>7}  {:<WORDS$} {:>9} {:>7} {:>7}",
        "PROVIDER",
        "QUEUED",
        "FLIGHT",
        "LAST MINUTE",
        "WAIT",
        "NEXT SEND",
        "SENT",
        "ERRORS",
        "PAUSES"
    );
    lines.push(vec![(Tone::Soft, head)]);
    for one in &live.stats.providers {
        let errors = one.upstream_4xx + one.upstream_5xx + one.upstream_errors;
        let (words, tone) = state(one);
        let figures = format!(
            " {:>11} {:>6} {:>12} {:>7}  ",
            format!("{}/{}", one.queued_ahead, one.max_queue),
            one.in_flight,
            format!("{} of {:.0}", one.observed_rpm, one.effective_rpm),
            if one.estimated_wait_seconds > 0.0005 {
                time(one.estimated_wait_seconds)
            } else {
                "none".into()
            },
        );
        let counts = format!(" {:>9} {errors:>7} {:>7}", one.sent, one.cooldowns);
        let (name, words) =
            (format!("{:<names$}", cut(&one.provider, names)), format!("{words:<WORDS$}"));
        lines.push(vec![
            (Tone::Strong, name),
            (Tone::Plain, figures),
            (tone, words),
            (Tone::Plain, counts),
        ]);
        let waiting: Vec<&Waiting> =
            live.queue.queue.iter().filter(|waiting| waiting.provider == one.provider).collect();
        lines.push(strip(one, &waiting, live.stats.server.time, screen.columns));
        for waiting in waiting.iter().take(SHOWN_WAITING) {
            let who = format!(
                "  {:>3}  {:<names$} {:<names$} waited {:>7}, goes in {:>7}",
                waiting.position,
                cut(&waiting.client, names),
                cut(&waiting.model, names),
                time(waiting.waited_seconds),
                time(waiting.eta_seconds),
            );
            lines.push(vec![(Tone::Plain, who)]);
        }
        let more = one.queued_ahead.saturating_sub(waiting.len().min(SHOWN_WAITING));
        if more > 0 {
            lines.push(vec![(Tone::Soft, format!("       and {more} more"))]);
        }
        lines.push(Line::new());
    }
    lines
}

/// What the next send waits for.
fn state(one: &Provider) -> (String, Tone) {
    let (words, tone) = match (&*one.held_by, one.queued_ahead) {
        ("cooldown", _) => ("the provider asked to pause", Tone::Warn),
        ("day", _) => ("the day's budget is spent", Tone::Bad),
        (_, 0) if one.in_flight == 0 => ("idle", Tone::Soft),
        (_, 0) => ("at work", Tone::Good),
        ("cadence", _) => ("waits for its slot", Tone::Sent),
        ("window", _) => ("the minute is full", Tone::Sent),
        ("tokens", _) => ("the minute's tokens are spent", Tone::Warn),
        ("concurrency", _) => ("waits for an answer to end", Tone::Sent),
        _ => ("sends", Tone::Sent),
    };
    (words.to_owned(), tone)
}

/// The sends on a time line: what went is left of the bar, what waits right of it.
fn strip(one: &Provider, waiting: &[&Waiting], now: f64, columns: usize) -> Line {
    let width = columns.saturating_sub(4).clamp(20, 120);
    let (now_column, seconds) = (width * 2 / 3, (one.interval_seconds * 30.0).clamp(15.0, 180.0));
    let column = |after: f64| {
        let column = now_column as f64 + after * width as f64 / seconds;
        (column >= 0.0 && column < width as f64).then_some(column as usize)
    };
    let mut cells = vec!['·'; width];
    let mut mark = |at: Option<usize>, with: char| {
        if let Some(cell) = at.and_then(|at| cells.get_mut(at)) {
            *cell = with;
        }
    };
    waiting.iter().for_each(|waiting| mark(column(waiting.eta_seconds.max(0.0)), '○'));
    one.recent_sends.iter().for_each(|at| mark(column((at - now).min(0.0)), '●'));
    mark(Some(now_column), '│');
    let past: String = cells[..now_column].iter().collect();
    let to_come: String = cells[now_column..].iter().collect();
    vec![(Tone::Plain, "  ".into()), (Tone::Sent, past), (Tone::Soft, to_come)]
}

fn requests(requests: &Requests, names: usize) -> Vec<Line> {
    let head = format!(
        "{:<8} {:<6} {:<names$} {:<names$} {:>7} {:>7} {:>7}  {:<names$} {}",
        "TIME UTC", "STATUS", "CLIENT", "MODEL", "QUEUED", "BYTE", "TOTAL", "PROVIDER", "ERROR"
    );
    let mut lines = vec![vec![(Tone::Soft, head)]];
    for one in &requests.requests {
        let second = one.time.max(0.0) as u64 % 86_400;
        let time_of_day =
            format!("{:02}:{:02}:{:02} ", second / 3600, second / 60 % 60, second % 60);
        let what = format!(
            " {:<names$} {:<names$} {:>7} {:>7} {:>7}  {:<names$} ",
            cut(&one.client, names),
            cut(one.model.as_deref().unwrap_or(&one.path), names),
            one.queued_seconds.map(time).unwrap_or_default(),
            time(one.first_byte_seconds),
            time(one.total_seconds),
            cut(one.provider.as_deref().unwrap_or(""), names),
        );
        let tone = match one.status {
            500.. => Tone::Bad,
            400.. => Tone::Warn,
            _ if one.error.is_some() => Tone::Warn,
            _ => Tone::Good,
        };
        let (status, error) =
            (format!("{:<6}", one.status), clean(one.error.as_deref().unwrap_or("")));
        lines.push(vec![
            (Tone::Soft, time_of_day),
            (tone, status),
            (Tone::Plain, what),
            (tone, error),
        ]);
    }
    lines
}

/// As much of a line as fits. A tone ends where its piece does.
fn write_line(text: &mut String, line: Line, screen: Screen) {
    let mut room = screen.columns;
    for (tone, piece) in line {
        let piece: String = piece.chars().take(room).collect();
        room -= piece.chars().count();
        let written = match screen.colour && tone != Tone::Plain {
            true => write!(text, "\x1b[{}m{piece}\x1b[0m", tone.code()),
            false => write!(text, "{piece}"),
        };
        written.expect("a String takes whatever is written to it");
    }
    let end = text.trim_end_matches(' ').len();
    text.truncate(end);
    text.push('\n');
}

fn cut(text: &str, columns: usize) -> String {
    let text = clean(text);
    match text.char_indices().nth(columns) {
        None => text,
        Some(_) => text.chars().take(columns - 1).chain(['…']).collect(),
    }
}

/// Without what could move the cursor or turn the writing round.
fn clean(text: &str) -> String {
    text.chars().map(|char| if log::is_harmful(char) { '\u{fffd}' } else { char }).collect()
}

/// A time for people, to two or three figures.
fn time(seconds: f64) -> String {
    match seconds {
        ..0.0995 => format!("{:.0} ms", seconds * 1e3),
        ..9.95 => format!("{seconds:.1} s"),
        ..119.5 => format!("{seconds:.0} s"),
        ..7200.0 => format!("{:.0} min", seconds / 60.0),
        ..172_800.0 => format!("{:.0} h", seconds / 3600.0),
        _ => format!("{:.0} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn live(model: &str) -> Live {
        let provider = json!({"provider": "nim", "interval_seconds": 1.5, "max_queue": 1000, "queued_ahead": 7, "in_flight": 1,
            "effective_rpm": 40.0, "observed_rpm": 20, "held_by": "cadence", "estimated_wait_seconds": 9.2, "sent": 120,
            "upstream_4xx": 2, "upstream_5xx": 0, "upstream_errors": 1, "cooldowns": 3,
            "recent_sends": [985.0, 998.5, 1000.0]});
        let waiting = json!({"provider": "nim", "position": 1, "client": "chat", "model": model, "waited_seconds": 4.0,
            "eta_seconds": 1.5});
        let request = json!({"time": 3723.0, "client": "10.0.0.7", "model": model, "path": "/v1/x", "provider": "nim",
            "status": 503, "error": "queue_full", "queued_seconds": 0.25, "first_byte_seconds": 0.5, "total_seconds": 61.0});
        let all = json!({
            "stats": {"server": {"version": "1.2.3", "time": 1000.0, "uptime_seconds": 7500.0}, "providers": [provider]},
            "queue": {"queue": [waiting]},
            "requests": {"count": 42, "requests": [request]},
        });
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn a_screen() {
        let screen = Screen { columns: 140, rows: 40, colour: false };
        let text = draw("http://gateway:8080", Ok(&live("z-ai/glm-5.1")), screen);
        for part in [
            "limitrate 1.2.3 at http://gateway:8080, up for 2 h, 42 requests\n",
            "\nnim                             7/1000      1     20 of 40   9.2 s  waits for its slot                    120       3       3\n",
            "    1  chat                       z-ai/glm-5.1               waited   4.0 s, goes in   1.5 s\n",
            "       and 6 more\n",
            "\n01:02:03 503    10.0.0.7                   z-ai/glm-5.1                 0.2 s   0.5 s    61 s  nim                        queue_full\n",
        ] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        let strip = text.lines().find(|line| line.contains('│')).unwrap();
        let at = |mark: char| {
            strip.chars().enumerate().filter(|(_, cell)| *cell == mark).map(|(at, _)| at).collect()
        };
        let (sent, now, waits): (Vec<_>, Vec<_>, Vec<_>) = (at('●'), at('│'), at('○'));
        assert_eq!(
            (sent.len(), now.len(), waits.len()),
            (2, 1, 1),
            "the bar covers what goes just now: {strip}"
        );
        assert!(sent.iter().all(|sent| *sent < now[0]) && waits[0] > now[0], "{strip}");
        assert_eq!(now[0] - sent[1], waits[0] - now[0], "1.5 s on either side: {strip}");
    }

    #[test]
    fn no_line_is_longer_or_more_than_there_is_room_for() {
        for (columns, rows) in [(80, 24), (20, 5), (1, 1), (0, 0)] {
            let text = draw(
                "http://gateway:8080",
                Ok(&live("z-ai/glm-5.1")),
                Screen { columns, rows, colour: false },
            );
            assert!(text.lines().count() < rows.max(1), "{rows}: {text}");
            assert!(text.lines().all(|line| line.chars().count() <= columns), "{columns}: {text}");
        }
    }

    #[test]
    fn nobody_moves_the_cursor_but_this_program() {
        let hostile = "a\u{1b}[2Jb\u{9b}2J\r\n\u{202e}c";
        let screen = Screen { columns: 200, rows: 50, colour: true };
        let text = draw(hostile, Err((hostile, &live(hostile))), screen);
        assert!(text.contains("no answer, trying again"));
        let own = ["\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[36m"];
        let rest = own.iter().fold(text, |text, own| text.replace(own, ""));
        assert!(
            !rest.chars().any(|char| char != '\n' && (char.is_control() || char == '\u{202e}')),
            "{rest:?}"
        );
    }

    #[test]
    fn times_for_people() {
        for (seconds, want) in [
            (0.0, "0 ms"),
            (0.25, "0.2 s"),
            (9.9, "9.9 s"),
            (61.0, "61 s"),
            (600.0, "10 min"),
            (1e4, "3 h"),
            (1e6, "12 days"),
        ] {
            assert_eq!(time(seconds), want);
        }
    }
}
