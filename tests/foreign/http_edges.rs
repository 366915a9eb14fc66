//! What clients and proxies in between make of HTTP: paths, upgrades, header bytes, codings.

use crate::support::{Client, Gateway, Reply, UNSHAPED, Upstream, provider_yaml};

const BODY: &str = r#"{"model":"m","messages":[]}"#;

fn gateway(upstream: &Upstream) -> Gateway {
    Gateway::start(&provider_yaml("p", upstream.addr(), &["m"], UNSHAPED, ""))
}

#[test]
fn header_bytes_over_0x7f_pass_both_ways() {
    let mut reply =
        b"HTTP/1.1 200 OK\r\ncf-region: S\xc3\xa3o Paulo\r\nX-Latin: \xa0caf\xe9\r\n".to_vec();
    reply.extend(b"Content-Length: 2\r\n\r\n{}");
    let upstream = Upstream::start([Reply::Raw(reply)]);
    let gateway = gateway(&upstream);
    let mut client = Client::connect(gateway.addr());
    let mut request =
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\ncf-region: S\xc3\xa3o Paulo\r\n"
            .to_vec();
    request.extend(b"X-Latin: \xa0caf\xe9 \r\nX-All: \x80\xff\r\n");
    request.extend(format!("Content-Length: {}\r\n\r\n{BODY}", BODY.len()).bytes());
    client.send(request);
    let response = client.read_response();
    assert_eq!(response.status, 200, "{response:?}");
    let requests = upstream.requests();
    for headers in [&requests[0].headers, &response.headers] {
        let value = |name: &str| {
            let found = headers.0.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.clone())
        };
        assert_eq!(value("cf-region"), Some("S\u{e3}o Paulo".into()));
        assert_eq!(value("x-latin"), Some(b"\xa0caf\xe9".to_vec()));
    }
    let all = requests[0].headers.0.iter().find(|(name, _)| name == "x-all");
    assert_eq!(all.map(|(_, value)| value.as_slice()), Some(&b"\x80\xff"[..]));
}
