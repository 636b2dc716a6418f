//! Q5_1: 32 elements `d * q + m`.
//!
//! Layout: d f16; m f16; 32 bits, the fifth bit of each element; 16 bytes, the low nibbles are elements 0 to 15 and
//! the high ones 16 to 31.

use super::half_scales::leading_halves;
use super::q5_0::five_bits;
use super::{Format, bytes};
use crate::simd::Simd;

/// The decoder.
pub(crate) struct Q5_1;

impl Format for Q5_1 {
    const BYTES: usize = 24;
    const CHUNKS: usize = 2;
    const SCALES: usize = 2;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        leading_halves(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        let (low, high) = five_bits(bytes(block, 4), bytes(block, 8));
        let (scale, offset) = (s.splat(scales[0]), s.splat(scales[1]));
        emit(0, s.mul_add(s.load_u8(&low), scale, offset));
        emit(1, s.mul_add(s.load_u8(&high), scale, offset));
    }
}
