//! Conversions between f32 and the two half types.

use bytemuck::Pod;
use half::{bf16, f16};

use crate::elementwise::STEP;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// `out = x` rounded to bf16: nearest, ties to even; too large values become infinite, NaN stays NaN (quiet), denormal
/// numbers stay.
///
/// # Panics
/// Where the lengths differ.
pub fn f32_to_bf16(x: &[f32], out: &mut [bf16]) {
    narrow_with(level(), x, out);
}

/// `out = x` rounded to f16, as [`f32_to_bf16`] does.
///
/// # Panics
/// Where the lengths differ.
pub fn f32_to_f16(x: &[f32], out: &mut [f16]) {
    narrow_with(level(), x, out);
}

/// `out = x`, exactly.
///
/// # Panics
/// Where the lengths differ.
pub fn bf16_to_f32(x: &[bf16], out: &mut [f32]) {
    widen_with(level(), x, out);
}

/// `out = x`, exactly.
///
/// # Panics
/// Where the lengths differ.
pub fn f16_to_f32(x: &[f16], out: &mut [f32]) {
    widen_with(level(), x, out);
}

fn narrow_with<T: Element + Send>(level: Level, x: &[f32], out: &mut [T]) {
    parts(x, out, |x, out| dispatch!(level, narrow(x, out)));
}

fn widen_with<T: Element + Sync>(level: Level, x: &[T], out: &mut [f32]) {
    parts(x, out, |x, out| dispatch!(level, widen(x, out)));
}

/// Calls `body` in parallel for parts of `x` and `out`.
fn parts<A: Sync, B: Send>(x: &[A], out: &mut [B], body: impl Fn(&[A], &mut [B]) + Sync) {
    let length = out.len();
    assert_eq!(x.len(), length, "lengths of a conversion");
    if length == 0 {
        return;
    }
    let tiles = Tiles::new(out, length, Cuts::none(1), Cuts::Every { step: STEP, length });
    parallel_for(length.div_ceil(STEP), |task| {
        let range = task * STEP..length.min((task + 1) * STEP);
        body(&x[range], tiles.take(0, task).row(0));
    });
}

/// `to = from`.
#[inline(always)]
pub(crate) fn widen<T: Element, S: Simd>(s: S, from: &[T], to: &mut [f32]) {
    let (from_lanes, from_rest) = from.as_chunks::<LANES>();
    let (to_lanes, to_rest) = to.as_chunks_mut::<LANES>();
    for (from, to) in from_lanes.iter().zip(to_lanes) {
        s.store(T::load(s, from), to);
    }
    for (from, to) in from_rest.iter().zip(to_rest) {
        *to = from.widened();
    }
}

/// `to = from`, rounded.
#[inline(always)]
pub(crate) fn narrow<T: Element, S: Simd>(s: S, from: &[f32], to: &mut [T]) {
    let (from_lanes, from_rest) = from.as_chunks::<LANES>();
    let (to_lanes, to_rest) = to.as_chunks_mut::<LANES>();
    for (from, to) in from_lanes.iter().zip(to_lanes) {
        T::store(s, s.load(from), to);
    }
    for (from, to) in from_rest.iter().zip(to_rest) {
        *to = T::rounded(*from);
    }
}

/// A dense element type.
pub(crate) trait Element: Pod {
    /// Sixteen elements as f32.
    fn load<S: Simd>(s: S, from: &[Self; LANES]) -> S::F32;
    /// Sixteen elements, rounded.
    fn store<S: Simd>(s: S, value: S::F32, to: &mut [Self; LANES]);
    /// One as f32.
    fn widened(self) -> f32;
    /// One, rounded.
    fn rounded(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; LANES]) -> S::F32 {
        s.load(from)
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, value: S::F32, to: &mut [f32; LANES]) {
        s.store(value, to);
    }

    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[bf16; LANES]) -> S::F32 {
        s.load_bf16_bytes(bytemuck::cast_ref(from))
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, value: S::F32, to: &mut [bf16; LANES]) {
        s.store_bf16_bytes(value, bytemuck::cast_mut(to));
    }

    #[inline(always)]
    fn widened(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f16; LANES]) -> S::F32 {
        s.load_f16_bytes(bytemuck::cast_ref(from))
    }

    #[inline(always)]
    fn store<S: Simd>(s: S, value: S::F32, to: &mut [f16; LANES]) {
        s.store_f16_bytes(value, bytemuck::cast_mut(to));
    }

    #[inline(always)]
    fn widened(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        f16::from_f32(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::random;

    /// Ties, halves of the smallest and the largest numbers of both types, denormals, infinities, NaN, and all sorts.
    fn values() -> Vec<f32> {
        let bits = [
            0x3F80_8000,
            0x3F81_8000,
            0x3F80_8001,
            0x3F80_1000,
            0x3F80_3000,
            0x7F7F_FFFF,
            0x7F7F_7FFF,
            0x477F_EFFF,
            0x477F_F000,
            0x3300_0000,
            0x3300_0001,
            0x3380_0000,
            0x0000_0001,
            0x0001_8000,
            0x807F_FFFF,
            0x7F80_0000,
            0xFF80_0000,
            0x7FC0_0001,
            0xFF80_0001,
            0x7F80_0001,
            0x8000_0000,
        ];
        let mut values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        values.extend(
            random(70_000, 1)
                .into_iter()
                .enumerate()
                .map(|(i, x)| x * 2f32.powi(i as i32 % 80 - 40)),
        );
        values
    }

    #[test]
    fn every_level_rounds_like_the_definition_and_widens_exactly() {
        let x = values();
        for level in available() {
            let (mut b, mut f) = (vec![bf16::ZERO; x.len()], vec![f16::ZERO; x.len()]);
            narrow_with(level, &x, &mut b);
            narrow_with(level, &x, &mut f);
            for ((x, b), f) in x.iter().zip(&b).zip(&f) {
                let (want_b, want_f) = (bf16::from_f32(*x), f16::from_f32(*x));
                if x.is_nan() {
                    assert!(b.is_nan() && f.is_nan(), "{level}: {:x}", x.to_bits());
                } else {
                    let got = (b.to_bits(), f.to_bits());
                    assert_eq!(got, (want_b.to_bits(), want_f.to_bits()), "{level}: {:x}", x.to_bits());
                }
            }
            let (mut from_b, mut from_f) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            widen_with(level, &b, &mut from_b);
            widen_with(level, &f, &mut from_f);
            let same = |got: f32, want: f32| got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            for ((b, got), (f, other)) in b.iter().zip(from_b).zip(f.iter().zip(from_f)) {
                assert!(same(got, b.to_f32()) && same(other, f.to_f32()), "{level}: {b:?} {f:?}");
            }
        }
    }
}
