//! `proxy:` of a provider, and the variables that stand in for it.
//!
//! For https these are curl's (curl(1), "Environment"): `https_proxy`, else `all_proxy`, in lower or upper case, but for whom
//! `no_proxy` exempts; that loopback needs none is Go's rule (`golang.org/x/net/http/httpproxy`). For http they do not
//! count: what they name need not open tunnels to other ports than 443, as Squid does not as it comes. No fault repeats
//! a URL, which may hold a password.

use std::net::IpAddr;

use url::Url;

use super::section::{Section, Walk};
use super::tree::Kind;
use super::{BaseUrl, Env, Network, Proxy, Secret, base_url};

const EXAMPLE: &str = "write e.g. http://proxy.lan:3128";

/// The proxy on the way to `base_url`: what the key says, or else what the environment does.
pub(super) fn proxy(keys: &mut Section<'_, '_, '_>, base_url: Option<&BaseUrl>) -> Option<Proxy> {
    let Some(found) = keys.find("proxy") else {
        let blamed = keys.find("base_url")?;
        let (variable, text) = from_environment(base_url?, keys.walk.env)?;
        return match parse(&text) {
            Ok(proxy) => Some(Proxy { variable: Some(variable), ..proxy }),
            Err(problem) => {
                let remedy = "or write proxy: none for this provider";
                keys.walk.fault(
                    &blamed,
                    format!(
                        "is reached by the proxy that {variable} holds, which {problem}; {remedy}"
                    ),
                );
                None
            }
        };
    };
    if matches!(found.node.kind, Kind::Null) {
        return None;
    }
    let text = keys.walk.text(&found).filter(|text| text.value != "none")?;
    parse(&text.value)
        .map_err(|problem| Walk::fault(keys.walk, &found, format!("{problem}; {EXAMPLE}, or none")))
        .ok()
}

/// The variable that names a proxy for this URL, and what it holds.
fn from_environment(base_url: &BaseUrl, env: Env<'_>) -> Option<(&'static str, String)> {
    if !base_url.tls {
        return None;
    }
    let first = |names: &[&'static str]| {
        let set =
            |name: &'static str| Some((name, env(name).filter(|value| !value.trim().is_empty())?));
        names.iter().copied().find_map(set)
    };
    // The one for everything may be of a kind that is not spoken here, and is not meant for us then.
    let for_all = || first(&["all_proxy", "ALL_PROXY"]).filter(|(_, url)| parse(url).is_ok());
    let found = first(&["https_proxy", "HTTPS_PROXY"]).or_else(for_all)?;
    let exempt =
        first(&["no_proxy", "NO_PROXY"]).is_some_and(|(_, list)| is_exempt(&list, base_url));
    (!is_loopback(&base_url.host) && !exempt).then_some(found)
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host.ends_with(".localhost")
        || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

/// Whether a list as in `no_proxy` has this host: `*`, a name (its subdomains too, with or without a leading dot), an
/// address, a network in CIDR notation; each but the last with a port if only that is meant.
fn is_exempt(list: &str, BaseUrl { host, port, .. }: &BaseUrl) -> bool {
    list.split([',', ' ']).filter(|entry| !entry.is_empty()).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" {
            return true;
        }
        if let Ok(ip) = host.parse::<IpAddr>()
            && entry.contains('/')
        {
            return Network::read(&entry).is_ok_and(|network| network.contains(ip));
        }
        let (name, only_port) = split_port(&entry);
        if only_port.is_some_and(|only| only != *port) {
            return false;
        }
        match (host.parse::<IpAddr>(), name.parse::<IpAddr>()) {
            (Ok(host), Ok(ip)) => host == ip,
            (Ok(_), Err(_)) | (Err(_), Ok(_)) => false,
            (Err(_), Err(_)) => {
                let name = name.trim_start_matches("*.").trim_start_matches('.');
                !name.is_empty()
                    && host
                        .strip_suffix(name)
                        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        }
    })
}

/// `name`, `name:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
fn split_port(entry: &str) -> (&str, Option<u16>) {
    if let Some((ip, rest)) = entry.strip_prefix('[').and_then(|entry| entry.split_once(']')) {
        return (ip, rest.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match entry.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') => (name, port.parse().ok()),
        _ => (entry, None),
    }
}

/// `Err` is a part of a sentence that begins with what is wrong.
fn parse(text: &str) -> Result<Proxy, String> {
    let text = text.trim();
    // curl and Go take a proxy without a scheme for http.
    let text = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let url = Url::parse(&text).map_err(|error| base_url::url_fault(&text, error))?;
    if url.scheme() != "http" {
        return Err(
            "does not begin with http://, the only kind of proxy that is spoken (HTTP CONNECT)"
                .into(),
        );
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return Err("has something behind its port".into());
    }
    let host = base_url::host(&url).ok_or("has no host")?;
    let port = base_url::port(&url).ok_or("has port 0")?;
    let decoded = |text: &str| {
        let bytes = percent_encoding::percent_decode_str(text);
        bytes
            .decode_utf8()
            .map(|text| text.into_owned())
            .map_err(|_| "has a user name or password that is not UTF-8")
    };
    let (user, password) = (decoded(url.username())?, decoded(url.password().unwrap_or_default())?);
    // RFC 7617 section 2.
    let basic = || format!("Basic {}", base64::encode(format!("{user}:{password}")));
    let credential = (!user.is_empty() || url.password().is_some()).then(|| Secret::new(basic()));
    Ok(Proxy { host, port, credential, variable: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(url: &str) -> BaseUrl {
        crate::config::base_url::parse(url).unwrap()
    }

    #[test]
    fn takes_a_proxy_apart() {
        for (text, host, port, credential) in [
            ("http://proxy.lan:3128", "proxy.lan", 3128, None),
            ("proxy.lan:3128", "proxy.lan", 3128, None),
            ("http://proxy.lan/", "proxy.lan", 80, None),
            ("http://[fd00::1]:3128", "fd00::1", 3128, None),
            // RFC 7617 section 2's example.
            (
                "http://Aladdin:open%20sesame@p:1",
                "p",
                1,
                Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ),
            ("http://user@p:1", "p", 1, Some("Basic dXNlcjo=")),
        ] {
            let proxy = parse(text).unwrap();
            assert_eq!((proxy.host.as_str(), proxy.port), (host, port), "{text}");
            assert_eq!(proxy.credential.as_ref().map(Secret::reveal), credential, "{text}");
        }
        for (text, problem) in [
            ("socks5://secret@p:1", "HTTP CONNECT"),
            ("https://secret@p:1", "HTTP CONNECT"),
            ("http://p:1/secret", "behind its port"),
            ("http://:secret@", "no valid URL"),
            ("http://b\u{fc}cher:1", "like xn--bcher-kva.example"),
            ("http://a b:1", "a character of its host is in no name"),
            ("http://p:0", "port 0"),
            ("", "no valid URL"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(problem) && !said.contains("secret"), "{text}: {said}");
        }
    }

    #[test]
    fn the_variables_that_count() {
        let all = [
            ("https_proxy", "lower"),
            ("HTTPS_PROXY", "upper"),
            ("http_proxy", "plain"),
            ("all_proxy", "socks5://all"),
            ("ALL_PROXY", "all"),
        ];
        let chosen = |url: &str, without: &[&str]| {
            let env = |name: &str| {
                let set = all.iter().find(|(known, _)| *known == name && !without.contains(known));
                set.map(|(_, value)| (*value).to_owned())
            };
            from_environment(&base(url), &env).map(|(_, value)| value)
        };
        for (url, without, want) in [
            ("https://api.com", &[][..], Some("lower")),
            ("https://api.com", &["https_proxy"], Some("upper")),
            ("https://api.com", &["https_proxy", "HTTPS_PROXY", "all_proxy"], Some("all")),
            ("https://api.com", &["https_proxy", "HTTPS_PROXY"], None),
            ("http://api.com", &[], None),
            ("http://localhost:11434", &[], None),
            ("https://127.0.0.1", &[], None),
            ("https://[::1]", &[], None),
        ] {
            assert_eq!(chosen(url, without).as_deref(), want, "{url} without {without:?}");
        }
    }

    #[test]
    fn who_needs_none() {
        for (list, url, exempt) in [
            ("*", "https://api.com", true),
            ("api.com", "https://api.com", true),
            ("api.com", "https://eu.api.com", true),
            (".api.com", "https://api.com", true),
            ("*.api.com", "https://eu.api.com", true),
            ("api.com", "https://myapi.com", false),
            ("API.com", "https://api.com", true),
            ("api.com:443", "https://api.com", true),
            ("api.com:8443", "https://api.com", false),
            ("other.com, api.com", "https://api.com", true),
            ("other.com api.com", "https://api.com", true),
            ("10.1.2.3", "https://10.1.2.3", true),
            ("10.1.2.3:80", "http://10.1.2.3", true),
            ("10.0.0.0/8", "https://10.1.2.3", true),
            ("10.0.0.0/16", "https://10.1.2.3", false),
            ("0.0.0.0/0", "https://10.1.2.3", true),
            ("10.0.0.0/33", "https://10.1.2.3", false),
            ("::/0", "https://10.1.2.3", false),
            ("fd00::/8", "https://[fd12::1]", true),
            ("fd12::1", "https://[fd12::1]", true),
            ("[fd12::1]:443", "https://[fd12::1]", true),
            ("2.3", "https://10.1.2.3", false),
            (" , .", "https://api.com", false),
        ] {
            assert_eq!(is_exempt(list, &base(url)), exempt, "{list:?} {url}");
        }
    }
}
