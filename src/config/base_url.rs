//! `base_url`: an http or https URL, taken apart.
//!
//! Faults never repeat the URL: whoever writes a password into it should not find it in a log.

use url::{Host, ParseError, Url};

use super::BaseUrl;

const EXAMPLE: &str = "write e.g. https://api.example.com/v1";

/// Why a text is no URL, as what a sentence about it says.
pub fn url_fault(text: &str, error: ParseError) -> String {
    match error {
        ParseError::IdnaError if !text.is_ascii() => {
            "has a host that is not ASCII (DNS has other names for those, like xn--bcher-kva.example)".into()
        }
        ParseError::IdnaError => "is no valid URL (a character of its host is in no name)".into(),
        other => format!("is no valid URL ({other})"),
    }
}

/// Takes `text` apart; `Err` is the fault, as a sentence with its remedy.
pub(super) fn parse(text: &str) -> Result<BaseUrl, String> {
    let url = Url::parse(text).map_err(|error| match error {
        ParseError::RelativeUrlWithoutBase => {
            format!("does not begin with http:// or https://; {EXAMPLE}")
        }
        ParseError::EmptyHost => format!("has no host; {EXAMPLE}"),
        other => format!("{}; {EXAMPLE}", url_fault(text, other)),
    })?;
    let tls = match url.scheme() {
        "http" => false,
        "https" => true,
        _ => {
            return Err(format!("does not begin with http:// or https://; {EXAMPLE}"));
        }
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err(
            "has a user name or password before the host; move it to api_key or headers".into()
        );
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(
            "has a ? or # part; end it with the path (a caller's own query is passed on)".into()
        );
    }
    let host = host(&url).ok_or_else(|| format!("has no host; {EXAMPLE}"))?;
    let port =
        port(&url).ok_or_else(|| format!("has port 0, which nobody can listen on; {EXAMPLE}"))?;
    Ok(BaseUrl::new(tls, host, port, url.path().trim_end_matches('/').to_owned()))
}

/// The host of a URL; an IPv6 address without brackets.
pub(super) fn host(url: &Url) -> Option<String> {
    Some(match url.host()? {
        Host::Domain(name) => name.to_owned(),
        Host::Ipv4(address) => address.to_string(),
        Host::Ipv6(address) => address.to_string(),
    })
}

/// The port of a URL, which may be its scheme's; `None` for 0.
pub(super) fn port(url: &Url) -> Option<u16> {
    url.port_or_known_default().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_apart() {
        for (text, tls, host, port, path) in [
            ("https://api.example.com/v1", true, "api.example.com", 443, "/v1"),
            ("https://api.example.com/v1/", true, "api.example.com", 443, "/v1"),
            ("https://api.example.com", true, "api.example.com", 443, ""),
            ("http://localhost:11434/", false, "localhost", 11434, ""),
            ("HTTP://Box.LAN:80/api/paas/v4", false, "box.lan", 80, "/api/paas/v4"),
            ("https://[fd00::1]:8443/v1beta/openai//", true, "fd00::1", 8443, "/v1beta/openai"),
            ("http://192.168.1.7/a%20b/c d", false, "192.168.1.7", 80, "/a%20b/c%20d"),
        ] {
            let expected = BaseUrl::new(tls, host.into(), port, path.into());
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refuses_with_a_remedy_and_without_the_url() {
        for (text, words) in [
            ("", "does not begin with http"),
            ("secret.example.com/v1", "does not begin with http"),
            ("localhost:11434/secret", "does not begin with http"),
            ("ftp://secret/v1", "does not begin with http"),
            ("https://", "has no host"),
            ("https://secret host/", "no valid URL"),
            (
                "https://s\u{e9}cret/",
                "not ASCII (DNS has other names for those, like xn--bcher-kva.example); write e.g. https://",
            ),
            ("https://secret:99999/", "no valid URL (invalid port number)"),
            ("https://h:0/secret", "has port 0"),
            ("https://secret@h/", "user name or password"),
            ("https://:secret@h/", "user name or password"),
            ("https://h/?key=secret", "? or #"),
            ("https://h/v1#secret", "? or #"),
        ] {
            let problem = parse(text).expect_err(text);
            assert!(problem.contains(words) && problem.contains("; "), "{text}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
    }
}
