//! `hosts:`: further names under which clients reach the gateway.

use super::section::{Found, Section, Walk};

/// Stands for any one or more labels in front of a name.
const WILDCARD: &str = "*.";

/// Names that the gateway answers to besides those of a local network; by default none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosts(Vec<String>);

impl Hosts {
    /// Whether a name is one of these. `name` is in lower case and has no dot at its end.
    pub fn contain(&self, name: &str) -> bool {
        self.0.iter().any(|known| match known.strip_prefix(WILDCARD) {
            Some(domain) => is_below(name, domain),
            None => name == known,
        })
    }

    /// As in the file.
    pub fn names(&self) -> &[String] {
        &self.0
    }
}

/// Whether `name` is `label.domain`, with one label or more.
pub fn is_below(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain)
        .and_then(|front| front.strip_suffix('.'))
        .is_some_and(|front| !front.is_empty())
}

/// Reads the list.
pub(super) fn hosts(keys: &mut Section<'_, '_, '_>) -> Hosts {
    let Some(found) = keys.optional("hosts") else { return Hosts::default() };
    let remedy = "write e.g. hosts: [gateway.example.com, \"*.example.org\"]";
    let items = keys.walk.items(&found, remedy);
    Hosts(items.iter().filter_map(|item| host(keys.walk, item)).collect())
}

fn host(walk: &mut Walk<'_>, item: &Found<'_>) -> Option<String> {
    let text = walk.text(item)?;
    let name = text.value.strip_suffix('.').unwrap_or(&text.value).to_ascii_lowercase();
    if is_name(name.strip_prefix(WILDCARD).unwrap_or(&name)) {
        return Some(name);
    }
    let problem = if text.value == "*" {
        "matches every name, those of strangers' pages included; list the names, or set auth_token"
            .into()
    } else if !text.value.is_ascii() {
        "is not ASCII; write it as browsers send it, e.g. xn--bcher-kva.example".into()
    } else {
        let shown = text.shown;
        format!(
            "must be a host name, not {shown}; write it without scheme and port, \
             e.g. gateway.example.com or *.example.org"
        )
    };
    walk.fault(item, problem);
    None
}

/// Labels of letters, digits, `-` and `_`, parted by dots.
fn is_name(name: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_labels_in_front() {
        let hosts = Hosts(vec!["gateway.example.com".into(), "*.example.org".into()]);
        for (name, want) in [
            ("gateway.example.com", true),
            ("a.gateway.example.com", false),
            ("example.com", false),
            ("a.example.org", true),
            ("a.b.example.org", true),
            ("example.org", false),
            (".example.org", false),
            ("evilexample.org", false),
            ("a.example.org.evil.example", false),
        ] {
            assert_eq!(hosts.contain(name), want, "{name}");
        }
        assert!(!Hosts::default().contain(""));
    }

    #[test]
    fn a_name_has_labels_and_nothing_else() {
        for name in ["a", "gateway.example.com", "box_1.lan", "xn--bcher-kva.example", "10.0.0.1"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".", "a..b", ".a", "a.", "a b", "a/b", "a:80", "*", "a.*.b", "[::1]"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
