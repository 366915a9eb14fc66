//! Whether a caller shows a token.

use crate::config::Secret;
use crate::http1::RequestHead;

/// Whether a token was sent, as OpenAI's clients send it or as Anthropic's do. Where both fields came, one of them has to be
/// right.
pub(super) fn presents(head: &RequestHead, token: &Secret) -> bool {
    let bearer = head.headers.get("authorization").and_then(|sent| {
        let (scheme, rest) = sent.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(rest)
    });
    let sent =
        [bearer, head.headers.get("x-api-key")].map(|key| key.unwrap_or_default().trim_ascii());
    let [bearer, api_key] = sent.map(|key| is_same(token.reveal().as_bytes(), key));
    bearer | api_key
}

/// Compares every byte whatever the first ones are.
fn is_same(want: &[u8], sent: &[u8]) -> bool {
    let mut difference = want.len() ^ sent.len();
    for (at, byte) in want.iter().enumerate() {
        difference |= usize::from(byte ^ sent.get(at).unwrap_or(&0));
    }
    std::hint::black_box(difference) == 0
}
