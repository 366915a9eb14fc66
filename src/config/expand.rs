//! `${VAR}`, `${VAR:-default}` and `$$` inside one string value.
//!
//! Works on parsed values, so what a variable holds never changes the structure of the file. No fault repeats the text
//! around a variable: it may be part of a key.

use super::Env;

/// Expands `text`; a `$` before anything but `{` or `$` is a plain dollar. `Err` is the fault, as a sentence.
///
/// As in a shell, `${VAR}` takes a set but empty variable as it is, and `${VAR:-default}` replaces it.
pub(super) fn expand(text: &str, env: Env<'_>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar + 1..];
        if let Some(after) = rest.strip_prefix('{') {
            let Some((inside, after)) = after.split_once('}') else {
                return Err(
                    "has a `${` without its `}`; write ${NAME}, or $${ for a plain ${".into()
                );
            };
            out.push_str(&variable(inside, env)?);
            rest = after;
        } else {
            out.push('$');
            rest = rest.strip_prefix('$').unwrap_or(rest);
        }
    }
    out.push_str(rest);
    Ok(out)
}

/// The value of what stands between `${` and `}`.
fn variable(inside: &str, env: Env<'_>) -> Result<String, String> {
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    if !is_name(name) || default.is_some_and(|default| default.contains("${")) {
        return Err(
            "has a `${...}` that names no variable; write ${NAME} or ${NAME:-default}, or $${ for a plain ${".into()
        );
    }
    match (env(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.replace("$$", "$")),
        (None, None) => Err(format!(
            "the variable {name} is not set; run export {name}=... first, or write ${{{name}:-default}}"
        )),
    }
}

/// Whether a variable can be called that.
pub(super) fn is_name(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "KEY" => Some("a: b # c ${KEY} $$".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn expands() {
        for (text, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("${KEY}", "a: b # c ${KEY} $$"),
            ("<${KEY}|${EMPTY}>", "<a: b # c ${KEY} $$|>"),
            ("${EMPTY:-d}", "d"),
            ("${NONE:-d}", "d"),
            ("${NONE:-}", ""),
            ("${NONE:-:-a$$b}", ":-a$b"),
            ("${KEY:-d}", "a: b # c ${KEY} $$"),
            ("$$", "$"),
            ("$${KEY}", "${KEY}"),
            ("$$$$", "$$"),
            ("$$${EMPTY}", "$"),
            ("a$b $ 5$", "a$b $ 5$"),
            ("}${EMPTY}}", "}}"),
        ] {
            assert_eq!(expand(text, &env).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refuses() {
        for (text, fault) in [
            ("${NONE}", "the variable NONE is not set; run export NONE=..."),
            ("sk-secret${NONE", "has a `${` without its `}`"),
            ("${", "has a `${` without its `}`"),
            ("${}", "names no variable"),
            ("${:-d}", "names no variable"),
            ("${1A}", "names no variable"),
            ("${A-d}", "names no variable"),
            ("${A B}", "names no variable"),
            ("${Ä}", "names no variable"),
            ("${A:-${KEY}}", "names no variable"),
        ] {
            let problem = expand(text, &env).expect_err(text);
            assert!(problem.contains(fault), "{text}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
    }

    proptest! {
        #[test]
        fn doubled_dollars_round_trip(text in "[a-z$ {}]*|.*") {
            prop_assert_eq!(expand(&text.replace('$', "$$"), &env), Ok(text));
        }

        #[test]
        fn a_value_is_never_expanded_again(value in ".*") {
            let env = |_: &str| Some(value.clone());
            prop_assert_eq!(expand("<${V}>", &env), Ok(format!("<{value}>")));
        }
    }
}
