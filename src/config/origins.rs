//! `cors_origins:`: which web pages may call the gateway.

use url::Url;

use super::section::{Found, Section, Walk};

/// The word for every origin.
const ANY: &str = "*";

/// The origins (RFC 6454) whose pages may call; by default none are told anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Origins {
    /// CORS is no matter of the gateway.
    #[default]
    Unset,
    /// All.
    Any,
    /// These, each as browsers send it.
    Listed(Vec<String>),
}

/// Reads the list.
pub(super) fn cors_origins(keys: &mut Section<'_, '_, '_>) -> Origins {
    let Some(found) = keys.optional("cors_origins") else { return Origins::Unset };
    let remedy =
        "write e.g. cors_origins: [\"https://chat.example.com\"], or [\"*\"] for every page";
    let items = keys.walk.items(&found, remedy);
    let origins: Vec<String> = items.iter().filter_map(|item| origin(keys.walk, item)).collect();
    if !origins.iter().any(|origin| origin == ANY) {
        return Origins::Listed(origins);
    }
    if origins.len() > 1 {
        keys.walk.fault(
            &found,
            "has * beside others, which it covers; write [\"*\"] alone, or only the others",
        );
    }
    Origins::Any
}

fn origin(walk: &mut Walk<'_>, item: &Found<'_>) -> Option<String> {
    let text = walk.text(item)?;
    let problem = match serialized(&text.value) {
        Some(origin) if origin == text.value => return Some(origin),
        Some(origin) => format!("is not as browsers send it; write {origin}"),
        None if !text.value.is_ascii() => {
            "is not ASCII; write it as browsers send it, e.g. https://xn--bcher-kva.example".into()
        }
        None => {
            let shown = text.shown;
            format!(
                "must be an origin, not {shown}; write scheme://host or scheme://host:port, e.g. https://chat.example.com"
            )
        }
    };
    walk.fault(item, problem);
    None
}

/// What a browser makes of it (WHATWG HTML, "serialization of an origin"); pages of applications and extensions have schemes
/// of their own.
fn serialized(text: &str) -> Option<String> {
    if text == ANY {
        return Some(text.to_owned());
    }
    let url = Url::parse(text).ok()?;
    let origin = url.origin();
    if origin.is_tuple() {
        return Some(origin.ascii_serialization());
    }
    let host = url.host_str().filter(|host| !host.is_empty())?.to_ascii_lowercase();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    Some(format!("{}://{host}{port}", url.scheme()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_what_a_browser_sends() {
        for (text, want) in [
            ("*", Some("*")),
            ("https://chat.example.com", Some("https://chat.example.com")),
            ("https://chat.example.com/", Some("https://chat.example.com")),
            ("https://chat.example.com/app?x#y", Some("https://chat.example.com")),
            ("HTTPS://Chat.Example.com:443", Some("https://chat.example.com")),
            ("http://localhost:3000", Some("http://localhost:3000")),
            ("http://[::1]:3000", Some("http://[::1]:3000")),
            ("http://user@host", Some("http://host")),
            ("http://xn--bcher-kva.example", Some("http://xn--bcher-kva.example")),
            ("http://b\u{fc}cher.example", None),
            ("app://obsidian.md", Some("app://obsidian.md")),
            ("chrome-extension://abcdef", Some("chrome-extension://abcdef")),
            ("tauri://localhost", Some("tauri://localhost")),
            ("null", None),
            ("", None),
            ("chat.example.com", None),
            ("localhost:3000", None),
            ("file:///x", None),
        ] {
            assert_eq!(serialized(text).as_deref(), want, "{text}");
        }
    }
}
