//! Making one connection to a provider, by its proxy where it has one: look the name up, try its addresses, shake hands.
//!
//! TLS is verified, with SNI, from TLS 1.2 on. A context holds the system's CA bundle, parsed: that
//! costs twenty handshakes, and as much memory. So one is shared by all connections that trust the
//! same, for a while, and with it the sessions that can be resumed. Handshakes compute on a thread
//! of their own, since the thread that relays streams must not wait for them.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use async_io::Async;
use futures_lite::future::{self, BoxedLocal};
use openssl::x509::X509;
use smol::lock::{OnceCell, Semaphore};

use super::Failure;
use super::stream::{Plain, Stream};
use super::tunnel;
use crate::aside::aside;
use crate::config::{self, BaseUrl, Proxy};
use crate::deadline::within;
use crate::socket::Socket;
use crate::tls::{Advice, ClientContext, Problem, Session};

/// RFC 8305 section 5: how long an address may take before the next one is tried beside it.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(300);

/// How long a look-up is reused: long enough for one burst of connections, short enough to follow a change.
const DNS_CACHE: Duration = Duration::from_secs(10);

/// How long a TLS context is made use of: the CA bundle may be another one by then.
const CONTEXT_LASTS: Duration = Duration::from_secs(600);

/// The same after a certificate was refused, perhaps for want of a CA that is there by now.
const DOUBTED_CONTEXT_LASTS: Duration = Duration::from_secs(10);

thread_local! {
    /// For all who trust whom the system trusts and nobody else.
    static SYSTEMS: RefCell<Rc<Context>> = RefCell::default();
}

/// Connections being made at once, per provider: as many as a burst prepares (`MAX_PREPARED` in
/// `shaping::line`), since those behind them would wait for whole round trips.
const MAX_CONNECTING: usize = 64;

/// Makes connections to one base_url.
pub struct Connector {
    base_url: BaseUrl,
    proxy: Option<Proxy>,
    extra_roots: Vec<X509>,
    /// Of its own, where it trusts others than the system does.
    context: RefCell<Rc<Context>>,
    addresses: RefCell<Option<(Instant, Vec<SocketAddr>)>>,
    connecting: Semaphore,
    /// Whether an answer without TLS ever came.
    has_answered: Rc<Cell<bool>>,
}

impl Connector {
    /// For a provider. The CA certificates were read by the configuration and are known to be PEM; those that OpenSSL
    /// does not take are left out, and the handshake will say that the certificate is not trusted.
    pub fn new(provider: &config::Provider) -> Connector {
        let pem = provider.ca_pem.as_deref();
        // Who reads the configuration anew wants to be sure of the certificates, too.
        SYSTEMS.take();
        Connector {
            base_url: provider.base_url.clone(),
            proxy: provider.proxy.clone(),
            // OpenSSL starts with the first call: not where nobody needs it.
            extra_roots: pem.and_then(|pem| X509::stack_from_pem(pem).ok()).unwrap_or_default(),
            context: RefCell::default(),
            addresses: RefCell::new(None),
            connecting: Semaphore::new(MAX_CONNECTING),
            has_answered: Rc::default(),
        }
    }

    /// A fresh connection, within `limit` for all steps together and the wait for a turn.
    pub async fn connect(&self, limit: Duration) -> Result<Stream, Failure> {
        let connect = async {
            let _turn = self.connecting.acquire().await;
            self.all_steps().await
        };
        let connected = within(limit, connect).await;
        connected.unwrap_or_else(|| Err(self.late(limit))).map_err(Failure::Unreachable)
    }

    fn late(&self, limit: Duration) -> String {
        let by = self.proxy.as_ref().map(|proxy| format!(" by the proxy {}", proxy.authority()));
        let by = by.unwrap_or_default();
        format!("no connection to {}{by} within {} s", self.target(), limit.as_secs_f64())
    }

    async fn all_steps(&self) -> Result<Stream, String> {
        let addresses = self.look_up().await?;
        let tcp = connect_any(addresses).await.inspect_err(|_| {
            // The addresses may be out of date.
            self.addresses.replace(None);
        });
        let tcp = tcp.map_err(|error| format!("cannot connect to {}: {error}", self.next_hop()))?;
        let _ = tcp.get_ref().set_nodelay(true);
        let tcp = match &self.proxy {
            None => tcp,
            Some(proxy) => tunnel::open(tcp, proxy, &self.target()).await?,
        };
        let tcp = tcp.into_inner().and_then(Socket::new);
        let tcp = tcp.map_err(|error| {
            format!("cannot use the connection to {}: {error}", self.next_hop())
        })?;
        if !self.base_url.tls {
            return Ok(Stream::Plain(Plain::new(tcp, self.has_answered.clone())));
        }
        let tls = self.shake_hands(tcp).await;
        tls.map_err(|reason| format!("the TLS handshake with {} failed: {reason}", self.target()))
    }

    async fn look_up(&self) -> Result<Vec<SocketAddr>, String> {
        let (host, port) = match &self.proxy {
            None => (self.base_url.host.as_str(), self.base_url.port),
            Some(proxy) => (proxy.host.as_str(), proxy.port),
        };
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        if let Some((since, addresses)) = &*self.addresses.borrow()
            && since.elapsed() < DNS_CACHE
        {
            return Ok(addresses.clone());
        }
        let found = async_net::resolve((host, port)).await;
        let found = found.map_err(|error| format!("DNS look-up of {host} failed: {error}"))?;
        if found.is_empty() {
            return Err(format!("DNS knows no address of {host}"));
        }
        let addresses = alternate_families(found);
        self.addresses.replace(Some((Instant::now(), addresses.clone())));
        Ok(addresses)
    }

    async fn shake_hands(&self, tcp: Socket<TcpStream>) -> Result<Stream, String> {
        let context = self.of_context(|context| {
            retire(context, CONTEXT_LASTS);
            context.borrow().clone()
        });
        // Made once for all connections that need it meanwhile.
        let tls = context.tls.get_or_try_init(|| {
            let roots = self.extra_roots.clone();
            aside(async move { ClientContext::new(&roots) })
        });
        let tls = tls.await.map_err(|stack| Problem::of_stack(&stack, "").to_string())?;
        let server = tls.server(&self.base_url.host, self.base_url.port);
        let session = aside(Session::connect(server, tcp)).await;
        session.map(Stream::Tls).map_err(|problem| self.failed(tls, &problem))
    }

    /// Puts a failed handshake in words, and doubts the context where it was about a certificate.
    fn failed(&self, tls: &ClientContext, problem: &Problem) -> String {
        if matches!(problem, Problem::Certificate(_)) {
            self.of_context(|context| retire(context, DOUBTED_CONTEXT_LASTS));
        }
        let trust = match tls.trusts_nobody() {
            true => {
                "this machine has no CA certificates at all: install its package ca-certificates"
            }
            false => "name the CA's file with `ca_file`",
        };
        problem.of_handshake(&Advice { host: &self.base_url.host, url: "base_url", trust })
    }

    fn of_context<T>(&self, ask: impl FnOnce(&RefCell<Rc<Context>>) -> T) -> T {
        if self.extra_roots.is_empty() { SYSTEMS.with(ask) } else { ask(&self.context) }
    }

    fn target(&self) -> String {
        self.base_url.host_port()
    }

    /// Whom the connection is made to, in words.
    fn next_hop(&self) -> String {
        self.proxy
            .as_ref()
            .map_or_else(|| self.target(), |proxy| format!("the proxy {}", proxy.authority()))
    }
}

/// What sessions have in common, once it is needed.
struct Context {
    since: Instant,
    tls: OnceCell<ClientContext>,
}

impl Default for Context {
    fn default() -> Self {
        Context { since: Instant::now(), tls: OnceCell::new() }
    }
}

/// Puts one that is yet to be made in the place of one of this age.
fn retire(context: &RefCell<Rc<Context>>, age: Duration) {
    if context.borrow().since.elapsed() >= age {
        context.take();
    }
}

/// RFC 8305 section 4: addresses of both families in turn, beginning with the family that the resolver prefers.
fn alternate_families(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let v6_first = found.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|address| address.is_ipv6() == v6_first);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut mixed = Vec::new();
    loop {
        let pair = [first.next(), second.next()];
        if pair == [None, None] {
            return mixed;
        }
        mixed.extend(pair.into_iter().flatten());
    }
}

/// A connection in the making.
type Attempt = BoxedLocal<io::Result<Async<TcpStream>>>;

/// The first connection that stands. An address that fails gives way to the next at once, one that is silent shares
/// with the next after a moment. The error is the last one.
fn connect_any(mut addresses: Vec<SocketAddr>) -> Attempt {
    Box::pin(async move {
        let mut attempt: Attempt = Box::pin(Async::<TcpStream>::connect(addresses.remove(0)));
        if addresses.is_empty() {
            return attempt.await;
        }
        match within(NEXT_ADDRESS_AFTER, &mut attempt).await {
            Some(Ok(tcp)) => Ok(tcp),
            Some(Err(_)) => connect_any(addresses).await,
            None => first_success(attempt, connect_any(addresses)).await,
        }
    })
}

async fn first_success(mut one: Attempt, mut other: Attempt) -> io::Result<Async<TcpStream>> {
    let (result, rest) =
        future::or(async { ((&mut one).await, true) }, async { ((&mut other).await, false) }).await;
    match result {
        Ok(tcp) => Ok(tcp),
        Err(_) if rest => other.await,
        Err(_) => one.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketType};
    use std::net::TcpListener;
    use std::os::fd::OwnedFd;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// Bound and not listening: nobody else can be given this port while the socket is held.
    fn dead_address() -> (OwnedFd, SocketAddr) {
        let bound = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&bound, &address("127.0.0.1:0")).unwrap();
        let dead = rustix::net::getsockname(&bound).unwrap().try_into().unwrap();
        (bound, dead)
    }

    #[test]
    fn a_context_is_kept_until_it_is_old() {
        let since = Instant::now().checked_sub(CONTEXT_LASTS / 2).unwrap();
        let first = Rc::new(Context { since, tls: OnceCell::new() });
        let context = RefCell::new(first.clone());
        retire(&context, CONTEXT_LASTS);
        assert!(Rc::ptr_eq(&first, &context.borrow()));
        retire(&context, DOUBTED_CONTEXT_LASTS);
        assert!(context.borrow().since > since);
    }

    #[test]
    fn families_take_turns() {
        let found = ["[::1]:1", "[::2]:1", "[::3]:1", "10.0.0.1:1"].map(address).to_vec();
        let want = ["[::1]:1", "10.0.0.1:1", "[::2]:1", "[::3]:1"].map(address);
        assert_eq!(alternate_families(found), want);
    }

    #[test]
    fn a_dead_address_gives_way_to_a_living_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (_bound, dead) = dead_address();
        let living = listener.local_addr().unwrap();
        let tcp = smol::block_on(connect_any(vec![dead, living])).unwrap();
        assert_eq!(tcp.get_ref().peer_addr().unwrap(), living);
        assert!(smol::block_on(connect_any(vec![dead])).is_err());
    }

    #[test]
    fn a_silent_address_shares_with_a_living_one_after_a_moment() {
        // With its backlog full, the kernel drops every further SYN to this port.
        let full = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = full.local_addr().unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let fill = || TcpStream::connect_timeout(&silent, Duration::from_millis(200)).ok();
        let _filled: Vec<_> = std::iter::from_fn(fill).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let living = listener.local_addr().unwrap();
        // A dead one between them: while the first is silent, the others still give way to each other.
        let (_bound, dead) = dead_address();

        for addresses in [vec![silent, living], vec![silent, dead, living]] {
            let start = Instant::now();
            let tcp = smol::block_on(connect_any(addresses)).unwrap();
            assert_eq!(tcp.get_ref().peer_addr().unwrap(), living);
            let took = start.elapsed();
            assert!((NEXT_ADDRESS_AFTER..Duration::from_secs(10)).contains(&took), "{took:?}");
        }
    }
}
