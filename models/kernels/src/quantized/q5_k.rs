//! Q5_K: 256 elements in 8 groups, `d * scale * q - dmin * min`.
//!
//! Layout: d f16; dmin f16; 12 bytes of scales and minima; 32 bytes, whose bit `g` is the fifth bit of group `g`; 128
//! bytes of nibbles laid out like Q4_K's.

use super::k_scales::scales_and_minima;
use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q5K;

impl Format for Q5K {
    const BYTES: usize = 176;
    const CHUNKS: usize = 16;

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], mut emit: impl FnMut(usize, S::F32)) {
        let (d, dmin) = (s.f16(*bytes(block, 0)), s.f16(*bytes(block, 2)));
        let groups = scales_and_minima(bytes(block, 4));
        for (group, (scale, min)) in groups.into_iter().enumerate() {
            let (scale, offset) = (s.splat(d * f32::from(scale)), s.splat(-(dmin * f32::from(min))));
            for part in 0..2 {
                let fifth: &[u8; LANES] = bytes(block, 16 + part * LANES);
                let packed: &[u8; LANES] = bytes(block, 48 + group / 2 * 32 + part * LANES);
                let values: [u8; LANES] =
                    std::array::from_fn(|i| ((packed[i] >> (group % 2 * 4)) & 15) | (((fifth[i] >> group) & 1) << 4));
                emit(2 * group + part, s.mul_add(s.load_u8(&values), scale, offset));
            }
        }
    }
}
