//! `trusted_proxies:`: which peers are believed when they say for whom they speak.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::section::{Found, Section, Walk};

/// The word for peers on the unix socket.
const UNIX: &str = "unix";

/// Who is believed; by default nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedProxies {
    /// Whether peers on the unix socket are.
    pub unix: bool,
    /// Whose addresses are.
    pub networks: Vec<Network>,
}

/// A CIDR block (RFC 4632, RFC 4291 section 2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl TrustedProxies {
    /// Whether this address is one of theirs; one of IPv4 written as IPv6 counts as IPv4.
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(address))
    }
}

impl fmt::Display for TrustedProxies {
    /// As in the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let networks =
            self.networks.iter().map(|Network { address, prefix }| format!("{address}/{prefix}"));
        f.write_str(
            &networks.chain(self.unix.then(|| UNIX.to_owned())).collect::<Vec<_>>().join(", "),
        )
    }
}

impl Network {
    /// A block as it is meant: with nothing behind its prefix. The error says what is wrong.
    fn parse(text: &str) -> Result<Network, String> {
        let network = Network::read(text)?.canonical();
        let first = network.first();
        if first != network.address {
            let prefix = network.prefix;
            return Err(format!(
                "has bits behind its prefix; write {first}/{prefix} for the whole network"
            ));
        }
        Ok(network)
    }

    /// Any address in a block. An address alone is a block of one. The error says what is wrong.
    pub(super) fn read(text: &str) -> Result<Network, String> {
        let (address, prefix) =
            text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| String::new())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let length = match prefix {
            None => all,
            Some(digits) => {
                let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
                let length = digits.parse().ok().filter(|length| plain && *length <= all);
                length.ok_or_else(|| {
                    format!("has no prefix length from 0 to {all} behind its /; write e.g. {address}/{all}")
                })?
            }
        };
        Ok(Network { address, prefix: length })
    }

    /// `::ffff:a.b.c.d/96+n` is `a.b.c.d/n`.
    fn canonical(self) -> Network {
        match (self.address.to_canonical(), self.prefix.checked_sub(96)) {
            (IpAddr::V4(address), Some(prefix)) if self.address.is_ipv6() => {
                Network { address: address.into(), prefix }
            }
            _ => self,
        }
    }

    pub(super) fn contains(&self, address: IpAddr) -> bool {
        let other = Network { address, prefix: self.prefix };
        self.address.is_ipv4() == address.is_ipv4() && other.first() == self.first()
    }

    /// The address with nothing but zeros behind the prefix.
    fn first(&self) -> IpAddr {
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::V4((address.to_bits() & mask).into())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
            }
        }
    }
}

/// Reads the list.
pub(super) fn trusted_proxies(keys: &mut Section<'_, '_, '_>) -> TrustedProxies {
    let mut trusted = TrustedProxies::default();
    let Some(found) = keys.optional("trusted_proxies") else { return trusted };
    for item in keys.walk.items(&found, "write e.g. trusted_proxies: [127.0.0.1, 10.0.0.0/8, unix]")
    {
        trusted_proxy(keys.walk, &item, &mut trusted);
    }
    trusted
}

fn trusted_proxy(walk: &mut Walk<'_>, item: &Found<'_>, trusted: &mut TrustedProxies) {
    let Some(text) = walk.text(item) else { return };
    if text.value == UNIX {
        trusted.unix = true;
        return;
    }
    match Network::parse(&text.value) {
        Ok(network) => trusted.networks.push(network),
        Err(problem) if problem.is_empty() => {
            let remedy =
                "write e.g. 127.0.0.1, 10.0.0.0/8, fd00::/8, or unix for peers on the unix socket";
            walk.fault(
                item,
                format!("must be an address or a network, not {}; {remedy}", text.shown),
            );
        }
        Err(problem) => walk.fault(item, problem),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_what_its_prefix_says() {
        for (network, inside, outside) in [
            (
                "10.0.0.0/8",
                &["10.0.0.0", "10.255.255.255", "::ffff:10.1.2.3"][..],
                &["11.0.0.0", "::10.0.0.1"][..],
            ),
            ("127.0.0.1", &["127.0.0.1"], &["127.0.0.2"]),
            ("0.0.0.0/0", &["1.2.3.4"], &["::1"]),
            ("192.168.1.128/25", &["192.168.1.200"], &["192.168.1.127"]),
            ("::/0", &["::1", "fe80::1"], &["1.2.3.4"]),
            ("fd00::/8", &["fdff::1"], &["fe00::"]),
            ("2001:db8::/33", &["2001:db8:7fff::"], &["2001:db8:8000::"]),
            ("::ffff:10.0.0.0/104", &["10.9.9.9"], &["11.0.0.0"]),
        ] {
            let trusted =
                TrustedProxies { unix: false, networks: vec![Network::parse(network).unwrap()] };
            for (addresses, want) in [(inside, true), (outside, false)] {
                for address in addresses {
                    assert_eq!(
                        trusted.contain(address.parse().unwrap()),
                        want,
                        "{address} in {network}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in [
            "",
            "x",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.1/8",
            "::1/129",
            "10.0.0.0/8/8",
            "10.0.0",
        ] {
            assert!(Network::parse(text).is_err(), "{text}");
        }
        assert!(Network::parse("10.1.2.3/8").unwrap_err().contains("10.0.0.0/8"));
    }
}
