//! Q3_K: 256 elements in 16 groups, `d * (scale - 32) * (q - 4)`.
//!
//! Layout: 32 bytes, the third bits; 64 bytes, the low two bits, laid out like Q2_K's; 12 bytes, the 6-bit scales;
//! d f16. Bit `j` of the third bits' byte `i` belongs to element `32 * j + i`.

use super::{Format, bytes};
use crate::simd::{LANES, Simd};

/// The decoder.
pub(crate) struct Q3K;

impl Format for Q3K {
    const BYTES: usize = 110;
    const CHUNKS: usize = 16;
    const SCALES: usize = 16;

    #[inline(always)]
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]) {
        let d = s.splat(s.f16(*bytes(block, 108)));
        let scales = s.sub(s.load_u8(&six_bit_scales(bytes(block, 96))), s.splat(32.0));
        s.store_at(s.mul(scales, d), out, 0);
    }

    #[inline(always)]
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], mut emit: impl FnMut(usize, S::F32)) {
        for (group, &scale) in scales.iter().enumerate() {
            let (half, shift, part) = (group / 8, group / 2 % 4 * 2, group % 2);
            let packed: &[u8; LANES] = bytes(block, 32 + 32 * half + LANES * part);
            let third: &[u8; LANES] = bytes(block, LANES * part);
            let values: [u8; LANES] = std::array::from_fn(|i| {
                let third_bit = (third[i] >> (group / 2)) & 1;
                ((packed[i] >> shift) & 3 | third_bit << 2).wrapping_sub(4)
            });
            emit(group, s.mul(s.load_i8(&values), s.splat(scale)));
        }
    }
}

/// Scales 0 to 15: low nibbles in bytes 0 to 7 (their high nibbles belong to scales 8 to 15), upper two bits in bytes 8
/// to 11, of scale `i` at bits `2 * (i / 4)` of byte `8 + i % 4`.
#[inline(always)]
fn six_bit_scales(packed: &[u8; 12]) -> [u8; 16] {
    std::array::from_fn(|i| {
        let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        low | ((packed[8 + i % 4] >> (2 * (i / 4))) & 3) << 4
    })
}
