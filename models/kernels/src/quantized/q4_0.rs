//! Q4_0: 32 elements `d * (q - 8)`.
//!
//! Layout: d f16; 16 bytes, the low nibbles are elements 0 to 15 and the high ones 16 to 31.

use super::half_scales::leading_halves;
use super::{Format, bytes};
use crate::simd::Simd;

/// The decoder.
pub(crate) struct Q4_0;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const CHUNKS: usize = 2;
    const SCALES: usize = 1;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        leading_halves(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        let [low, high] = s.centred_nibbles(bytes(block, 2), s.splat(scales[0]));
        emit(0, low);
        emit(1, high);
    }
}
