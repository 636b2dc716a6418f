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
    const SCALES: usize = 32;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        let (d, dmin) = (s.f16(*bytes(block, 80)), s.f16(*bytes(block, 82)));
        let (d, dmin, zero) = (s.splat(d), s.splat(-dmin), s.splat(0.0));
        let [scales, offsets] = s.affine_nibbles(bytes(block, 0), [d, zero], [dmin, zero]);
        s.store_at(scales, out, 0);
        s.store_at(offsets, out, LANES);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        for group in 0..16 {
            let (half, shift, part) = (group / 8, group / 2 % 4 * 2, group % 2);
            let packed: &[u8; LANES] = bytes(block, 16 + 32 * half + LANES * part);
            let values = packed.map(|byte| (byte >> shift) & 3);
            let (scale, offset) = (s.splat(scales[group]), s.splat(scales[LANES + group]));
            emit(group, s.mul_add(s.load_u8(&values), scale, offset));
        }
    }
}
