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

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], mut emit: impl FnMut(usize, S::F32)) {
        let d = s.f16(*bytes(block, 208));
        let scales: &[u8; 16] = bytes(block, 192);
        for (group, &scale) in scales.iter().enumerate() {
            let (half, quarter, part) = (group / 8, group / 2 % 4, group % 2);
            let low: &[u8; LANES] = bytes(block, 64 * half + 32 * (quarter % 2) + LANES * part);
            let high: &[u8; LANES] = bytes(block, 128 + 32 * half + LANES * part);
            let values: [u8; LANES] = std::array::from_fn(|i| {
                let low = (low[i] >> (quarter / 2 * 4)) & 15;
                let high = (high[i] >> (2 * quarter)) & 3;
                (low | high << 4).wrapping_sub(32)
            });
            let scale = s.splat(d * f32::from(scale as i8));
            emit(group, s.mul(s.load_i8(&values), scale));
        }
    }
}
