//! A map from ids that were given out here, one after the other: nobody can choose them so that they collide, and the hash
//! that std defends maps with would be a good part of what a look-up costs.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// By id.
pub(super) type ById<T> = HashMap<u64, T, BuildHasherDefault<Spread>>;

/// Spreads numbers that follow each other over all bits (Fibonacci hashing).
#[derive(Debug, Default)]
pub(super) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
