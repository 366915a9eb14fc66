//! Whether a client shows a token.

use crate::config::Secret;
use crate::http1::RequestHead;

/// Beside `Authorization: Bearer`: how clients of Anthropic, Azure and Google send a key.
const KEY_FIELDS: [&str; 3] = ["x-api-key", "api-key", "x-goog-api-key"];

/// Whether a token was sent in any of the ways that clients send keys. Of several, one has to be right.
pub(super) fn presents(head: &RequestHead, token: &Secret) -> bool {
    let bearer = head.headers.get("authorization").and_then(|sent| {
        let (scheme, rest) = sent.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(rest)
    });
    let keys = KEY_FIELDS.iter().map(|name| head.headers.get(name));
    let sent = keys.chain([bearer]).map(|key| key.unwrap_or_default().trim_ascii());
    sent.fold(false, |found, key| found | is_same(token.reveal().as_bytes(), key))
}

/// Compares every byte whatever the first ones are.
fn is_same(want: &[u8], sent: &[u8]) -> bool {
    let mut difference = want.len() ^ sent.len();
    for (at, byte) in want.iter().enumerate() {
        difference |= usize::from(byte ^ sent.get(at).unwrap_or(&0));
    }
    std::hint::black_box(difference) == 0
}
