//! By which address a client is known: its connection's, or what a trusted proxy in between says.
//!
//! Believes the X-Forwarded-For of trusted proxies only, and of it only what they wrote themselves: each appends whom it
//! was asked by, so it is read from its end to the first address that is not trusted (nginx calls this real_ip_recursive).

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use crate::config::TrustedProxies;
use crate::http1::Headers;

const FORWARDED_FOR: &str = "x-forwarded-for";

/// The other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// None on the unix socket.
    address: Option<IpAddr>,
    name: Rc<str>,
}

impl Peer {
    /// Of a connection from there; without an address, on the unix socket.
    pub fn new(address: Option<IpAddr>) -> Peer {
        let address = address.map(|address| address.to_canonical());
        Peer {
            name: address.map_or_else(|| "unix".into(), |address| address.to_string().into()),
            address,
        }
    }

    /// How it is called before anybody says otherwise.
    pub fn name(&self) -> &Rc<str> {
        &self.name
    }

    /// Whether it is a proxy that speaks for many clients.
    pub fn is_trusted(&self, trusted: &TrustedProxies) -> bool {
        self.address.map_or(trusted.unix, |address| trusted.contain(address))
    }

    /// Who asks in a request with these headers.
    pub fn client(&self, trusted: &TrustedProxies, headers: &Headers) -> Rc<str> {
        if !self.is_trusted(trusted) {
            return self.name.clone();
        }
        match forwarded_for(trusted, headers) {
            Some(address) => address.to_string().into(),
            None => self.name.clone(),
        }
    }
}

/// The last address that is not trusted, or the first of those behind which there is nothing that can be read.
fn forwarded_for(trusted: &TrustedProxies, headers: &Headers) -> Option<IpAddr> {
    let mut nearest = None;
    let lines: Vec<&[u8]> = headers.get_all(FORWARDED_FOR).collect();
    for entry in lines.iter().rev().flat_map(|line| line.rsplit(|byte| *byte == b',')) {
        let Some(address) = read(entry) else { break };
        nearest = Some(address);
        if !trusted.contain(address) {
            break;
        }
    }
    nearest
}

/// An address, with or without a port (some proxies write it); IPv6 also in brackets.
fn read(entry: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(entry).ok()?.trim();
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .filter(|text| text.contains(':'));
    let address = bare.unwrap_or(text).parse().ok();
    let address = address.or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()));
    address.map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config;

    fn trusted(list: &str) -> TrustedProxies {
        let providers =
            "providers: [{name: p, base_url: 'http://x/v1', models: [m], rate_limit: {rpm: 1}}]";
        let text = format!("server: {{trusted_proxies: {list}}}\n{providers}");
        config::parse(&text, Path::new("config.yaml"), &|_| None).unwrap().server.trusted_proxies
    }

    #[test]
    fn the_client_is_the_last_address_that_is_not_trusted() {
        let trusted = trusted("[10.0.0.0/8, '::1', unix]");
        for (peer, lines, want) in [
            ("10.0.0.1", &[][..], "10.0.0.1"),
            ("10.0.0.1", &["1.2.3.4"], "1.2.3.4"),
            ("::ffff:10.0.0.1", &["1.2.3.4"], "1.2.3.4"),
            ("::1", &["2001:db8::7"], "2001:db8::7"),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4,10.0.0.2 , 10.9.9.9"], "1.2.3.4"),
            ("10.0.0.1", &["6.6.6.6", "1.2.3.4", "10.0.0.2"], "1.2.3.4"),
            ("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", &["6.6.6.6, unknown, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &["1.2.3.4, "], "10.0.0.1"),
            ("10.0.0.1", &["unknown"], "10.0.0.1"),
            ("10.0.0.1", &["1.2.3.4:5678"], "1.2.3.4"),
            ("10.0.0.1", &["[2001:db8::7]:5678"], "2001:db8::7"),
            ("10.0.0.1", &["[2001:db8::7]"], "2001:db8::7"),
            ("10.0.0.1", &["[1.2.3.4]"], "10.0.0.1"),
            ("10.0.0.1", &["::ffff:1.2.3.4"], "1.2.3.4"),
            ("10.0.0.1", &["1.2.3.4, ::ffff:10.0.0.2"], "1.2.3.4"),
            ("11.0.0.1", &["1.2.3.4"], "11.0.0.1"),
            ("unix", &["1.2.3.4"], "1.2.3.4"),
            ("unix", &[], "unix"),
        ] {
            let mut headers = Headers::default();
            lines.iter().for_each(|line| headers.push("X-Forwarded-For", line.as_bytes()));
            let client = Peer::new(peer.parse().ok()).client(&trusted, &headers);
            assert_eq!(&*client, want, "{peer}: {lines:?}");
        }
    }

    #[test]
    fn without_the_setting_nobody_is_believed() {
        let mut headers = Headers::default();
        headers.push("X-Forwarded-For", b"1.2.3.4");
        for (peer, want) in [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("unix", "unix")] {
            let peer = Peer::new(peer.parse().ok());
            assert_eq!(&*peer.client(&TrustedProxies::default(), &headers), want);
            assert_eq!(&*peer.client(&trusted("[10.0.0.0/8]"), &headers), want);
        }
    }
}
