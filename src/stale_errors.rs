//! OpenSSL's queue of errors, of which each thread has one.
//!
//! A step of a TLS session takes whatever is in it for its own error (SSL_get_error(3): it has to be empty before), and calls that
//! went well leave things in it at times, such as what the readers of other formats than a key's complained of.

use openssl::error::ErrorStack;

/// Empties this thread's queue. Before each step of a session.
pub fn forget() {
    drop(ErrorStack::get());
}

#[cfg(test)]
mod tests {
    use openssl::pkey::PKey;

    use super::*;

    #[test]
    fn what_others_left_is_gone() {
        let left = || PKey::private_key_from_pem(b"no key").unwrap_err();
        left().put();
        assert!(!ErrorStack::get().errors().is_empty(), "an error that is put back is there");
        left().put();
        forget();
        assert!(ErrorStack::get().errors().is_empty());
    }

    /// Not so in an OpenSSL that was built without threads, where nothing else is any thread's own either.
    #[test]
    fn each_thread_has_its_own() {
        PKey::private_key_from_pem(b"no key").unwrap_err().put();
        let seen_there = std::thread::spawn(|| ErrorStack::get().errors().len()).join().unwrap();
        assert_eq!(seen_there, 0);
        assert!(!ErrorStack::get().errors().is_empty(), "it is still here");
    }
}
