//! `/admin/`: one page, the same for everybody, that asks for what it shows.
//!
//! Needs nothing from anywhere else: its script and style are inside, known by their hashes, and nothing else may run.

/// The page.
pub const PAGE: &[u8] = include_bytes!("page.html");

/// What else is said of it. The hashes are those of what stands between `<style>` and `<script>` and their ends; a test
/// holds them to it.
pub const PAGE_HEADERS: [(&str, &str); 5] = [
    (
        "Content-Security-Policy",
        "default-src 'none'; connect-src 'self'; img-src data:; \
         style-src 'sha256-I96RJ9lfk31JuObUpWPag3toDoue8WEFeuWAX1rX8ts='; \
         script-src 'sha256-cgOXoDol547NsmoxTh8d+YVk6lJvenHHmfjV1MpmseQ='; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-cache"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn between<'t>(text: &'t str, from: &str, to: &str) -> &'t str {
        text.split_once(from).unwrap().1.split_once(to).unwrap().0
    }

    #[test]
    fn the_policy_knows_what_is_inside() {
        let page = std::str::from_utf8(PAGE).unwrap();
        assert!(PAGE.len() < 60 * 1024);
        for (part, directive) in [("style", "style-src"), ("script", "script-src")] {
            let inside = between(page, &format!("<{part}>"), &format!("</{part}>"));
            let hash = openssl::base64::encode_block(&openssl::sha::sha256(inside.as_bytes()));
            assert!(
                PAGE_HEADERS[0].1.contains(&format!("{directive} 'sha256-{hash}';")),
                "now it is {part} {hash}"
            );
        }
    }
}
