//! Q8_0: 32 elements `d * q`.
//!
//! Layout: d f16; 32 signed bytes.

use super::half_scales::leading_halves;
use super::{Format, bytes};
use crate::simd::Simd;

/// The decoder.
pub(crate) struct Q8_0;

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const CHUNKS: usize = 2;
    const SCALES: usize = 1;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        leading_halves(s, block, out);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        let d = s.splat(scales[0]);
        emit(0, s.mul(s.load_i8(bytes(block, 2)), d));
        emit(1, s.mul(s.load_i8(bytes(block, 18)), d));
    }
}
