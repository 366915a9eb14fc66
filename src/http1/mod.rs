//! HTTP/1.1 as bytes: heads and body framing, for both sides (RFC 9112).
//!
//! | file | owns |
//! |---|---|
//! | [`headers`] | [`Headers`]: the fields of a head, in few allocations |
//! | [`reader`] | [`Reader`]: bytes that came from a peer and are not used yet |
//! | [`request`] | a caller's head: every refusal with its status, then async-h1 |
//! | [`response`] | a provider's head, read with httparse |
//! | [`body`] | where a body ends, and which of its bytes are payload |
//! | [`write`] | heads and chunks on their way out |
//! | [`forwarding`] | which fields of a head go on to the next hop |
//!
//! The only room that names `async_h1`, `http_types` and `httparse`: none of their types leaves it. Nothing here knows
//! time, sockets or tasks. All of it is bytes in, value out, and gives the same value however the bytes were cut into
//! reads; the `read_` functions only add the reading.

pub mod body;
pub mod forwarding;
pub mod headers;
pub mod reader;
pub mod request;
pub mod response;
pub mod write;

pub use body::{BodyDecoder, BodyFault, Decoded, Framing};
pub use forwarding::{FieldNames, end_to_end, of_response, same_name};
pub use headers::Headers;
pub use reader::{Reader, Source};
pub use request::{ReadError, RequestHead, is_token, parse_request_head, read_request_head};
pub use response::{ReadFault, ResponseHead, parse_response_head, read_response_head};
pub use write::{
    BodyLength, CONTINUE, FINAL_CHUNK, write_chunk, write_request_head, write_response_head,
};

/// The most fields a head may have, on either side; async-h1's own limit.
pub const HEADER_LIMIT: usize = 128;

/// Whether the peer wants the connection to live on: `close` ends it, and HTTP/1.0 has to ask (RFC 9112 section 9.3).
fn keep_alive(headers: &Headers, http_10: bool) -> bool {
    !headers.has_token("connection", "close")
        && (!http_10 || headers.has_token("connection", "keep-alive"))
}

/// A Content-Length: digits only, no sign, no list, at most u64::MAX (RFC 9110 section 8.6).
fn parse_length(value: &[u8]) -> Option<u64> {
    if !is_digits(value) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Whether there is a digit and nothing else: `parse` alone takes a plus sign.
fn is_digits(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(u8::is_ascii_digit)
}

/// Whether the byte may stand in a token (RFC 9110 section 5.6.2).
fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What httparse found, detached from the bytes it points into.
fn collect(fields: &[httparse::Header<'_>]) -> Headers {
    Headers::of(fields.iter().map(|field| (field.name, field.value)))
}
