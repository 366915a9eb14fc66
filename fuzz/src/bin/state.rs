#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| limitrate_fuzz::state(input));
