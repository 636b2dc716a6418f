//! Q4_K: 256 elements in 8 groups, `d * scale * q - dmin * min`.
//!
//! Layout: d f16; dmin f16; 12 bytes of scales and minima; 128 bytes, of which each 32 hold two groups, one in the low
//! and one in the high nibbles.

use super::k_scales::scales_and_minima;
use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q4K;

impl Format for Q4K {
    const BYTES: usize = 144;
    const CHUNKS: usize = 16;

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], mut emit: impl FnMut(usize, S::F32)) {
        let (d, dmin) = (s.f16(*bytes(block, 0)), s.f16(*bytes(block, 2)));
        let groups = scales_and_minima(bytes(block, 4));
        for (group, (scale, min)) in groups.into_iter().enumerate() {
            let (scale, offset) = (s.splat(d * f32::from(scale)), s.splat(-(dmin * f32::from(min))));
            for part in 0..2 {
                let packed: &[u8; LANES] = bytes(block, 16 + group / 2 * 32 + part * LANES);
                let values = packed.map(|byte| (byte >> (group % 2 * 4)) & 15);
                emit(2 * group + part, s.mul_add(s.load_u8(&values), scale, offset));
            }
        }
    }
}
