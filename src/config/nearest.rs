//! The known word that somebody probably meant.

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

/// The Levenshtein distance, one row at a time.
fn edits(from: &[char], to: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let swapped = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = swapped.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("rpm", "rmp", 2), ("x", "x", 0)]
        {
            let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
            assert_eq!(edits(&a, &b), expected);
            assert_eq!(edits(&b, &a), expected);
        }
    }

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
