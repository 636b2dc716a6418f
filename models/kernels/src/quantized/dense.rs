//! Dense formats: sixteen elements at a time.

use super::{Format, bytes};
use crate::simd::Simd;

/// IEEE single precision.
pub(crate) struct F32;

/// IEEE half precision.
pub(crate) struct F16;

/// bfloat16.
pub(crate) struct Bf16;

impl Format for F32 {
    const BYTES: usize = 64;
    const CHUNKS: usize = 1;
    const SCALES: usize = 0;

    #[inline(always)]
    fn scales<S: Simd>(_: S, _: &[u8], _: &mut [f32]) {}

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], _: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        emit(0, s.load_f32_bytes(bytes(block, 0)));
    }
}

impl Format for F16 {
    const BYTES: usize = 32;
    const CHUNKS: usize = 1;
    const SCALES: usize = 0;

    #[inline(always)]
    fn scales<S: Simd>(_: S, _: &[u8], _: &mut [f32]) {}

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], _: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        emit(0, s.load_f16_bytes(bytes(block, 0)));
    }
}

impl Format for Bf16 {
    const BYTES: usize = 32;
    const CHUNKS: usize = 1;
    const SCALES: usize = 0;

    #[inline(always)]
    fn scales<S: Simd>(_: S, _: &[u8], _: &mut [f32]) {}

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], _: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        emit(0, s.load_bf16_bytes(bytes(block, 0)));
    }
}
