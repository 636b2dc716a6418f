//! Q6_K: 256 elements in 16 groups, `d * scale * (q - 32)`.
//!
//! Layout: 128 bytes, the low four bits; 64 bytes, the upper two; 16 signed bytes of scales; d f16. In each half of 128
//! elements, 32 elements each are: low nibbles of bytes 0 to 31, of 32 to 63, then the high nibbles of both; their
//! upper bits are bits 0-1, 2-3, 4-5 and 6-7 of the half's 32 bytes.

use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q6K;

impl Format for Q6K {
    const BYTES: usize = 210;
    const CHUNKS: usize = 16;
    const SCALES: usize = 16;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        let d = s.splat(s.f16(*bytes(block, 208)));
        s.store_at(s.mul(s.load_i8(bytes(block, 192)), d), out, 0);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        for half in 0..2 {
            let upper: &[u8; 32] = bytes(block, 128 + 32 * half);
            for quarter in 0..4 {
                let lower: &[u8; 32] = bytes(block, 64 * half + 32 * (quarter % 2));
                let mut values = [0; 32];
                for ((value, lower), upper) in values.iter_mut().zip(lower).zip(upper) {
                    let lower = lower >> (quarter / 2 * 4) & 15;
                    *value = (lower | (upper >> (2 * quarter) & 3) << 4).wrapping_sub(32);
                }
                for part in 0..2 {
                    let group = 8 * half + 2 * quarter + part;
                    let values = s.load_i8(bytes(&values, part * LANES));
                    emit(group, s.mul(values, s.splat(scales[group])));
                }
            }
        }
    }
}
