//! Why a session failed, in words for operators: no source file, no line, no code of OpenSSL.

use std::fmt;
use std::io::{self, ErrorKind};

use openssl::error::ErrorStack;
use openssl::ssl::{self, SslRef};
use openssl::x509::X509VerifyResult;

/// OpenSSL's reason for an alert of the peer is this plus the alert's number
/// (SSL_AD_REASON_OFFSET).
const ALERT_REASONS: i32 = 1000;

/// Why a session failed.
#[derive(Debug)]
pub enum Problem {
    /// The connection broke.
    Io(io::Error),
    /// The connection ended without a close_notify.
    Closed,
    /// The peer's bytes are no TLS records.
    NotTls,
    /// The two sides have no version in common.
    Version,
    /// The peer's certificate is refused, for this reason (X509_verify_cert_error_string(3)).
    Certificate(String),
    /// The peer ended the session with this alert (RFC 8446 section 6).
    Alert(u8),
    /// Anything else, as OpenSSL calls it.
    Other(String),
}

/// What a sentence about a failed handshake names besides the problem.
#[derive(Debug, Clone, Copy)]
pub struct Advice<'a> {
    /// The host that the certificate has to be for.
    pub host: &'a str,
    /// Where the operator wrote the URL, such as `base_url`.
    pub url: &'a str,
    /// What makes this machine trust another CA, as an instruction.
    pub trust: &'a str,
}

impl Problem {
    /// Classifies the error of a step.
    pub(super) fn of(error: ssl::Error, ssl: &SslRef) -> Problem {
        let verified = ssl.verify_result();
        let refused = if verified == X509VerifyResult::OK { "" } else { verified.error_string() };
        match error.into_io_error() {
            Ok(error) => Problem::Io(error),
            // Without a stack, it is an end.
            Err(error) => match error.ssl_error() {
                Some(stack) => Problem::of_stack(stack, refused),
                None => Problem::Closed,
            },
        }
    }

    /// Classifies OpenSSL's errors by the last one, which stopped the step. `refused` says why the
    /// certificate is refused, if it is.
    pub fn of_stack(stack: &ErrorStack, refused: &str) -> Problem {
        let Some(error) = stack.errors().last() else { return Problem::Closed };
        if let Ok(alert) = u8::try_from(error.reason_code() - ALERT_REASONS) {
            return if alert == alert::PROTOCOL_VERSION {
                Problem::Version
            } else {
                Problem::Alert(alert)
            };
        }
        match error.reason().unwrap_or("no reason given") {
            "certificate verify failed" => Problem::Certificate(refused.to_owned()),
            "unexpected eof while reading" => Problem::Closed,
            "wrong version number" => Problem::NotTls,
            "unsupported protocol" => Problem::Version,
            other => Problem::Other(other.to_owned()),
        }
    }

    /// True if the session ended with an alert, of either side, rather than with its connection.
    pub(super) fn is_fatal_alert(&self) -> bool {
        !matches!(self, Problem::Io(_) | Problem::Closed)
    }

    /// Replaces OpenSSL's words inside an error of a stream; other errors stay what they are.
    pub fn plain(error: io::Error) -> io::Error {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<ssl::Error>());
        match inner.and_then(ssl::Error::ssl_error) {
            Some(stack) => Problem::of_stack(stack, "").into_io(),
            None => error,
        }
    }

    /// Turns the problem into an error of a stream. Errors of the connection stay what they are.
    pub fn into_io(self) -> io::Error {
        match self {
            Problem::Io(error) => error,
            Problem::Closed => io::Error::new(ErrorKind::UnexpectedEof, self.to_string()),
            other => io::Error::other(other.to_string()),
        }
    }

    /// Why a handshake with a server failed, and what to do about it. Continues a sentence that
    /// names the server.
    pub fn of_handshake(&self, advice: &Advice<'_>) -> String {
        let Advice { host, url, trust } = advice;
        match self {
            Problem::Io(error) => format!("the connection broke during it: {error}"),
            Problem::Closed => "it closed the connection during the handshake".to_owned(),
            Problem::NotTls => {
                format!("it does not speak TLS on that port; try http:// in {url}")
            }
            Problem::Version => "it offers no TLS 1.2 or later".to_owned(),
            Problem::Certificate(reason) => certificate(reason, host, trust),
            Problem::Alert(alert::UNRECOGNIZED_NAME) => {
                format!("it does not serve the host {host} ({self})")
            }
            Problem::Alert(alert::HANDSHAKE_FAILURE | alert::INSUFFICIENT_SECURITY) => format!(
                "it has no cipher in common with limitrate, or it demands a client certificate \
                 ({self})"
            ),
            Problem::Alert(_) | Problem::Other(_) => self.to_string(),
        }
    }
}

/// The words for a session whose handshake is done.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Io(error) => error.fmt(f),
            Problem::Closed => f.write_str("the connection ended inside the TLS session"),
            Problem::NotTls => f.write_str("something that is no TLS came inside the TLS session"),
            Problem::Version => f.write_str("TLS alert protocol_version"),
            Problem::Certificate(reason) => write!(f, "its certificate is refused: {reason}"),
            Problem::Alert(alert::CERTIFICATE_REQUIRED) => f.write_str(
                "it demands a client certificate, and limitrate has none \
                 (TLS alert certificate_required)",
            ),
            Problem::Alert(number) => match alert::name(*number) {
                Some(name) => write!(f, "TLS alert {name}"),
                None => write!(f, "TLS alert {number}"),
            },
            Problem::Other(reason) => write!(f, "TLS failed: {reason}"),
        }
    }
}

/// Why a server's certificate is refused, and what to do about it.
fn certificate(reason: &str, host: &str, trust: &str) -> String {
    let has = |part: &str| reason.to_ascii_lowercase().contains(part);
    if has("has expired") {
        "its certificate, or one that signed it, has expired".to_owned()
    } else if has("not yet valid") {
        "its certificate is not yet valid; check the clock of this machine".to_owned()
    } else if has("hostname mismatch") {
        format!("its certificate is not for the host {host}")
    } else if has("ip address mismatch") {
        format!("its certificate is not for the IP address {host}")
    } else if has("self-signed") || has("self signed") {
        format!("this machine does not trust its certificate ({reason}); {trust}")
    } else if has("issuer certificate") || has("first certificate") || has("signature failure") {
        format!(
            "no CA that this machine trusts signed its certificate, or it does not send an \
             intermediate certificate ({reason}); {trust}"
        )
    } else {
        format!("its certificate is refused: {reason}")
    }
}

/// RFC 8446 section 6.
mod alert {
    pub(super) const HANDSHAKE_FAILURE: u8 = 40;
    pub(super) const PROTOCOL_VERSION: u8 = 70;
    pub(super) const INSUFFICIENT_SECURITY: u8 = 71;
    pub(super) const UNRECOGNIZED_NAME: u8 = 112;
    pub(super) const CERTIFICATE_REQUIRED: u8 = 116;

    pub(super) fn name(number: u8) -> Option<&'static str> {
        Some(match number {
            0 => "close_notify",
            10 => "unexpected_message",
            20 => "bad_record_mac",
            22 => "record_overflow",
            HANDSHAKE_FAILURE => "handshake_failure",
            42 => "bad_certificate",
            43 => "unsupported_certificate",
            44 => "certificate_revoked",
            45 => "certificate_expired",
            46 => "certificate_unknown",
            47 => "illegal_parameter",
            48 => "unknown_ca",
            49 => "access_denied",
            50 => "decode_error",
            51 => "decrypt_error",
            PROTOCOL_VERSION => "protocol_version",
            INSUFFICIENT_SECURITY => "insufficient_security",
            80 => "internal_error",
            86 => "inappropriate_fallback",
            90 => "user_canceled",
            100 => "no_renegotiation",
            109 => "missing_extension",
            110 => "unsupported_extension",
            UNRECOGNIZED_NAME => "unrecognized_name",
            113 => "bad_certificate_status_response",
            115 => "unknown_psk_identity",
            CERTIFICATE_REQUIRED => "certificate_required",
            120 => "no_application_protocol",
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_inside_a_session_has_its_words_and_its_kind() {
        let io = |problem: Problem| {
            let error = problem.into_io();
            (error.kind(), error.to_string())
        };
        let reset = io::Error::from(ErrorKind::ConnectionReset);
        assert_eq!(io(Problem::Io(reset)).0, ErrorKind::ConnectionReset);
        assert_eq!(
            io(Problem::Closed),
            (ErrorKind::UnexpectedEof, "the connection ended inside the TLS session".to_owned())
        );
        for (alert, words) in [
            (80, "TLS alert internal_error"),
            (255, "TLS alert 255"),
            (
                116,
                "it demands a client certificate, and limitrate has none \
                 (TLS alert certificate_required)",
            ),
        ] {
            assert_eq!(io(Problem::Alert(alert)), (ErrorKind::Other, words.to_owned()));
        }
    }

    #[test]
    fn words_of_openssl_are_replaced_inside_an_error_of_a_stream() {
        let stack = openssl::pkey::PKey::private_key_from_pem(b"no key").unwrap_err();
        assert!(stack.to_string().contains(".c:"), "nothing is there to be replaced: {stack}");
        let error = Problem::plain(io::Error::other(ssl::Error::from(stack)));
        assert!(error.to_string().starts_with("TLS failed: "), "{error}");
        assert!(!error.to_string().contains(".c:"), "{error}");
        let other = Problem::plain(io::Error::from(ErrorKind::BrokenPipe));
        assert_eq!(other.kind(), ErrorKind::BrokenPipe);
    }
}
