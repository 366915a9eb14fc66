//! The fields of one head, in order. Does not parse them and does not know which mean what.

use std::fmt;
use std::mem;
use std::ops::Range;

/// Header fields in the order they were pushed, repeated names included. Looking up ignores ASCII case.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers {
    /// All names, one after the other.
    names: String,
    /// All values, one after the other.
    values: Vec<u8>,
    /// Where each field's name and value end in the two above.
    ends: Vec<(usize, usize)>,
}

impl Headers {
    /// These, in memory of just their size.
    pub fn of<'f>(fields: impl Iterator<Item = (&'f str, &'f [u8])> + Clone) -> Self {
        let sizes = |(count, names, values), (name, value): (&str, &[u8])| {
            (count + 1, names + name.len(), values + value.len())
        };
        let (count, names, values) = fields.clone().fold((0, 0, 0), sizes);
        let mut headers = Self {
            names: String::with_capacity(names),
            values: Vec::with_capacity(values),
            ends: Vec::with_capacity(count),
        };
        fields.for_each(|(name, value)| headers.push(name, value));
        headers
    }

    /// Appends a field. The name keeps its case; the value may hold any bytes.
    pub fn push(&mut self, name: &str, value: &[u8]) {
        self.names.push_str(name);
        self.values.extend_from_slice(value);
        self.ends.push((self.names.len(), self.values.len()));
    }

    /// Takes out every field of that name.
    pub fn remove(&mut self, name: &str) {
        *self = Headers::of(self.iter().filter(|(other, _)| !other.eq_ignore_ascii_case(name)));
    }

    /// All fields, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> + Clone {
        self.places().map(|(name, value)| (&self.names[name], &self.values[value]))
    }

    /// Where each field's name and value are.
    fn places(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + Clone {
        let mut start = (0, 0);
        self.ends.iter().map(move |&end| {
            let (name, value) = mem::replace(&mut start, end);
            (name..end.0, value..end.1)
        })
    }

    /// The first value of that name.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.get_all(name).next()
    }

    /// Every value of that name, in order.
    pub fn get_all(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let names = self.names.as_bytes();
        // Most differ in length already: requests are asked for many fields that they do not have.
        let named = move |field: &Range<usize>| {
            field.len() == name.len() && names[field.clone()].eq_ignore_ascii_case(name.as_bytes())
        };
        self.places().filter(move |(field, _)| named(field)).map(|(_, value)| &self.values[value])
    }

    /// The items of all fields of that name, which hold lists (RFC 9110 section 5.6.1).
    pub fn items(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.get_all(name).flat_map(list_items)
    }

    /// Whether any field of that name lists the token; case of both is ignored (RFC 9110 section 5.6.1).
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.items(name).any(|item| item.eq_ignore_ascii_case(token.as_bytes()))
    }

    /// How many fields there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no field.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

/// The items of a comma-separated value, without the white space around them; an empty item is kept.
pub(super) fn list_items(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

/// Names and the sizes of values only: values may be keys, and Debug ends up in logs.
impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(
                self.iter()
                    .map(|(name, value)| (name, format_args!("{} bytes", value.len()).to_string())),
            )
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Headers {
        let mut headers = Headers::default();
        headers.push("Set-Cookie", b"a=1");
        headers.push("X-Latin", b"caf\xe9");
        headers.push("set-cookie", b"");
        headers.push("Connection", b" Foo,\tclose ,,");
        headers.push("connection", b"bar");
        headers
    }

    #[test]
    fn what_is_removed_leaves_the_others_in_order() {
        let mut headers = sample();
        let others: Vec<_> = sample()
            .iter()
            .filter(|(name, _)| *name != "X-Latin")
            .map(|(_, v)| v.to_vec())
            .collect();
        headers.remove("x-latin");
        assert_eq!(headers.iter().map(|(_, value)| value.to_vec()).collect::<Vec<_>>(), others);
        headers.remove("SET-COOKIE");
        assert!(headers.get("set-cookie").is_none());
        headers.remove("absent");
    }

    #[test]
    fn fields_keep_order_case_and_bytes() {
        let headers = sample();
        let fields: Vec<_> = headers.iter().collect();
        assert_eq!(fields[0], ("Set-Cookie", &b"a=1"[..]));
        assert_eq!(fields[1], ("X-Latin", &b"caf\xe9"[..]));
        assert_eq!(fields[2], ("set-cookie", &b""[..]));
        assert_eq!((headers.len(), headers.is_empty()), (5, false));
        assert_eq!(Headers::of(headers.iter()), headers);
        assert!(Headers::of(std::iter::empty()).is_empty());
    }

    #[test]
    fn look_up_ignores_case() {
        let headers = sample();
        assert_eq!(headers.get("SET-COOKIE"), Some(&b"a=1"[..]));
        assert_eq!(headers.get_all("set-cookie").collect::<Vec<_>>(), [&b"a=1"[..], b""]);
        assert_eq!(["Set-Cookie", "Cookie"].map(|name| headers.get_all(name).count()), [2, 0]);
        assert_eq!(headers.get("Cookie"), None);
    }

    #[test]
    fn tokens_are_found_over_all_fields_and_whole() {
        let headers = sample();
        for token in ["foo", "CLOSE", "Bar"] {
            assert!(headers.has_token("connection", token), "{token}");
        }
        for token in ["clos", "closed", "foo,"] {
            assert!(!headers.has_token("connection", token), "{token}");
        }
    }

    #[test]
    fn debug_shows_no_value() {
        let mut headers = Headers::default();
        headers.push("Authorization", b"Bearer secret");
        assert_eq!(format!("{headers:?}"), r#"{"Authorization": "13 bytes"}"#);
    }
}
