//! Asking a gateway that runs, from outside, as any caller would: for `health` and `top`.
//!
//! Owns where a gateway is to be found and one GET. What the answer means is for who asks.

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use async_native_tls::TlsConnector;
use async_net::TcpStream;
use async_net::unix::UnixStream;
use futures_lite::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use openssl::error::ErrorStack;
use serde::de::DeserializeOwned;
use url::Url;

use crate::config::{self, Secret, url_fault};
use crate::deadline::within;
use crate::http1::{self, BodyDecoder, ReadFault, Reader};
use crate::tls::{self, Advice};

/// Where a gateway serves, unless something else is said.
pub const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// For everything: looking the name up, connecting, the answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Where a gateway answers, and what it is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    way: Way,
    /// `host:port` as it stands in a URL.
    authority: String,
    token: Option<Secret>,
}

#[derive(Debug, Clone, PartialEq)]
enum Way {
    Plain,
    /// By name; `None` takes any certificate: it is this machine's own gateway that is asked.
    Tls(Option<String>),
    Socket(PathBuf),
}

/// Why there is no page.
#[derive(Debug, PartialEq)]
pub enum Problem {
    /// It wants a token, or another one.
    Locked,
    /// In words.
    Other(String),
}

impl Target {
    /// Where a URL leads: `http://`, `https://` or `unix:PATH`; its path does not matter.
    pub fn of_url(url: &str) -> Result<Target, String> {
        if let Some(path) = url.strip_prefix("unix:") {
            return Ok(Target {
                way: Way::Socket(path.into()),
                authority: "localhost".into(),
                token: None,
            });
        }
        let url = Url::parse(url)
            .map_err(|error| format!("it {}; write e.g. {DEFAULT_URL}", url_fault(url, error)))?;
        match (url.scheme(), url.host_str(), url.port_or_known_default()) {
            (scheme @ ("http" | "https"), Some(host), Some(port)) => {
                let name = host.trim_matches(['[', ']']).to_owned();
                let way = if scheme == "http" { Way::Plain } else { Way::Tls(Some(name)) };
                Ok(Target { way, authority: format!("{host}:{port}"), token: None })
            }
            _ => {
                Err(format!("it has to begin with http://, https:// or unix:, e.g. {DEFAULT_URL}"))
            }
        }
    }

    /// How this machine reaches a gateway with this configuration.
    pub fn of_config(server: &config::Server) -> Target {
        let Some(port) = server.port else {
            let socket = server.socket.as_ref().expect("without a port there is a socket");
            return Target {
                way: Way::Socket(socket.path.clone()),
                authority: "localhost".into(),
                token: None,
            };
        };
        let host = match server.host.parse() {
            Ok(IpAddr::V4(ip)) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
            Ok(IpAddr::V6(ip)) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.to_string(),
            Ok(ip) => ip.to_string(),
            Err(_) => server.host.clone(),
        };
        let authority = config::host_port(&host, port);
        let way = if server.tls.is_some() { Way::Tls(None) } else { Way::Plain };
        Target { way, authority, token: None }
    }

    /// With a token to show.
    pub fn with_token(self, token: Option<Secret>) -> Target {
        Target { token, ..self }
    }

    /// As a URL.
    pub fn url(&self) -> String {
        match &self.way {
            Way::Plain => format!("http://{}", self.authority),
            Way::Tls(_) => format!("https://{}", self.authority),
            Way::Socket(path) => format!("unix:{}", path.display()),
        }
    }

    /// One page, of no more than `limit_bytes`.
    pub async fn page<T: DeserializeOwned>(
        &self,
        path: &str,
        limit_bytes: usize,
    ) -> Result<T, Problem> {
        let late = || Err(Problem::Other(format!("no answer within {} s", LIMIT.as_secs())));
        let body = within(LIMIT, self.fetch(path, limit_bytes)).await.unwrap_or_else(late)?;
        serde_json::from_slice(&body)
            .map_err(|_| Problem::Other("what answers is not limitrate".into()))
    }

    async fn fetch(&self, path: &str, limit_bytes: usize) -> Result<Vec<u8>, Problem> {
        let unconnected = |error: &dyn Display| format!("can't connect: {error}");
        if let Way::Socket(socket) = &self.way {
            let unix = UnixStream::connect(socket).await.map_err(|error| unconnected(&error))?;
            return self.get(unix, path, limit_bytes).await;
        }
        let tcp =
            TcpStream::connect(&*self.authority).await.map_err(|error| unconnected(&error))?;
        let Way::Tls(name) = &self.way else { return self.get(tcp, path, limit_bytes).await };
        let any = name.is_none();
        let tls = TlsConnector::new()
            .danger_accept_invalid_certs(any)
            .danger_accept_invalid_hostnames(any);
        let tls = tls
            .connect(name.as_deref().unwrap_or("localhost"), tcp)
            .await
            .map_err(|error| unconnected(&self.why(&error)))?;
        self.get(tls, path, limit_bytes).await
    }

    /// Why a handshake failed, without OpenSSL's source lines.
    fn why(&self, error: &async_native_tls::Error) -> String {
        let text = error.to_string();
        let problem = match error.source().map(|source| source.downcast_ref::<ErrorStack>()) {
            None => tls::Problem::Closed,
            Some(None) => return text,
            // native-tls tells why a certificate is refused in brackets at the end of its text, and
            // nowhere else.
            Some(Some(stack)) => {
                let refused = text.strip_suffix(')').and_then(|text| text.rsplit_once(" ("));
                tls::Problem::of_stack(stack, refused.map_or("", |(_, reason)| reason))
            }
        };
        let host = if let Way::Tls(Some(name)) = &self.way { name } else { &self.authority };
        let trust = "name the CA's file in the variable SSL_CERT_FILE";
        problem.of_handshake(&Advice { host, url: "the URL", trust })
    }

    async fn get(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        path: &str,
        limit_bytes: usize,
    ) -> Result<Vec<u8>, Problem> {
        let mut reader = Reader::new(stream);
        let token = self.token.as_ref().map(|token| format!("Bearer {}", token.reveal()));
        let headers = token.iter().map(|token| ("Authorization", token.as_bytes()));
        let mut request = Vec::new();
        http1::write_request_head(&mut request, "GET", path, &self.authority, headers, None);
        let broken = |error: io::Error| tls::Problem::plain(error).to_string();
        reader.get_mut().write_all(&request).await.map_err(broken)?;
        let head = http1::read_response_head(&mut reader, false).await;
        let head = head.map_err(|fault| match fault {
            ReadFault::Io { error, .. } => broken(error),
            other => other.to_string(),
        })?;
        match head.status {
            200 => {}
            401 => return Err(Problem::Locked),
            403 => {
                let words = "it answers with status 403; server.hosts may lack this host name";
                return Err(Problem::Other(words.into()));
            }
            // Where `server.tls` is set, the port answers plain HTTP with this.
            400 if self.way == Way::Plain => {
                return Err(Problem::Other(
                    "it answers with status 400; if it serves TLS, try https:// in the URL".into(),
                ));
            }
            status => return Err(Problem::Other(format!("it answers with status {status}"))),
        }
        let mut decoder = BodyDecoder::new(head.framing);
        let mut body = Vec::new();
        while !decoder.drain(&mut reader, &mut body).map_err(|fault| fault.to_string())?
            && body.len() <= limit_bytes
        {
            if reader.fill().await.map_err(broken)? == 0 {
                decoder.at_eof().map_err(|fault| fault.to_string())?;
                break;
            }
        }
        if body.len() > limit_bytes {
            return Err(Problem::Other("what answers is not limitrate: it says too much".into()));
        }
        Ok(body)
    }
}

impl From<String> for Problem {
    fn from(words: String) -> Problem {
        Problem::Other(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_url_leads_to_its_host_whatever_follows_it() {
        for (url, reached) in [
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
            ("http://gateway/v1", "http://gateway:80"),
            ("https://gateway", "https://gateway:443"),
            ("http://[::1]:8080/admin/stats?x", "http://[::1]:8080"),
            ("unix:/run/limitrate.sock", "unix:/run/limitrate.sock"),
        ] {
            assert_eq!(Target::of_url(url).map(|place| place.url()).as_deref(), Ok(reached));
        }
        for url in [
            "127.0.0.1:8080",
            "gateway",
            "ftp://gateway",
            "http://",
            "http://a b/",
            "http://bücher/",
            "",
        ] {
            let error = Target::of_url(url).expect_err(url);
            assert!(error.contains("http://127.0.0.1:8080"), "{url}: {error}");
            assert!(!error.contains("international"), "{url}: {error}");
        }
    }

    fn of_config(server: &str) -> String {
        let text = format!(
            "server: {{{server}}}\n\
             providers: [{{name: p, base_url: 'http://127.0.0.1:1/v1', models: [m], rate_limit: {{rpm: 1}}}}]"
        );
        let config = config::parse(&text, Path::new("config.yaml"), &|_| None)
            .expect("a good configuration");
        Target::of_config(&config.server).url()
    }

    #[test]
    fn a_configuration_gives_where_this_machine_reaches_it() {
        for (host, reached) in [
            ("0.0.0.0", "http://127.0.0.1:9000"),
            ("'::'", "http://[::1]:9000"),
            ("'fe80::1'", "http://[fe80::1]:9000"),
            ("192.0.2.7", "http://192.0.2.7:9000"),
            ("box.lan", "http://box.lan:9000"),
        ] {
            assert_eq!(of_config(&format!("host: {host}, port: 9000")), reached);
        }
        assert_eq!(of_config("port: null, socket: /tmp/l.sock"), "unix:/tmp/l.sock");
    }
}
