//! The eight 6-bit scales and minima that Q4_K and Q5_K pack into 12 bytes.

/// Scales and minima of the eight groups of 32 elements.
///
/// The first four lie in the low six bits of bytes 0 to 3 and 4 to 7; of the last four the low nibbles share bytes 8 to
/// 11, and the upper two bits are those left over in bytes 0 to 7.
#[inline(always)]
pub(super) fn scales_and_minima(packed: &[u8; 12]) -> [(u8, u8); 8] {
    std::array::from_fn(|i| {
        if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            (
                packed[i + 4] & 15 | packed[i - 4] >> 6 << 4,
                packed[i + 4] >> 4 | packed[i] >> 6 << 4,
            )
        }
    })
}
