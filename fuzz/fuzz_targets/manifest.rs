//! See `candle_fuzz::manifest`.
// libFuzzer calls a function by its name.
#![no_main]
#![allow(unsafe_code)]

libfuzzer_sys::fuzz_target!(|data: &[u8]| candle_fuzz::manifest::run(data));
