//! The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes.

use super::bytes;
use crate::simd::{LANES, Simd};

/// `d * scale` of the eight groups of 32 elements, then `-dmin * min` of each. The block begins with d f16, dmin f16 and
/// the packed scales and minima.
#[inline(always)]
pub(super) fn scales_and_offsets<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
    let (d, dmin) = (s.f16(*bytes(block, 0)), s.f16(*bytes(block, 2)));
    let factors = s.load(&std::array::from_fn(
        #[inline(always)]
        |i| if i < 8 { d } else { -dmin },
    ));
    s.store_at(s.mul(s.load_u8(&unpack(bytes(block, 4))), factors), out, 0);
}

/// The eight scales, then the eight minima.
///
/// The first four of each lie in the low six bits of bytes 0 to 3 and 4 to 7; of the last four the low nibbles share
/// bytes 8 to 11, and the upper two bits are those left over in bytes 0 to 7. Four neighbouring bytes are unpacked at a
/// time.
#[inline(always)]
fn unpack(packed: &[u8; 12]) -> [u8; LANES] {
    const SIX: u32 = 0x3F3F_3F3F;
    const FOUR: u32 = 0x0F0F_0F0F;
    const UPPER: u32 = 0x3030_3030;
    let word = |index: usize| u32::from_le_bytes(*bytes(packed, 4 * index));
    let (scales, minima, shared) = (word(0), word(1), word(2));
    let words = [
        scales & SIX,
        shared & FOUR | scales >> 2 & UPPER,
        minima & SIX,
        shared >> 4 & FOUR | minima >> 2 & UPPER,
    ];
    let mut unpacked = [0; LANES];
    for (bytes, word) in unpacked.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    unpacked
}
