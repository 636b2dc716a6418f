//! Q2_K: 256 elements in 16 groups, `d * scale * q - dmin * min`.
//!
//! Layout: 16 bytes, a group's scale (low nibble) and min (high nibble); 64 bytes of 2-bit values; d f16; dmin f16.
//! Each half of 128 elements has 32 bytes of values: bits 0 and 1 of them are the first 32 elements, and so on.

use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q2K;

impl Format for Q2K {
    const BYTES: usize = 84;
    const CHUNKS: usize = 16;

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], mut emit: impl FnMut(usize, S::F32)) {
        let (d, dmin) = (s.f16(*bytes(block, 80)), s.f16(*bytes(block, 82)));
        let scales: &[u8; 16] = bytes(block, 0);
        for (group, &packed_scale) in scales.iter().enumerate() {
            let (half, shift, part) = (group / 8, group / 2 % 4 * 2, group % 2);
            let packed: &[u8; LANES] = bytes(block, 16 + 32 * half + LANES * part);
            let values = packed.map(|byte| (byte >> shift) & 3);
            let scale = s.splat(d * f32::from(packed_scale & 15));
            let offset = s.splat(-(dmin * f32::from(packed_scale >> 4)));
            emit(group, s.mul_add(s.load_u8(&values), scale, offset));
        }
    }
}
