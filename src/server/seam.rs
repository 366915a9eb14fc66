//! How far an event stream may go on so that an event of ours can follow if it breaks off there.
//!
//! The SDKs parse every event that they see the end of, and an error event can follow no sooner: half an event that went out
//! would be ended by it and raise a fault of JSON instead. What is held here no reader of events could act on yet.

/// A longer line goes on in pieces.
const HELD_BYTES: usize = 64 * 1024;

/// Fields that make an event of their own to the SDKs when an empty line follows instead of their data.
const NO_EVENTS_ALONE: [&[u8]; 3] = [b"event:", b"id:", b"retry:"];

/// Where the stream stands at the caller.
#[derive(Debug, Default)]
pub struct Seam {
    ending: &'static [u8],
}

impl Seam {
    /// How many of these bytes go on; the others come again, in front of what follows them.
    pub fn whole(&mut self, bytes: &[u8]) -> usize {
        let mut end = line_end(bytes);
        let mut line = last_line(&bytes[..end]);
        while NO_EVENTS_ALONE.iter().any(|field| line.starts_with(field)) {
            end -= line.len();
            line = last_line(&bytes[..end]);
        }
        if bytes.len() - end > HELD_BYTES {
            self.ending = b"\n\n";
            return bytes.len();
        }
        match (line.starts_with(b"data"), line.ends_with(b"\r")) {
            _ if line.is_empty() => {}
            (false, _) => self.ending = b"",
            (true, false) => self.ending = b"\n",
            // The LF may still belong to that CR.
            (true, true) => self.ending = b"\n\n",
        }
        end
    }

    /// What ends the event that has begun at the caller; an empty line too many would be one more event to some.
    pub fn ending(&self) -> &'static [u8] {
        self.ending
    }
}

/// Behind the last line that is complete. Lines end in LF, CRLF or CR (WHATWG HTML, section 9.2.5).
fn line_end(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| matches!(byte, b'\n' | b'\r')).map_or(0, |at| at + 1)
}

/// The last of complete lines, with its end.
fn last_line(lines: &[u8]) -> &[u8] {
    let text = lines
        .strip_suffix(b"\r\n")
        .or(lines.split_last().map(|(_, text)| text))
        .unwrap_or_default();
    &lines[line_end(text)..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_go_on_and_names_wait_for_their_data() {
        for (bytes, goes_on, ending) in [
            ("", "", ""),
            ("data: {\"a\"", "", ""),
            (": waiting\n", ": waiting\n", ""),
            ("data: 1\n\n", "data: 1\n\n", ""),
            ("data: 1\n\ndata: {\"a\"", "data: 1\n\n", ""),
            ("data: 1\nda", "data: 1\n", "\n"),
            ("data: 1\r\n", "data: 1\r\n", "\n"),
            ("data: 1\r", "data: 1\r", "\n\n"),
            ("data: 1\r\n\r\n", "data: 1\r\n\r\n", ""),
            ("data: 1\r\rdata", "data: 1\r\r", ""),
            ("event: delta\n", "", ""),
            ("event: delta\r\ndata: {\"a\"", "", ""),
            ("data: 1\n\nid: 7\r\nevent: delta\r\nda", "data: 1\n\n", ""),
            ("data: 1\nid: 7\n", "data: 1\n", "\n"),
            ("event: delta\ndata: 1\n", "event: delta\ndata: 1\n", "\n"),
            ("{\"no\": \"event\"}\n{", "{\"no\": \"event\"}\n", ""),
        ] {
            let mut seam = Seam::default();
            assert_eq!(seam.whole(bytes.as_bytes()), goes_on.len(), "{bytes:?}");
            assert_eq!(seam.ending(), ending.as_bytes(), "{bytes:?}");
        }
    }

    #[test]
    fn the_ending_is_that_of_what_has_gone_on() {
        let mut seam = Seam::default();
        seam.whole(b"data: 1\n");
        assert_eq!(seam.whole(b"event: delta\ndata: 2"), 0);
        assert_eq!(seam.ending(), b"\n");
        assert_eq!(seam.whole(b"\nevent: delta\ndata: 2"), 1);
        assert_eq!(seam.ending(), b"");
    }

    #[test]
    fn a_line_past_the_limit_goes_on_in_pieces() {
        let mut seam = Seam::default();
        let line = [b'x'; HELD_BYTES + 1];
        assert_eq!(seam.whole(&line[1..]), 0);
        assert_eq!(seam.whole(&line), line.len());
        assert_eq!(seam.ending(), b"\n\n");
        assert_eq!(seam.whole(b"\n\nda"), 2);
        assert_eq!(seam.ending(), b"");
    }
}
