//! Q5_0: 32 elements `d * (q - 16)`.
//!
//! Layout: d f16; 32 bits, the fifth bit of each element; 16 bytes, the low nibbles are elements 0 to 15 and the high
//! ones 16 to 31.

use super::half_scales::leading_halves;
use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q5_0;

impl Format for Q5_0 {
    const BYTES: usize = 22;
    const CHUNKS: usize = 2;
    const SCALES: usize = 1;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        leading_halves(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        let (low, high) = five_bits(bytes(block, 2), bytes(block, 6));
        let scale = s.splat(scales[0]);
        let offset = s.mul(scale, s.splat(-16.0));
        emit(0, s.mul_add(s.load_u8(&low), scale, offset));
        emit(1, s.mul_add(s.load_u8(&high), scale, offset));
    }
}

/// Elements 0 to 15 and 16 to 31 from their fifth bits and nibbles.
#[inline(always)]
pub(super) fn five_bits(fifth: &[u8; 4], nibbles: &[u8; LANES]) -> ([u8; LANES], [u8; LANES]) {
    let fifth = u32::from_le_bytes(*fifth);
    let low = std::array::from_fn(|i| (nibbles[i] & 15) | (((fifth >> i) & 1) << 4) as u8);
    let high = std::array::from_fn(|i| (nibbles[i] >> 4) | (((fifth >> (i + 16)) & 1) << 4) as u8);
    (low, high)
}
