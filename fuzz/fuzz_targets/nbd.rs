#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| wb_tests::fuzzed_nbd::nbd(bytes));
