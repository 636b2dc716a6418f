//! Q4_0: 32 elements `d * (q - 8)`.
//!
//! Layout: d f16; 16 bytes, the low nibbles are elements 0 to 15 and the high ones 16 to 31.

use super::{Format, bytes};
use crate::simd::Simd;

/// The decoder.
pub(crate) struct Q4_0;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const CHUNKS: usize = 2;

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], mut emit: impl FnMut(usize, S::F32)) {
        let d = s.splat_f16(bytes(block, 0));
        let (low, high) = s.affine_nibbles(bytes(block, 2), d, s.mul(d, s.splat(-8.0)));
        emit(0, low);
        emit(1, high);
    }
}
