//! Q4_1: 32 elements `d * q + m`.
//!
//! Layout: d f16; m f16; 16 bytes, the low nibbles are elements 0 to 15 and the high ones 16 to 31.

use super::half_scales::leading_halves;
use super::{Format, bytes};
use crate::simd::Simd;

/// The decoder.
pub(crate) struct Q4_1;

impl Format for Q4_1 {
    const BYTES: usize = 20;
    const CHUNKS: usize = 2;
    const SCALES: usize = 2;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        leading_halves(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        let affine = [s.splat(scales[0]), s.splat(scales[1])];
        let [low, high] = s.affine_nibbles(bytes(block, 4), affine, affine);
        emit(0, low);
        emit(1, high);
    }
}
