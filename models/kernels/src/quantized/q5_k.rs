//! Q5_K: 256 elements in 8 groups, `d * scale * q - dmin * min`.
//!
//! Layout: d f16; dmin f16; 12 bytes of scales and minima; 32 bytes, whose bit `g` is the fifth bit of group `g`; 128
//! bytes of nibbles laid out like Q4_K's.

use super::k_scales::scales_and_offsets;
use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q5K;

impl Format for Q5K {
    const BYTES: usize = 176;
    const CHUNKS: usize = 16;
    const SCALES: usize = 16;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        scales_and_offsets(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        let fifth: &[u8; 32] = bytes(block, 16);
        for group in 0..8 {
            let (scale, offset) = (s.splat(scales[group]), s.splat(scales[8 + group]));
            let packed: &[u8; 32] = bytes(block, 48 + group / 2 * 32);
            let mut values = [0; 32];
            for ((value, packed), fifth) in values.iter_mut().zip(packed).zip(fifth) {
                *value = (packed >> (group % 2 * 4)) & 15 | (fifth >> group & 1) << 4;
            }
            for part in 0..2 {
                let values = s.load_u8(bytes(&values, part * LANES));
                emit(2 * group + part, s.mul_add(values, scale, offset));
            }
        }
    }
}
