//! `limitrate health`: whether a gateway serves, for a container's HEALTHCHECK and whoever else has neither shell nor
//! curl.
//!
//! Owns the question and what counts as a good answer. It asks from outside, as a caller would, over plain HTTP.

use std::iter;
use std::net::IpAddr;
use std::time::Duration;

use async_net::TcpStream;
use futures_lite::AsyncWriteExt;
use serde::Deserialize;
use url::Url;

use crate::config;
use crate::deadline::within;
use crate::http1::{self, BodyDecoder, Reader};

/// Where a gateway serves, unless something else is said.
pub const DEFAULT_AUTHORITY: &str = "127.0.0.1:8080";

/// For everything: looking the name up, connecting, the answer.
const LIMIT: Duration = Duration::from_secs(5);
/// The page has less than a hundred bytes; whatever answers with more is something else.
const BODY_LIMIT_BYTES: usize = 4096;

/// The `host:port` of a URL; its path does not matter.
pub fn authority_of_url(url: &str) -> Result<String, String> {
    let url = Url::parse(url).map_err(|error| format!("{error}; write e.g. http://{DEFAULT_AUTHORITY}"))?;
    match (url.scheme(), url.host_str(), url.port_or_known_default()) {
        ("http", Some(host), Some(port)) => Ok(format!("{host}:{port}")),
        _ => Err(format!("it has to begin with http://, e.g. http://{DEFAULT_AUTHORITY}")),
    }
}

/// The `host:port` at which this machine reaches a gateway with this configuration.
pub fn authority_of(server: &config::Server) -> String {
    let port = server.port;
    match server.host.parse() {
        Ok(IpAddr::V4(ip)) if ip.is_unspecified() => format!("127.0.0.1:{port}"),
        Ok(IpAddr::V6(ip)) if ip.is_unspecified() => format!("[::1]:{port}"),
        Ok(IpAddr::V6(ip)) => format!("[{ip}]:{port}"),
        _ => format!("{}:{port}", server.host),
    }
}

/// Asks the gateway at `host:port`: how it is, or why that can't be said, in words either way.
pub fn ask(authority: &str) -> Result<String, String> {
    let asked = smol::block_on(within(LIMIT, fetch(authority)));
    match asked.unwrap_or_else(|| Err(format!("no answer within {} s", LIMIT.as_secs()))) {
        Ok(page) => {
            Ok(format!("http://{authority} is well: limitrate {}, up for {} s", page.version, page.uptime_seconds))
        }
        Err(problem) => Err(format!("http://{authority} is not well: {problem}")),
    }
}

/// What `/admin/health` says.
#[derive(Deserialize)]
struct Page {
    status: String,
    version: String,
    uptime_seconds: u64,
}

async fn fetch(authority: &str) -> Result<Page, String> {
    let stream = TcpStream::connect(authority).await.map_err(|error| format!("can't connect: {error}"))?;
    let mut reader = Reader::new(stream);
    let mut request = Vec::new();
    http1::write_request_head(&mut request, "GET", "/admin/health", authority, iter::empty(), None);
    reader.get_mut().write_all(&request).await.map_err(|error| error.to_string())?;
    let head = http1::read_response_head(&mut reader, false).await.map_err(|fault| fault.to_string())?;
    if head.status != 200 {
        return Err(format!("it answers with status {}", head.status));
    }
    let page = read_body(&mut reader, BodyDecoder::new(head.framing)).await?;
    match serde_json::from_slice(&page) {
        Ok(page @ Page { .. }) if page.status == "ok" => Ok(page),
        _ => Err("what answers is not limitrate".into()),
    }
}

/// The body whole, or as much of it as is too much.
async fn read_body(reader: &mut Reader<TcpStream>, mut decoder: BodyDecoder) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while !decoder.drain(reader, &mut body).map_err(|fault| fault.to_string())? && body.len() <= BODY_LIMIT_BYTES {
        if reader.fill().await.map_err(|error| error.to_string())? == 0 {
            decoder.at_eof().map_err(|fault| fault.to_string())?;
            break;
        }
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_url_gives_its_authority_whatever_follows_it() {
        for (url, authority) in [
            ("http://127.0.0.1:9000", "127.0.0.1:9000"),
            ("http://gateway/v1", "gateway:80"),
            ("http://[::1]:8080/admin/stats?x", "[::1]:8080"),
        ] {
            assert_eq!(authority_of_url(url).as_deref(), Ok(authority));
        }
        for url in ["127.0.0.1:8080", "gateway", "https://gateway", "http://", ""] {
            let error = authority_of_url(url).expect_err(url);
            assert!(error.contains("http://127.0.0.1:8080"), "{url}: {error}");
        }
    }

    #[test]
    fn a_configuration_gives_where_this_machine_reaches_it() {
        for (host, authority) in [
            ("0.0.0.0", "127.0.0.1:9000"),
            ("'::'", "[::1]:9000"),
            ("'fe80::1'", "[fe80::1]:9000"),
            ("192.0.2.7", "192.0.2.7:9000"),
            ("box.lan", "box.lan:9000"),
        ] {
            let text = format!(
                "server: {{host: {host}, port: 9000}}\n\
                 providers: [{{name: p, base_url: 'http://127.0.0.1:1/v1', models: [m], rate_limit: {{rpm: 1}}}}]"
            );
            let config = config::parse(&text, Path::new("config.yaml"), &|_| None).expect("a good configuration");
            assert_eq!(authority_of(&config.server), authority);
        }
    }
}
