//! The known word that somebody probably meant.

use crate::edits::edits;

/// The one of `known` that `word` is a slip of the pen away from; case, `_` and `-` count for nothing.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let word = plain(word);
    let slips = 1 + word.len() / 4;
    let distance = |candidate: &&&str| edits(&word, &plain(candidate));
    known.iter().min_by_key(distance).filter(|best| distance(best) <= slips).copied()
}

fn plain(word: &str) -> Vec<char> {
    word.chars().filter(|c| !matches!(c, '_' | '-')).flat_map(char::to_lowercase).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_slips_and_nothing_else() {
        let known = ["max_wait_seconds", "rpm", "base_url", "api_key"];
        for (word, expected) in [
            ("max_wait_second", Some("max_wait_seconds")),
            ("rpms", Some("rpm")),
            ("baseUrl", Some("base_url")),
            ("api-key", Some("api_key")),
            ("timeout", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, &known), expected, "{word}");
        }
        assert_eq!(nearest("rpm", &[]), None);
    }
}
