//! Certificates for the tests, made as they are needed.

// Making certificates is all calls that can't fail here and return a Result.
#![allow(clippy::unwrap_used)]

use std::time::{SystemTime, UNIX_EPOCH};

use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Name, X509NameBuilder};

use super::Process;

/// A certificate and its key.
pub struct Identity {
    pub certificate: X509,
    pub key: PKey<Private>,
}

impl Identity {
    /// A CA.
    pub fn authority() -> Identity {
        let key = new_key();
        let mut builder = certificate("the test's CA", &key, 1);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        builder.set_issuer_name(&name("the test's CA")).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        Identity { certificate: builder.build(), key }
    }

    /// A CA of this one's making.
    pub fn delegate(&self) -> Identity {
        let key = new_key();
        let mut builder = certificate("the test's other CA", &key, 1);
        builder.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        builder.set_issuer_name(self.certificate.subject_name()).unwrap();
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        Identity { certificate: builder.build(), key }
    }

    /// A server's, valid for these names for so many days (below zero: expired).
    pub fn issue(&self, names: &SubjectAlternativeName, days: i64) -> Identity {
        self.issue_for(names, days, new_key())
    }

    /// The same for a key that is there already.
    pub fn issue_for(
        &self,
        names: &SubjectAlternativeName,
        days: i64,
        key: PKey<Private>,
    ) -> Identity {
        let mut builder = certificate("a provider", &key, days);
        let extension =
            names.build(&builder.x509v3_context(Some(&self.certificate), None)).unwrap();
        builder.append_extension(extension).unwrap();
        builder.set_issuer_name(self.certificate.subject_name()).unwrap();
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        Identity { certificate: builder.build(), key }
    }

    /// `server.tls` with this certificate, this chain behind it, and this key in PEM.
    pub fn serves(&self, chain: &[&Identity], key: &[u8]) -> String {
        let all = [self].into_iter().chain(chain.iter().copied());
        let pem: Vec<u8> =
            all.flat_map(|identity| identity.certificate.to_pem().unwrap()).collect();
        let cert_file = Process::file("fullchain.pem", std::str::from_utf8(&pem).unwrap());
        let key_file = Process::file("privkey.pem", std::str::from_utf8(key).unwrap());
        format!("tls: {{cert_file: {}, key_file: {}}}", cert_file.display(), key_file.display())
    }

    /// The same with the key as most programs write it.
    pub fn tls(&self) -> String {
        self.serves(&[], &self.key.private_key_to_pem_pkcs8().unwrap())
    }

    /// `ca_file:` with this certificate.
    pub fn ca_file(&self) -> String {
        let pem = String::from_utf8(self.certificate.to_pem().unwrap()).unwrap();
        format!("ca_file: {}", Process::file("ca.pem", &pem).display())
    }
}

fn new_key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

fn name(common: &str) -> X509Name {
    let mut builder = X509NameBuilder::new().unwrap();
    builder.append_entry_by_text("CN", common).unwrap();
    builder.build()
}

/// All but issuer, extensions and signature. Valid since two days before it ends.
fn certificate(common: &str, key: &PKey<Private>, days: i64) -> X509Builder {
    let from_now = |days: i64| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        Asn1Time::from_unix(now.cast_signed() + days * 24 * 60 * 60).unwrap()
    };
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    builder
        .set_serial_number(
            &BigNum::from_u32(fastrand::u32(1..)).unwrap().to_asn1_integer().unwrap(),
        )
        .unwrap();
    builder.set_subject_name(&name(common)).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&from_now(days - 2)).unwrap();
    builder.set_not_after(&from_now(days)).unwrap();
    builder
}

/// For servers that go by this name.
pub fn localhost() -> SubjectAlternativeName {
    let mut names = SubjectAlternativeName::new();
    names.dns("localhost");
    names
}
