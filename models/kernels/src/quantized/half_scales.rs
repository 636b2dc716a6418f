//! The scales of formats whose blocks begin with one or two numbers in half precision.

use super::bytes;
use crate::simd::Simd;

/// The first one or two numbers of a block, in single precision.
#[inline(always)]
pub(super) fn leading_halves<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
    // Four are converted by one instruction from memory, whatever the others are.
    let halves = s.f16_quad(bytes(block, 0));
    out.copy_from_slice(&halves[..out.len()]);
}
