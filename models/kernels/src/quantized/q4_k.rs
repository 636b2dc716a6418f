//! Q4_K: 256 elements in 8 groups, `d * scale * q - dmin * min`.
//!
//! Layout: d f16; dmin f16; 12 bytes of scales and minima; 128 bytes, of which each 32 hold two groups, one in the low
//! and one in the high nibbles.

use super::k_scales::scales_and_offsets;
use super::{Format, bytes};
use crate::simd::Simd;

/// The decoder.
pub(crate) struct Q4K;

impl Format for Q4K {
    const BYTES: usize = 144;
    const CHUNKS: usize = 16;
    const SCALES: usize = 16;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        scales_and_offsets(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        // The low nibbles of 32 bytes are a group, the high ones the next.
        for pair in 0..4 {
            let low = [s.splat(scales[2 * pair]), s.splat(scales[2 * pair + 8])];
            let high = [s.splat(scales[2 * pair + 1]), s.splat(scales[2 * pair + 9])];
            let first = s.affine_nibbles(bytes(block, 16 + 32 * pair), low, high);
            let second = s.affine_nibbles(bytes(block, 32 + 32 * pair), low, high);
            emit(4 * pair, first[0]);
            emit(4 * pair + 1, second[0]);
            emit(4 * pair + 2, first[1]);
            emit(4 * pair + 3, second[1]);
        }
    }
}
