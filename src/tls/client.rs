//! What sessions with servers share: the CAs that are trusted, and the sessions that can be
//! resumed.
//!
//! OpenSSL does not verify the certificate of a resumed session again. So a session is kept for the
//! host and port that it was made with, inside the context that verified it, and goes with that
//! context.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::LazyLock;

use async_channel::{Receiver, Sender};
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{
    Ssl, SslConnector, SslMethod, SslRef, SslSession, SslSessionCacheMode, SslVersion,
};
use openssl::x509::X509;

/// Sessions kept of one server, of a few kilobytes each: as many as a burst has connections.
const MAX_SESSIONS: usize = 64;

/// Where an `Ssl` has the place that its new sessions go to.
static STORE: LazyLock<Index<Ssl, Store>> =
    LazyLock::new(|| Ssl::new_ex_index().expect("OpenSSL has room for an index"));

/// The trust in certain CAs, TLS 1.2 or later, and the sessions made with it.
pub struct ClientContext {
    connector: SslConnector,
    trusts_nobody: bool,
    /// By host and port.
    stores: RefCell<HashMap<(String, u16), Store>>,
}

impl ClientContext {
    /// Trusts the system's CAs and these. Reads and parses the CA bundle, which takes milliseconds.
    pub fn new(roots: &[X509]) -> Result<ClientContext, ErrorStack> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        // The OpenSSL that is built in knows no folder of this system. Whatever cannot be read is
        // not trusted; everything else is.
        let system = openssl_probe::probe();
        if let Some(file) = &system.cert_file {
            let _ = builder.load_verify_locations(Some(file), None);
        }
        for folder in &system.cert_dir {
            let _ = builder.load_verify_locations(None, Some(folder));
        }
        for root in roots {
            let _ = builder.cert_store_mut().add_cert(root.clone());
        }
        // OpenSSL's own cache does not serve clients (SSL_CTX_set_session_cache_mode(3)).
        builder
            .set_session_cache_mode(SslSessionCacheMode::CLIENT | SslSessionCacheMode::NO_INTERNAL);
        builder.set_new_session_callback(|ssl, session| {
            if let Some(store) = ssl.ex_data(*STORE) {
                store.put(&session);
            }
        });
        Ok(ClientContext {
            connector: builder.build(),
            trusts_nobody: roots.is_empty()
                && system.cert_file.is_none()
                && system.cert_dir.is_empty(),
            stores: RefCell::default(),
        })
    }

    /// True if this machine has no CA certificates and the configuration names none.
    pub fn trusts_nobody(&self) -> bool {
        self.trusts_nobody
    }

    /// What sessions with this host and port begin from.
    pub fn server(&self, host: &str, port: u16) -> Server {
        let mut stores = self.stores.borrow_mut();
        let store = stores.entry((host.to_owned(), port)).or_insert_with(Store::new);
        Server { connector: self.connector.clone(), host: host.to_owned(), store: store.clone() }
    }
}

/// A server in a context, for the thread that computes handshakes.
pub struct Server {
    connector: SslConnector,
    host: String,
    /// Of the same context.
    store: Store,
}

impl Server {
    /// The beginning of a session, with SNI and the check of the server's name or address. It
    /// offers to resume an earlier session, if there is one; a server that declines gets a full
    /// handshake.
    pub fn ssl(&self) -> Result<Ssl, ErrorStack> {
        let mut ssl = self.connector.configure()?.into_ssl(&self.host)?;
        if let Some(session) = self.store.take() {
            offer(&mut ssl, &session)?;
        }
        ssl.set_ex_data(*STORE, self.store.clone());
        Ok(ssl)
    }
}

/// Forgets all sessions with the server of this one, which failed: its secrets must not be used
/// again (RFC 5246 section 7.2.2, RFC 8446 section 6.2).
pub(super) fn forget_sessions(ssl: &SslRef) {
    if let Some(store) = ssl.ex_data(*STORE) {
        store.clear();
    }
}

/// Offers to resume `session`.
#[expect(
    unsafe_code,
    reason = "the openssl crate has SSL_set_session(3) as an unsafe function only"
)]
fn offer(ssl: &mut SslRef, session: &SslSession) -> Result<(), ErrorStack> {
    // SAFETY: the session has to be of the `Ssl`'s own context. Only `Server::ssl` calls this, with
    // a session that the callback of the same connector put into the store.
    unsafe { ssl.set_session(session) }
}

/// The sessions with one server that can be resumed, the oldest first, as DER. A channel, since a
/// session comes on the thread of the handshake in TLS 1.2, and on the reading thread in TLS 1.3.
#[derive(Clone)]
struct Store {
    sender: Sender<Vec<u8>>,
    receiver: Receiver<Vec<u8>>,
}

impl Store {
    fn new() -> Store {
        let (sender, receiver) = async_channel::bounded(MAX_SESSIONS);
        Store { sender, receiver }
    }

    fn put(&self, session: &SslSession) {
        let Ok(der) = session.to_der() else { return };
        if is_reusable(session) {
            // It comes from a full handshake, so the server may have declined those before it.
            self.clear();
        }
        // A full store loses its oldest session.
        let _ = self.sender.force_send(der);
    }

    fn clear(&self) {
        while self.receiver.try_recv().is_ok() {}
    }

    fn take(&self) -> Option<SslSession> {
        let der = self.receiver.try_recv().ok()?;
        let session = SslSession::from_der(&der).ok()?;
        if is_reusable(&session) {
            // Not if a newer one is there by now that fills the store.
            let _ = self.sender.try_send(der);
        }
        Some(session)
    }
}

/// RFC 8446 appendix C.4: a ticket of TLS 1.3 is used once. In TLS 1.2, a resumed session brings no
/// new one.
fn is_reusable(session: &SslSession) -> bool {
    session.protocol_version() == SslVersion::TLS1_2
}
