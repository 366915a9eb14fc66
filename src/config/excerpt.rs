//! The line that a fault is on, as far as it may be seen, and the place in it.
//!
//! A file may hold keys in plain, also where none belongs: under a misspelt name, in a comment, in a line that is no YAML.
//! So nothing is seen but what is known to be harmless: the settings' own names, `${NAME}`, brackets and quotes, and what
//! the fault is about if that is a key or the value of a setting in [`OPEN`]. All else is `***`, which tells no length.

use std::iter::repeat_n;

use super::expand::is_name;
use super::tree::{Kind, Node};

/// The settings whose values may be seen.
const OPEN: &str = "adaptive attempts body_timeout_seconds ca_file capacity cert_file connect_timeout_seconds cooldown \
    cors_origins day_resets_at drain_queue drain_seconds fairness fallback format header_timeout_seconds heartbeat heartbeat_after_seconds \
    heartbeat_json host hosts id idle_timeout_seconds interval_seconds keep_alive_seconds key_file level max_body_bytes \
    max_buffered_bytes max_buffered_bytes_per_client max_concurrent max_connections max_connections_per_client \
    max_cooldown_seconds max_head_bytes max_queue max_wait_seconds \
    mode models name pool_idle_seconds pool_max_idle port priority request_timeout_seconds routing rpd rpm socket \
    socket_mode state_file statuses strict_window tpm trusted_proxies upstream window_margin_ms write_timeout_seconds";
/// Those of which only the name may be seen: secrets, URLs, which may hold one, and sections.
const CLOSED: &str = "api_key api_keys auth_token base_url clients headers log providers proxy rate_limit retry server tls token";

/// What stands for everything that may not be seen.
const MASK: &str = "***";
/// What may stand around a word; around one that is masked, no more of it is seen than brackets and quotes need.
const BEFORE: [char; 11] = ['[', '{', '"', '\'', '!', '&', '*', '|', '>', '@', '`'];
const BEHIND: [char; 6] = [']', '}', '"', '\'', ',', ':'];
const MASKED_FRONT_CHARS: usize = 1;
const MASKED_BACK_CHARS: usize = 2;

/// Longer values are cut.
const VALUE_CHARS: usize = 40;
/// Longer lines are cut around the fault, so that they fit a terminal.
const LINE_CHARS: usize = 96;
/// What is left in front of the fault then.
const FRONT_CHARS: usize = 30;
const CUT: &str = "...";

/// A line as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Excerpt {
    /// What may be seen of the line.
    pub line: String,
    /// What goes below it.
    pub carets: String,
}

/// What a fault is about, in its line.
enum About {
    /// It may be seen.
    Harmless,
    /// It may not.
    Secret,
    /// What may be seen of it is as of the rest of the line.
    Any,
}

/// The line of `text` on which `node` begins, at `position`. `path` are the keys that lead to it.
pub(super) fn of_node(
    text: &str,
    position: (usize, usize),
    node: &Node,
    is_key: bool,
    path: &str,
) -> Option<Excerpt> {
    let (line, before) = split_at(text, position)?;
    let rest: String = line[before..].iter().collect();
    let len = extent(&rest, node);
    let harmless = match (&node.kind, len) {
        (Kind::Null, None) => return Some(excerpt(&line, before, Some(0), About::Any)),
        (Kind::List(_) | Kind::Map(_), _) | (_, None) => {
            return Some(excerpt(&line, before, len, About::Any));
        }
        // It is in `path`.
        (Kind::Text(_), _) if is_key => true,
        (Kind::Text(raw), _) if is_variable(raw) => true,
        // An alias shows what stands elsewhere, perhaps below a setting that is closed.
        _ => !is_key && is_open(path) && !text.contains('&'),
    };
    let plain = rest.chars().take(len.unwrap_or_default()).all(is_plain);
    Some(excerpt(
        &line,
        before,
        len,
        if harmless && plain { About::Harmless } else { About::Secret },
    ))
}

/// The line of `text` in which something at `position` is no YAML.
pub(super) fn of_syntax(text: &str, position: (usize, usize)) -> Option<Excerpt> {
    let (line, at) = split_at(text, position)?;
    // The whole word: a part of one could look like a setting's name.
    let front = line[..at].iter().rev().take_while(|c| !c.is_whitespace()).count();
    let behind = line[at..].iter().take_while(|c| !c.is_whitespace()).count();
    let (before, len) = if behind > 0 { (at - front, front + behind) } else { (at, 0) };
    Some(excerpt(&line, before, Some(len), About::Any))
}

/// A line, blanks for tabs and byte order marks, and how many of its characters come before `column`.
fn split_at(text: &str, (line, column): (usize, usize)) -> Option<(Vec<char>, usize)> {
    // As the parser counts lines (YAML 1.1 section 5.4).
    let text = text.replace("\r\n", "\n");
    let line = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).nth(line - 1)?;
    let blank = |c| if matches!(c, '\t' | '\u{feff}') { ' ' } else { c };
    let line: Vec<char> = line.chars().map(blank).collect();
    let before = (column - 1).min(line.len());
    Some((line, before))
}

/// How many characters of `rest` are `node`, which begins there; `None` where it goes on in the next line, or is not
/// written there at all.
fn extent(rest: &str, node: &Node) -> Option<usize> {
    let until = |end: fn(char) -> bool| rest.chars().take_while(|c| !end(*c)).count();
    let len = match &node.kind {
        Kind::Text(value) if !value.is_empty() && rest.starts_with(value.as_str()) => {
            value.chars().count()
        }
        Kind::Text(_) => return quoted(rest),
        Kind::List(_) => 0,
        // Its first key.
        Kind::Map(_) => until(|c| !c.is_alphanumeric() && c != '_'),
        Kind::Null | Kind::Bool(_) | Kind::Number(_) => {
            until(|c| c.is_whitespace() || matches!(c, ',' | ':' | ']' | '}'))
        }
    };
    Some(len).filter(|len| *len > 0)
}

/// The length of a quoted text with its quotes, if it ends in this line.
fn quoted(rest: &str) -> Option<usize> {
    let quote = rest.chars().next().filter(|first| matches!(first, '"' | '\''));
    let mut escaped = false;
    let end = rest.chars().skip(1).position(|c| {
        let is_end = Some(c) == quote && !escaped;
        escaped = quote == Some('"') && c == '\\' && !escaped;
        is_end
    });
    end.map(|inside| inside + 2)
}

/// Of a line in which the fault is about `len` characters behind the first `before`.
fn excerpt(line: &[char], before: usize, len: Option<usize>, about: About) -> Excerpt {
    let end = (before + len.unwrap_or(1)).min(line.len());
    let [front, middle, behind] =
        [&line[..before], &line[before..end], &line[end..]].map(String::from_iter);
    let mut seen = String::new();
    mask(&front, &mut seen);
    let mut start = seen.chars().count();
    match about {
        About::Harmless => seen.push_str(&cut(&middle)),
        About::Secret if !middle.is_empty() => push_mask(&mut seen),
        About::Secret | About::Any => mask(&middle, &mut seen),
    }
    let end = seen.chars().count();
    if end <= start && !middle.is_empty() {
        // It has become one with what is masked before it.
        start = end.saturating_sub(MASK.len());
    }
    let carets: usize = seen.chars().skip(start).map(columns).sum();
    mask(behind.split(" #").next().unwrap_or_default(), &mut seen);
    let (line, start) = window(seen.trim_end(), start, end);
    Excerpt { line, carets: format!("{}{}", " ".repeat(start), "^".repeat(carets.max(1))) }
}

/// Appends what may be seen of `text`.
fn mask(text: &str, seen: &mut String) {
    let mut rest = text;
    while !rest.is_empty() {
        let word = rest.trim_start();
        seen.extend(repeat_n(' ', rest.chars().count() - word.chars().count()));
        let (word, behind) = word.split_at(word.find(char::is_whitespace).unwrap_or(word.len()));
        mask_word(word, seen);
        rest = behind;
    }
}

fn mask_word(word: &str, seen: &mut String) {
    let core = word.trim_start_matches(BEFORE);
    let front = &word[..word.len() - core.len()];
    // The last bracket of a variable is its own.
    let variable =
        core.strip_prefix("${").and_then(|rest| rest.find('}')).map_or(0, |end| "${}".len() + end);
    let (bare, behind) = core.split_at(core.trim_end_matches(BEHIND).len().max(variable));
    let is_setting = OPEN.split(' ').chain(CLOSED.split(' ')).any(|name| name == bare);
    if is_setting
        || is_variable(bare)
        || matches!(bare, "-" | "---")
        || bare.is_empty() && word.len() <= MASK.len()
    {
        seen.extend([front, bare, behind]);
        return;
    }
    // All of these are ASCII.
    seen.push_str(&front[..front.len().min(MASKED_FRONT_CHARS)]);
    push_mask(seen);
    seen.push_str(&behind[behind.len().saturating_sub(MASKED_BACK_CHARS)..]);
}

/// One mask for several words, since their number is nobody's business either.
fn push_mask(seen: &mut String) {
    let before = seen.trim_end().len();
    match seen[..before].ends_with(MASK) {
        true => seen.truncate(before),
        false => seen.push_str(MASK),
    }
}

/// Whether it is a variable and nothing else.
fn is_variable(text: &str) -> bool {
    text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}')).is_some_and(is_name)
}

/// Whether the value at the end of `path` may be seen.
fn is_open(path: &str) -> bool {
    let name = path.rsplit('.').next().and_then(|last| last.split('[').next());
    // A header may be called like a setting.
    OPEN.split(' ').any(|open| Some(open) == name) && path.split('.').all(|name| name != "headers")
}

/// Whether a terminal shows it as it is: no control, no mark that is drawn over or turns around what follows.
fn is_plain(c: char) -> bool {
    matches!(c, '"' | '\'' | '\\') || c.escape_debug().count() == 1
}

/// How wide a terminal draws it (Unicode Standard Annex 11: the blocks that are wide throughout).
fn columns(c: char) -> usize {
    let wide = matches!(u32::from(c), 0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f | 0xff00..=0xff60 | 0xffe0..=0xffe6 | 0x1f300..=0x1faff | 0x20000..=0x3fffd);
    1 + usize::from(wide)
}

fn cut(value: &str) -> String {
    match value.char_indices().nth(VALUE_CHARS) {
        Some((end, _)) => format!("{}{CUT}", &value[..end]),
        None => value.to_owned(),
    }
}

/// What fits of a line around the characters from `start` to `end`, and where the first one is then.
fn window(line: &str, start: usize, end: usize) -> (String, usize) {
    let too_far = end + CUT.len() > LINE_CHARS;
    let skipped = if too_far { start.saturating_sub(FRONT_CHARS) } else { 0 };
    let front = if skipped > 0 { CUT } else { "" };
    let rest: Vec<char> = line.chars().skip(skipped).collect();
    let fits = rest.len() <= LINE_CHARS;
    let shown: String =
        rest.iter().take(if fits { rest.len() } else { LINE_CHARS - CUT.len() }).collect();
    (format!("{front}{shown}{}", if fits { "" } else { CUT }), front.len() + start - skipped)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::tree;
    use super::*;

    /// What is shown of the `n`-th node of `text`, in reading order, at the end of `path`.
    fn shown(text: &str, n: usize, path: &str) -> (String, String) {
        let tree = tree::parse(text).unwrap();
        let (node, is_key) = tree.find(n).unwrap();
        let excerpt =
            of_node(text, tree::position_of(text, n).unwrap(), node, is_key, path).unwrap();
        (excerpt.line, excerpt.carets)
    }

    #[track_caller]
    fn assert_shown(text: &str, n: usize, path: &str, line: &str, carets: &str) {
        assert_eq!(shown(text, n, path), (line.to_owned(), carets.to_owned()), "{text:?}");
    }

    #[test]
    fn values_are_seen_where_their_setting_is_harmless() {
        assert_shown("rpm: 0 # s3cret", 2, "providers[0].rate_limit.rpm", "rpm: 0", "     ^");
        assert_shown(
            "models: [a, 'b c']",
            4,
            "providers[0].models[1]",
            "models: [***, 'b c']",
            "              ^^^^^",
        );
        assert_shown("mode: \"a\\\"b\" ", 2, "p.mode", "mode: \"a\\\"b\"", "      ^^^^^^");
        for path in [
            "api_key",
            "server.clients[1].token",
            "p.api_keys[0]",
            "p.headers.rpm",
            "p.apikey",
            "p.base_url",
            "",
            "p.\"a.rpm\"",
        ] {
            assert_shown("rpm: s3cret", 2, path, "rpm: ***", "     ^^^");
            assert_shown("rpm: 's3cret of mine' # s3cret", 2, path, "rpm: ***", "     ^^^");
            assert_shown("rpm: 1234567890", 2, path, "rpm: ***", "     ^^^");
        }
    }

    #[test]
    fn keys_are_seen_as_they_are_in_the_path_and_their_values_are_not() {
        assert_shown("apikey: sk-s3cret", 1, "p.apikey", "apikey: ***", "^^^^^^");
        assert_shown(
            "{rpm: 1, s3cret: s3cret, token: s3cret}",
            1,
            "rpm",
            "{rpm: ***, ***: ***, token: ***}",
            " ^^^",
        );
        assert_shown("7: s3cret", 1, "p", "***: ***", "^^^");
        assert_shown("\u{feff}# a\nb:\tc", 1, "b", "b: ***", "^");
    }

    #[test]
    fn variables_are_seen_by_name_and_never_with_a_default() {
        assert_shown("api_key: ${KEY}", 2, "api_key", "api_key: ${KEY}", "         ^^^^^^");
        assert_shown(
            "api_key: \"${KEY}\"",
            2,
            "api_key",
            "api_key: \"${KEY}\"",
            "         ^^^^^^^^",
        );
        assert_shown("api_key: sk-${KEY}", 2, "api_key", "api_key: ***", "         ^^^");
        assert_shown("api_key: ${KEY:-s3cret}", 2, "api_key", "api_key: ***", "         ^^^");
        assert_shown(
            "{api_key: \"${KEY:-s3cret}\", rpm: 0}",
            4,
            "rpm",
            "{api_key: \"***\", rpm: 0}",
            "                      ^",
        );
    }

    #[test]
    fn values_of_many_lines_and_of_none() {
        assert_shown("api_key: |\n  s3cret", 2, "api_key", "api_key: |", "         ^");
        assert_shown("api_key: \"s3cret\n  s3cret\"", 2, "api_key", "api_key: \"***", "         ^");
        assert_shown("api_key: s3cret and\n  s3cret", 2, "api_key", "api_key: ***", "         ^^^");
        assert_shown("api_key:\n  s3cret", 2, "api_key", "  ***", "  ^^^");
        assert_shown("api_key: # s3cret", 2, "api_key", "api_key:", "        ^");
        assert_shown("name: \"\"", 2, "p.name", "name: \"\"", "      ^^");
        assert_shown("rpm: [s3cret, 2]", 2, "p.rpm", "rpm: [***, ***]", "     ^");
        assert_shown("retry:\n  s3cret: 1", 2, "retry", "  ***: ***", "  ^^^");
    }

    #[test]
    fn carets_are_as_wide_as_what_they_are_below() {
        assert_shown("name: 月之a", 2, "p.name", "name: 月之a", "      ^^^^^");
        assert_shown("name: é", 2, "p.name", "name: é", "      ^");
        // Marks that join or turn what is beside them would put the carets elsewhere.
        assert_shown("name: a\u{301}", 2, "p.name", "name: ***", "      ^^^");
        assert_shown("name: a\u{202e}b", 2, "p.name", "name: ***", "      ^^^");
    }

    #[test]
    fn long_lines_are_cut_around_the_fault() {
        let value = "x".repeat(200);
        let (line, carets) = shown(&format!("name: {value}"), 2, "p.name");
        assert_eq!(
            (line, carets),
            (format!("name: {}...", "x".repeat(40)), format!("      {}", "^".repeat(43)))
        );
        let list = format!(
            "{{models: [{}], rpm: 0, statuses: [{}]}}",
            "m, ".repeat(90),
            "500, ".repeat(90)
        );
        let (line, carets) = shown(&list, 94, "p.rpm");
        assert_eq!(line.find("rpm: 0").map(|at| at + 5), carets.find('^'), "{line}\n{carets}");
        assert!(
            line.starts_with("...")
                && line.ends_with("...")
                && line.len() <= LINE_CHARS + CUT.len(),
            "{line}"
        );
    }

    /// A setting that is in neither list is masked; this is where its name has to be judged.
    #[test]
    fn every_setting_of_the_example_is_judged() {
        fn names<'n>(node: &'n Node, found: &mut BTreeSet<&'n str>) {
            match &node.kind {
                Kind::List(items) => items.iter().for_each(|item| names(item, found)),
                Kind::Map(entries) => {
                    for (key, value) in entries {
                        let Kind::Text(name) = &key.kind else { panic!("{key:?}") };
                        found.insert(name);
                        if name != "headers" {
                            names(value, found);
                        }
                    }
                }
                _ => {}
            }
        }
        let switched_on = |line: &str| {
            let setting = line.trim_start().strip_prefix('#').unwrap_or_default();
            let is_off = setting.starts_with("  ") || setting.starts_with(|first| first != ' ');
            format!("{}\n", if is_off { line.replacen('#', "", 1) } else { line.to_owned() })
        };
        let example: String =
            include_str!("../../config.example.yaml").lines().map(switched_on).collect();
        let tree = tree::parse(&example).unwrap();
        let mut settings = BTreeSet::new();
        names(&tree, &mut settings);
        let judged: BTreeSet<&str> = OPEN.split(' ').chain(CLOSED.split(' ')).collect();
        let missing: Vec<_> = settings.difference(&judged).collect();
        assert!(settings.len() > 40 && missing.is_empty(), "{missing:?}");
    }

    proptest! {
        /// Whatever the line and wherever the fault, no word is seen but a setting's or a variable's name.
        #[test]
        fn a_line_that_is_no_yaml_shows_only_names(
            words in prop::collection::vec("[\\[{\"'!&*|>@`$ ]{0,3}([a-z0-9é-]{1,9}|rpm|\\$\\{[A-Z]{1,3}\\}|: |#)[]}\"',:# ]{0,3}", 0..9),
            column in 1_usize..60,
        ) {
            let line = words.concat();
            let shown = of_syntax(&line, (1, column)).unwrap().line;
            for word in shown.split(|c: char| !c.is_alphanumeric() && !matches!(c, '_' | '$' | '-')) {
                let name = word.trim_matches('-').is_empty() || OPEN.split(' ').chain(CLOSED.split(' ')).any(|name| name == word);
                let variable = word == "$" || shown.contains(&format!("${{{word}}}"));
                prop_assert!(name || variable, "{word:?} of {line:?} in {shown:?}");
            }
        }
    }
}
