//! See `candle_fuzz::archive`.
// libFuzzer calls a function by its name.
#![no_main]
#![allow(unsafe_code)]

libfuzzer_sys::fuzz_target!(init: candle_fuzz::let_caught_panics_be(), |data: &[u8]| candle_fuzz::archive::run(data));
