//! Which web pages and host names reach a gateway without `auth_token`: whoever opens a page must
//! not spend the keys by that.
//!
//! A browser sends a page's POST before it asks anybody, and says whose page it is in Origin
//! (WHATWG Fetch, section 3.1). Under a name of its own that leads to this machine (DNS rebinding)
//! a page even has the gateway's origin; Host shows that name. Decides from the head alone. Does
//! not say what a page may read: that is `cors`.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::config::{self, Origins, is_below};
use crate::error::Error;
use crate::http1::RequestHead;

/// Domains that nobody can register: a name below is one of the local network.
const LOCAL_DOMAINS: [&str; 5] = ["local", "lan", "home.arpa", "internal", "localhost"];

/// Refuses a page or a host name that may not call. Whoever knows the token may from anywhere.
pub fn check(config: &config::Server, head: &RequestHead) -> Result<(), Error> {
    if config.auth_token.is_some() {
        return Ok(());
    }
    let host = head.headers.get("host").map(|host| std::str::from_utf8(host).unwrap_or_default());
    if let Some(host) = host
        && !is_own_host(config, host, machine_name)
    {
        return Err(Error::HostNotAllowed { host: host.to_owned() });
    }
    let mut origins = head.headers.get_all("origin");
    let Some(origin) = origins.next() else { return Ok(()) };
    if origins.next().is_none() && is_allowed_origin(&config.cors_origins, origin, host) {
        return Ok(());
    }
    Err(Error::OriginNotAllowed { origin: String::from_utf8_lossy(origin).into_owned() })
}

/// Whether a Host names this machine so that no stranger's name server could have said so.
fn is_own_host(
    config: &config::Server,
    host: &str,
    machine_name: impl Fn() -> Option<String>,
) -> bool {
    let Some(authority) = Authority::parse(host) else { return false };
    let Name::Dns(name) = authority.host else { return true };
    let is_local = !name.contains('.')
        || LOCAL_DOMAINS.iter().any(|domain| is_below(&name, domain))
        || config.hosts.contain(&name)
        || is_same(&name, &config.host);
    is_local || machine_name().is_some_and(|own| is_same(&name, &own))
}

/// Whether a request with this Origin may come: from a program, from a page of the gateway itself
/// or of this machine's, or from one that is listed. `host` is the request's own, which is known to
/// be right.
fn is_allowed_origin(listed: &Origins, origin: &[u8], host: Option<&str>) -> bool {
    let Ok(origin) = std::str::from_utf8(origin) else { return false };
    let is_listed = match listed {
        Origins::Unset => false,
        Origins::Any => true,
        Origins::Listed(known) => known.iter().any(|known| known == origin),
    };
    if is_listed || origin == "null" {
        return is_listed;
    }
    let Some((scheme, rest)) = origin.split_once(':').filter(|(scheme, _)| is_scheme(scheme))
    else {
        return false;
    };
    let default_port = match scheme.to_ascii_lowercase().as_str() {
        "http" => 80,
        "https" => 443,
        // Of a desktop program or an extension (app:, file:, tauri:, vscode-webview:): no web page
        // has it.
        _ => return rest.bytes().all(|byte| byte.is_ascii_graphic() && byte != b','),
    };
    let Some(page) = rest.strip_prefix("//").and_then(Authority::parse) else { return false };
    let is_own = host.and_then(Authority::parse).is_some_and(|own| {
        let port = |authority: &Authority| authority.port.unwrap_or(default_port);
        own.host == page.host && port(&own) == port(&page)
    });
    is_own || page.host.is_loopback()
}

/// `host[:port]`, as Host and Origin have it.
struct Authority {
    host: Name,
    port: Option<u16>,
}

#[derive(PartialEq, Eq)]
enum Name {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
    /// In lower case, without a dot at its end.
    Dns(String),
}

impl Authority {
    fn parse(text: &str) -> Option<Authority> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']')?;
                (Name::V6(address.parse().ok()?), port)
            }
            None => {
                let (name, port) = text.split_at(text.find(':').unwrap_or(text.len()));
                (Name::parse(name)?, port)
            }
        };
        let port = match port.strip_prefix(':') {
            None => return port.is_empty().then_some(Authority { host, port: None }),
            Some("") => None,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok()?)
            }
            Some(_) => return None,
        };
        Some(Authority { host, port })
    }
}

impl Name {
    fn parse(text: &str) -> Option<Name> {
        if let Ok(address) = text.parse() {
            return Some(Name::V4(address));
        }
        let name = text.strip_suffix('.').unwrap_or(text);
        let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let is_name = !name.is_empty() && name.bytes().all(is_name_byte);
        is_name.then(|| Name::Dns(name.to_ascii_lowercase()))
    }

    fn is_loopback(&self) -> bool {
        match self {
            Name::V4(address) => address.is_loopback(),
            Name::V6(address) => address.to_canonical().is_loopback(),
            Name::Dns(name) => name == "localhost" || is_below(name, "localhost"),
        }
    }
}

/// RFC 3986 section 3.1.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// Whether a name in its plain form is `other`, however that is written.
fn is_same(name: &str, other: &str) -> bool {
    name.eq_ignore_ascii_case(other.strip_suffix('.').unwrap_or(other))
}

/// How the machine calls itself (uname(2)).
fn machine_name() -> Option<String> {
    rustix::system::uname().nodename().to_str().ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::http1::parse_request_head;

    fn config(server: &str) -> config::Server {
        let providers =
            "providers: [{name: p, base_url: 'http://x/v1', models: [m], rate_limit: {rpm: 1}}]";
        let text = format!("server: {{{server}}}\n{providers}");
        config::parse(&text, Path::new("config.yaml"), &|_| None).unwrap().server
    }

    /// The code of the refusal, or "" for a request that may come.
    fn checked(server: &str, head: &str) -> &'static str {
        let head = parse_request_head(format!("{head}\r\n").as_bytes()).unwrap();
        check(&config(server), &head).map_or_else(|error| error.code(), |()| "")
    }

    fn from(server: &str, host: &str, origin: &str) -> &'static str {
        checked(server, &format!("POST /v1/x HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n"))
    }

    const ORIGIN: &str = "origin_not_allowed";
    const HOST: &str = "host_not_allowed";

    #[test]
    fn a_host_is_one_that_no_stranger_can_give_to_this_machine() {
        let is_own = |host: &str| {
            let config = config("host: Bind.example.com, hosts: [gw.example.com, '*.example.org']");
            is_own_host(&config, host, || Some("Box.example.net".to_owned()))
        };
        for host in [
            "127.0.0.1",
            "127.0.0.1:8080",
            "192.168.1.7:80",
            "8.8.8.8",
            "[::1]:8080",
            "[fd00::7]",
            "localhost",
            "LOCALHOST:8080",
            "localhost.",
            "gateway",
            "gateway:8080",
            "gateway.:8080",
            "my_box",
            "a.localhost",
            "box.local",
            "box.LAN.:8080",
            "a.b.home.arpa",
            "host.docker.internal:8080",
            "box.example.net",
            "BOX.EXAMPLE.NET.:1",
            "bind.example.com",
            "GW.example.com:443",
            "a.example.org",
            "a.b.example.org.",
            "gw:",
        ] {
            assert!(is_own(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "EVIL.EXAMPLE.",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "local.evil.example",
            ".local",
            "evillocal.example",
            "evil.xlan",
            "evil.arpa",
            "box.evil.example",
            "box.example.net.evil.example",
            "a.gw.example.com",
            "example.org",
            "127.1",
            "256.1.1.1",
            "0x7f.0.0.1",
            "a..lan.evil.example",
            ".",
            "",
        ] {
            assert!(!is_own(host), "{host}");
        }
        assert!(!is_own_host(&config(""), "box.example.net", || None), "the name is not known");
    }

    #[test]
    fn whose_page_asks_decides() {
        for (host, origin, want) in [
            // The gateway's own, with and without default ports.
            ("192.168.1.7:8080", "http://192.168.1.7:8080", ""),
            ("192.168.1.7:8080", "https://192.168.1.7:8080", ""),
            ("gateway.lan:8080", "http://GATEWAY.lan:8080", ""),
            ("Gateway.LAN.:8080", "http://gateway.lan:8080", ""),
            ("gateway.lan", "http://gateway.lan", ""),
            ("gateway.lan", "https://gateway.lan", ""),
            ("gateway.lan:80", "http://gateway.lan", ""),
            ("gateway.lan", "http://gateway.lan:80", ""),
            ("gateway.lan:443", "https://gateway.lan", ""),
            ("gateway.lan:", "https://gateway.lan:443", ""),
            ("[fd00::7]:8080", "http://[fd00:0::7]:8080", ""),
            ("gateway.lan:443", "http://gateway.lan", ORIGIN),
            ("gateway.lan", "https://gateway.lan:8443", ORIGIN),
            ("gateway.lan:8080", "http://gateway.lan:3000", ORIGIN),
            ("192.168.1.7:8080", "http://192.168.1.7", ORIGIN),
            ("192.168.1.7:8080", "http://192.168.1.8:8080", ORIGIN),
            // This machine's.
            ("gateway", "http://localhost", ""),
            ("gateway", "http://localhost:3000", ""),
            ("gateway", "https://LOCALHOST:3000", ""),
            ("gateway", "http://app.localhost:1", ""),
            ("gateway", "http://tauri.localhost", ""),
            ("gateway", "http://127.0.0.1:5173", ""),
            ("gateway", "http://127.255.0.9", ""),
            ("gateway", "http://[::1]:3000", ""),
            ("gateway", "http://localhost.evil.example", ORIGIN),
            ("gateway", "http://127.0.0.1.evil.example", ORIGIN),
            ("gateway", "http://evillocalhost", ORIGIN),
            ("gateway", "http://128.0.0.1", ORIGIN),
            ("gateway", "http://[fd00::1]", ORIGIN),
            // A stranger's.
            ("gateway", "https://evil.example", ORIGIN),
            ("127.0.0.1:8080", "http://evil.example:8080", ORIGIN),
            ("gateway", "null", ORIGIN),
            ("gateway", "http://evil", ORIGIN),
            // A program's.
            ("gateway", "app://obsidian.md", ""),
            ("gateway", "file://", ""),
            ("gateway", "tauri://localhost", ""),
            ("gateway", "vscode-webview://0p8kmf", ""),
            ("gateway", "chrome-extension://abcdef", ""),
            // None at all.
            ("gateway", "", ORIGIN),
            ("gateway", "evil.example", ORIGIN),
            ("gateway", "http:evil.example", ORIGIN),
            ("gateway", "http:/localhost", ORIGIN),
            ("gateway", "http://", ORIGIN),
            ("gateway", "http://localhost/", ORIGIN),
            ("gateway", "http://u@localhost", ORIGIN),
            ("gateway", "http://localhost:x", ORIGIN),
            ("gateway", "http://localhost:65536", ORIGIN),
            ("gateway", "http://localhost http://localhost", ORIGIN),
            ("gateway", "app://a https://evil.example", ORIGIN),
            ("gateway", "app://a,https://evil.example", ORIGIN),
            ("gateway", "://x", ORIGIN),
            ("gateway", "1a://x", ORIGIN),
            ("gateway", "NULL", ORIGIN),
            // A page under a name of its own that leads here.
            ("evil.example:8080", "http://evil.example:8080", HOST),
            ("evil.example", "http://localhost", HOST),
        ] {
            assert_eq!(from("", host, origin), want, "{host}: {origin}");
        }
        let twice = "GET / HTTP/1.1\r\nHost: gateway\r\nOrigin: http://localhost\r\nOrigin: http://localhost\r\n";
        assert_eq!(checked("", twice), ORIGIN);
        let bytes = "GET / HTTP/1.1\r\nHost: gateway\r\nOrigin: app://b\u{fc}cher\r\n";
        assert_eq!(checked("", bytes), ORIGIN);
    }

    #[test]
    fn what_the_operator_lists_may_come() {
        let listed = "cors_origins: [https://chat.example.com, app://x], hosts: [gw.example.com]";
        for (origin, want) in [
            ("https://chat.example.com", ""),
            ("http://chat.example.com", ORIGIN),
            ("https://chat.example.com:8443", ORIGIN),
            ("https://evil.example", ORIGIN),
            ("null", ORIGIN),
            ("https://gw.example.com", ""),
        ] {
            assert_eq!(from(listed, "gw.example.com", origin), want, "{origin}");
        }
        assert_eq!(from(listed, "gw.example.net", "https://chat.example.com"), HOST);
        for origin in ["https://evil.example", "null", "app://x"] {
            assert_eq!(from("cors_origins: ['*']", "gateway", origin), "", "{origin}");
        }
        assert_eq!(from("auth_token: t", "evil.example", "https://evil.example"), "");
        let of_clients = "clients: [{name: chat, token: t}]";
        assert_eq!(from(of_clients, "gateway", "https://evil.example"), ORIGIN);
    }

    #[test]
    fn the_authority_of_the_target_is_the_host_and_programs_of_old_name_none() {
        let head = "GET http://evil.example/ HTTP/1.1\r\nHost: gateway\r\n";
        assert_eq!(checked("", head), HOST);
        let head = "GET http://gateway/ HTTP/1.1\r\nHost: evil.example\r\n";
        assert_eq!(checked("", head), "");
        assert_eq!(checked("", "GET / HTTP/1.0\r\n"), "");
        assert_eq!(checked("", "GET / HTTP/1.0\r\nHost: evil.example\r\n"), HOST);
        assert_eq!(checked("", "GET / HTTP/1.0\r\nOrigin: https://evil.example\r\n"), ORIGIN);
        assert_eq!(checked("", "GET / HTTP/1.1\r\nHost: gateway\r\n"), "");
    }

    #[test]
    fn the_machine_has_a_name() {
        assert!(machine_name().is_some_and(|name| !name.is_empty()));
    }
}
