//! A way through an HTTP proxy: CONNECT (RFC 9110 section 9.3.6), after which the connection is the provider's.

use std::net::TcpStream;

use async_io::Async;
use futures_lite::AsyncWriteExt;

use crate::config::Proxy;
use crate::http1::{self, Reader};

/// Asks the proxy at the other end of `tcp` for a tunnel to `target`, a `host:port`. `Err` says why there is none.
pub(super) async fn open(
    tcp: Async<TcpStream>,
    proxy: &Proxy,
    target: &str,
) -> Result<Async<TcpStream>, String> {
    let mut reader = Reader::new(tcp);
    let mut request = Vec::new();
    let credential = proxy
        .credential
        .as_ref()
        .map(|credential| ("Proxy-Authorization", credential.reveal().as_bytes()));
    http1::write_request_head(
        &mut request,
        "CONNECT",
        target,
        target,
        credential.into_iter(),
        None,
    );
    let said = |error: std::io::Error| format!("the proxy {} gave up: {error}", proxy.authority());
    reader.get_mut().write_all(&request).await.map_err(said)?;
    let head = http1::read_response_head(&mut reader, false).await;
    let head =
        head.map_err(|fault| format!("the proxy {} did not answer: {fault}", proxy.authority()))?;
    match head.status {
        200..=299 if reader.buffered().is_empty() => Ok(reader.into_inner()),
        200..=299 => {
            Err(format!("the proxy {} sent something before it was asked", proxy.authority()))
        }
        407 => Err(format!("the proxy {} wants {} (status 407)", proxy.authority(), wanted(proxy))),
        status => Err(format!(
            "the proxy {} refused the way to {target} with status {status}",
            proxy.authority()
        )),
    }
}

fn wanted(proxy: &Proxy) -> &'static str {
    match proxy.credential {
        None => "a user name and password; write them before its host: http://user:password@...",
        Some(_) => "another user name or password",
    }
}
