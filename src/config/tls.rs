//! `tls:`: the certificate that the gateway shows, and its key.
//!
//! What is read here was tried: OpenSSL serves with it. TLS 1.2 and 1.3, with Mozilla's intermediate ciphers.

use std::fmt;
use std::time::SystemTime;

use openssl::asn1::Asn1Time;
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{
    SslAcceptor, SslContext, SslMethod, SslOptions, SslSessionCacheMode, SslVersion,
};
use openssl::x509::X509;

use super::read::read_regular;
use super::section::{Found, Section, Walk};

/// A certificate with its chain and its key.
#[derive(Clone)]
pub struct Tls {
    context: SslContext,
    /// The server's own first.
    chain: Vec<X509>,
    key: PKey<Private>,
}

impl Tls {
    /// What a connection is secured with.
    pub fn context(&self) -> &SslContext {
        &self.context
    }

    /// When the certificate ends, in words.
    pub fn ends(&self) -> String {
        self.chain[0].not_after().to_string()
    }

    /// Whether the certificate's time covers this one.
    pub fn is_valid_at(&self, time: SystemTime) -> bool {
        let seconds =
            time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let time = Asn1Time::from_unix(i64::try_from(seconds).unwrap_or(i64::MAX));
        time.is_ok_and(|time| {
            self.chain[0].not_before() <= time && self.chain[0].not_after() >= time
        })
    }

    /// Key and certificates that belong together, in an order that can be sent.
    fn new(chain: Vec<X509>, key: PKey<Private>) -> Result<Tls, ErrorStack> {
        let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
        acceptor.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        acceptor.set_options(SslOptions::NO_RENEGOTIATION);
        // Tickets do it: nothing is kept here for callers who may not come back.
        acceptor.set_session_cache_mode(SslSessionCacheMode::OFF);
        acceptor.set_certificate(&chain[0])?;
        for further in &chain[1..] {
            acceptor.add_extra_chain_cert(further.clone())?;
        }
        acceptor.set_private_key(&key)?;
        acceptor.check_private_key()?;
        Ok(Tls { context: acceptor.build().into_context(), chain, key })
    }
}

impl PartialEq for Tls {
    fn eq(&self, other: &Tls) -> bool {
        let der = |tls: &Tls| {
            tls.chain.iter().map(|certificate| certificate.to_der().ok()).collect::<Vec<_>>()
        };
        der(self) == der(other) && self.key.public_eq(&other.key)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("certificates", &self.chain.len()).finish_non_exhaustive()
    }
}

/// Reads `tls:`, if it is there.
pub(super) fn tls(keys: &mut Section<'_, '_, '_>) -> Option<Tls> {
    let found = keys.optional("tls")?;
    let mut keys = keys.section("tls")?;
    let cert_file = keys
        .required("cert_file", "write the file of the certificate, e.g. cert_file: fullchain.pem");
    let key_file =
        keys.required("key_file", "write the file of its private key, e.g. key_file: privkey.pem");
    let chain = cert_file.as_ref().and_then(|found| chain(keys.walk, found));
    let key = key_file.as_ref().and_then(|found| private_key(keys.walk, found));
    let walk = keys.finish();
    let (chain, key) = (chain?, key?);
    let at = key_file.unwrap_or(found);
    if let Some(problem) = mismatch(&chain, &key) {
        walk.fault(&at, problem);
        return None;
    }
    match Tls::new(chain, key) {
        Ok(tls) => Some(tls),
        Err(error) => {
            walk.fault(
                &at,
                format!(
                    "is refused by OpenSSL: {}; make a new key and certificate",
                    reason(&error)
                ),
            );
            None
        }
    }
}

fn chain(walk: &mut Walk<'_>, found: &Found<'_>) -> Option<Vec<X509>> {
    let (pem, shown) = file(walk, found)?;
    match X509::stack_from_pem(&pem) {
        Ok(chain) if !chain.is_empty() => Some(chain),
        _ => {
            let needs =
                "it needs -----BEGIN CERTIFICATE----- and what follows, the server's own first";
            walk.fault(found, format!("{shown} holds no PEM certificate; {needs}"));
            None
        }
    }
}

/// PKCS#8, PKCS#1 or SEC 1.
fn private_key(walk: &mut Walk<'_>, found: &Found<'_>) -> Option<PKey<Private>> {
    let (pem, shown) = file(walk, found)?;
    // Never asks for a passphrase. With which cipher a key is encrypted does not matter: OpenSSL may not know it (lean.conf).
    let key = PKey::private_key_from_pem_callback(&pem, |_| Ok(0));
    let problem = match key {
        Ok(key) => return Some(key),
        // BEGIN ENCRYPTED PRIVATE KEY (RFC 7468), or Proc-Type: 4,ENCRYPTED (RFC 1421).
        Err(_) if memchr::memmem::find(&pem, b"ENCRYPTED").is_some() => {
            format!(
                "{shown} is encrypted, and nobody could type its passphrase; decrypt it with openssl pkey -in IN -out OUT"
            )
        }
        Err(_) => format!(
            "{shown} holds no PEM private key; it needs -----BEGIN PRIVATE KEY----- and what follows"
        ),
    };
    walk.fault(found, problem);
    None
}

/// What a file holds, and how it is shown. From the configuration's folder on.
fn file(walk: &mut Walk<'_>, found: &Found<'_>) -> Option<(Vec<u8>, String)> {
    let text = walk.text(found)?;
    match read_regular(&walk.folder.join(&text.value)) {
        Ok(bytes) => Some((bytes, text.shown)),
        Err(error) => {
            let start = "a relative path starts at the folder of this file";
            walk.fault(found, format!("{} cannot be read: {error}; {start}", text.shown));
            None
        }
    }
}

/// Why the key can't be used with the first certificate.
fn mismatch(chain: &[X509], key: &PKey<Private>) -> Option<&'static str> {
    let fits =
        |certificate: &X509| certificate.public_key().is_ok_and(|public| public.public_eq(key));
    if fits(&chain[0]) {
        return None;
    }
    Some(match chain.iter().any(fits) {
        true => {
            "belongs to a certificate further down in cert_file; put the server's own certificate first"
        }
        false => {
            "does not belong to the certificate in cert_file; write the key that it was made with"
        }
    })
}

/// The last of a stack of causes says what it means.
fn reason(error: &ErrorStack) -> String {
    error.errors().last().and_then(|error| error.reason()).unwrap_or("no reason given").to_owned()
}
