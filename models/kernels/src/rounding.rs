//! What rounding to a half type loses.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::simd::{Simd, dispatch, level};
use crate::threads::parallel_ranges;

/// A half-precision type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfType {
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary16.
    F16,
}

/// Elements that a half type cannot hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutOfRange {
    /// Those that are infinite or NaN, or become infinite.
    pub overflows: u64,
    /// Those other than 0 that become 0.
    pub underflows: u64,
}

impl OutOfRange {
    /// Adds other counts.
    pub(crate) fn add(&mut self, other: Self) {
        self.overflows += other.overflows;
        self.underflows += other.underflows;
    }
}

impl HalfType {
    /// The bits of the largest magnitude that becomes 0, half of the smallest subnormal (ties go to even), and of the
    /// smallest that becomes infinite, half a step above the largest finite value.
    fn limits(self) -> [u32; 2] {
        match self {
            // 2^-134 is a subnormal f32: 2^15 times the smallest.
            Self::Bf16 => [1 << 15, 0x7f7f_8000],
            Self::F16 => [2f32.powi(-25).to_bits(), 65520f32.to_bits()],
        }
    }
}

/// Counts the elements that rounding to the nearest value of `kind`, ties to even, loses.
pub fn out_of_range(x: &[f32], kind: HalfType) -> OutOfRange {
    let (level, limits) = (level(), kind.limits());
    let (overflows, underflows) = (AtomicU64::new(0), AtomicU64::new(0));
    parallel_ranges(x.len(), 1 << 15, |range| {
        // Counts of a piece fit in 32 bits, which keeps them in vectors.
        for piece in x[range].chunks(1 << 16) {
            let [high, low] = dispatch!(level, count(piece, limits));
            overflows.fetch_add(u64::from(high), Ordering::Relaxed);
            underflows.fetch_add(u64::from(low), Ordering::Relaxed);
        }
    });
    OutOfRange {
        overflows: overflows.into_inner(),
        underflows: underflows.into_inner(),
    }
}

#[inline(always)]
fn count<S: Simd>(_: S, x: &[f32], [low, high]: [u32; 2]) -> [u32; 2] {
    let mut counts = [0u32; 2];
    for x in x {
        let magnitude = x.to_bits() & 0x7fff_ffff;
        counts[0] += u32::from(magnitude >= high);
        // 0 wraps around to the largest.
        counts[1] += u32::from(magnitude.wrapping_sub(1) < low);
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;

    #[test]
    fn counts_are_those_of_the_conversions() {
        // Around every limit, and across all magnitudes.
        let mut bits: Vec<u32> = (0..=0xffff).map(|high| high << 16 | 0x5a5a & (high * 7)).collect();
        for kind in [HalfType::Bf16, HalfType::F16] {
            for limit in kind.limits() {
                bits.extend((limit - 3..limit + 4).flat_map(|bits| [bits, bits | 1 << 31]));
            }
        }
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for (kind, convert) in [
            (HalfType::Bf16, (|x| half::bf16::from_f32(x).to_f32()) as fn(f32) -> f32),
            (HalfType::F16, |x| half::f16::from_f32(x).to_f32()),
        ] {
            let number = |lost: &dyn Fn(f32) -> bool| x.iter().filter(|x| lost(**x)).count() as u64;
            let want = OutOfRange {
                overflows: number(&|x| !convert(x).is_finite()),
                underflows: number(&|x| x != 0.0 && convert(x) == 0.0),
            };
            assert_eq!(out_of_range(&x, kind), want);
            for level in available() {
                let [high, low] = dispatch!(level, count(&x, kind.limits()));
                assert_eq!((u64::from(high), u64::from(low)), (want.overflows, want.underflows));
            }
        }
    }
}
