//! Activations as signed bytes in blocks with one scale each, optionally as differences to another array.

use crate::simd::{Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Elements that share a scale.
pub const BLOCK_SIZE: usize = 64;

/// Blocks that one task handles.
const BLOCKS_PER_TASK: usize = 256;

/// Rounds `x` to signed bytes: element `i` is about `codes[i] * scales[i / BLOCK_SIZE]`, where the scale is the block's
/// largest magnitude over 127, so that the error is at most half a scale.
///
/// With a `base` of the same length, a block whose differences to the base are smaller than its values is stored as
/// differences, which the sign of its scale tells. A block with a value that is not finite becomes NaN as a whole.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn quantize_blocks(x: &[f32], base: Option<&[f32]>, codes: &mut [i8], scales: &mut [f32]) {
    quantize_with(level(), x, base, codes, scales);
}

fn quantize_with(level: Level, x: &[f32], base: Option<&[f32]>, codes: &mut [i8], scales: &mut [f32]) {
    check_lengths(x.len(), base, codes.len(), scales.len());
    let (length, blocks) = (codes.len(), scales.len());
    if length == 0 {
        return;
    }
    let step = BLOCKS_PER_TASK * BLOCK_SIZE;
    let codes = Tiles::new(codes, length, Cuts::none(1), Cuts::Every { step, length });
    let (step, length) = (BLOCKS_PER_TASK, blocks);
    let scales = Tiles::new(scales, blocks, Cuts::none(1), Cuts::Every { step, length });
    parallel_for(blocks.div_ceil(BLOCKS_PER_TASK), |task| {
        let (mut codes, mut scales) = (codes.take(0, task), scales.take(0, task));
        let codes = codes.row(0);
        let start = task * BLOCKS_PER_TASK * BLOCK_SIZE;
        let range = start..start + codes.len();
        let base = base.map(|base| &base[range.clone()]);
        dispatch!(level, quantize_body(&x[range], base, codes, scales.row(0)));
    });
}

#[inline(always)]
fn quantize_body<S: Simd>(_: S, x: &[f32], base: Option<&[f32]>, codes: &mut [i8], scales: &mut [f32]) {
    let blocks = x.chunks(BLOCK_SIZE).zip(codes.chunks_mut(BLOCK_SIZE)).zip(scales);
    for (block, ((x, codes), scale)) in blocks.enumerate() {
        // A short last block is padded with zeros, which change no maximum.
        let mut values = [0.0f32; BLOCK_SIZE];
        values[..x.len()].copy_from_slice(x);
        let mut largest = magnitude(&values);
        let mut sign = 1.0;
        if let Some(base) = base {
            let mut differences = values;
            let start = block * BLOCK_SIZE;
            let base = &base[start..start + x.len()];
            differences.iter_mut().zip(base).for_each(|(x, base)| *x -= base);
            let difference = magnitude(&differences);
            if difference < largest {
                (values, largest, sign) = (differences, difference, -1.0);
            }
        }
        // Their reciprocals would overflow: what is as small as that counts as 0.
        if largest < 127.0 * f32::MIN_POSITIVE {
            largest = 0.0;
        }
        *scale = sign * largest / 127.0;
        let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let mut rounded = [0i8; BLOCK_SIZE];
        for (code, value) in rounded.iter_mut().zip(&values) {
            *code = (value * factor).round_ties_even() as i32 as i8;
        }
        codes.copy_from_slice(&rounded[..codes.len()]);
    }
}

/// The largest magnitude; NaN if a value is not finite.
#[inline(always)]
fn magnitude(values: &[f32; BLOCK_SIZE]) -> f32 {
    let mut largest = 0.0f32;
    // Zero times a finite value is zero; anything else shows in the sum.
    let mut zero = 0.0f32;
    for value in values {
        largest = largest.max(value.abs());
        zero += value * 0.0;
    }
    largest + zero
}

/// Undoes [`quantize_blocks`], up to its rounding. `base` must be what it got.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn dequantize_blocks(codes: &[i8], scales: &[f32], base: Option<&[f32]>, out: &mut [f32]) {
    dequantize_with(level(), codes, scales, base, out);
}

fn dequantize_with(level: Level, codes: &[i8], scales: &[f32], base: Option<&[f32]>, out: &mut [f32]) {
    check_lengths(out.len(), base, codes.len(), scales.len());
    let length = out.len();
    if length == 0 {
        return;
    }
    let step = BLOCKS_PER_TASK * BLOCK_SIZE;
    let tiles = Tiles::new(out, length, Cuts::none(1), Cuts::Every { step, length });
    parallel_for(length.div_ceil(step), |task| {
        let mut tile = tiles.take(0, task);
        let out = tile.row(0);
        let range = task * step..task * step + out.len();
        let base = base.map(|base| &base[range.clone()]);
        let scales = &scales[task * BLOCKS_PER_TASK..];
        dispatch!(level, dequantize_body(&codes[range], scales, base, out));
    });
}

#[inline(always)]
fn dequantize_body<S: Simd>(_: S, codes: &[i8], scales: &[f32], base: Option<&[f32]>, out: &mut [f32]) {
    let blocks = codes.chunks(BLOCK_SIZE).zip(scales).zip(out.chunks_mut(BLOCK_SIZE));
    for (block, ((codes, scale), out)) in blocks.enumerate() {
        let size = scale.abs();
        for (out, code) in out.iter_mut().zip(codes) {
            *out = f32::from(*code) * size;
        }
        // Also of -0, where the differences are 0.
        if let (Some(base), true) = (base, scale.is_sign_negative()) {
            let start = block * BLOCK_SIZE;
            let base = &base[start..start + out.len()];
            out.iter_mut().zip(base).for_each(|(out, base)| *out += base);
        }
    }
}

fn check_lengths(values: usize, base: Option<&[f32]>, codes: usize, scales: usize) {
    assert_eq!(values, codes, "{values} values as {codes} codes");
    assert_eq!(codes.div_ceil(BLOCK_SIZE), scales, "{scales} scales for {codes} codes");
    if let Some(base) = base {
        assert_eq!(values, base.len(), "{values} values on a base of {}", base.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::random;

    fn round_trip(level: Level, x: &[f32], base: Option<&[f32]>) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
        let (mut codes, mut scales) = (vec![0; x.len()], vec![0.0; x.len().div_ceil(BLOCK_SIZE)]);
        quantize_with(level, x, base, &mut codes, &mut scales);
        let mut out = vec![0.0; x.len()];
        dequantize_with(level, &codes, &scales, base, &mut out);
        (codes, scales, out)
    }

    #[test]
    fn the_error_is_at_most_half_a_scale_at_every_level() {
        for length in [0, 1, 63, 64, 65, 1000, BLOCKS_PER_TASK * BLOCK_SIZE + 7] {
            let x = random(length, 1);
            let mut near = random(length, 2);
            near.iter_mut().zip(&x).for_each(|(base, x)| *base = x + *base / 50.0);
            for base in [None, Some(&near[..])] {
                let expected = round_trip(Level::Portable, &x, base);
                for level in available() {
                    let (codes, scales, out) = round_trip(level, &x, base);
                    for (i, (x, out)) in x.iter().zip(&out).enumerate() {
                        let scale = scales[i / BLOCK_SIZE];
                        assert!((x - out).abs() <= 0.5001 * scale.abs(), "{x} {out} {scale}");
                        assert_eq!(scale < 0.0, base.is_some(), "differences are smaller here");
                    }
                    assert_eq!((&codes, &scales), (&expected.0, &expected.1));
                }
            }
        }
    }

    #[test]
    fn values_are_kept_where_differences_are_larger() {
        let (x, base) = (random(64, 1), vec![100.0; 64]);
        let (_, scales, _) = round_trip(level(), &x, Some(&base));
        assert!(scales[0] > 0.0);
        let (_, scales, out) = round_trip(level(), &base, Some(&base));
        assert_eq!((scales[0].abs(), out), (0.0, base));
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for base in [None, Some(&[0.5f32; 128][..])] {
                let mut x = random(128, 3);
                x[70] = bad;
                let (_, _, out) = round_trip(level(), &x, base);
                assert!(out[..64].iter().all(|value| value.is_finite()));
                assert!(out[64..].iter().all(|value| value.is_nan()));
            }
        }
    }
}
