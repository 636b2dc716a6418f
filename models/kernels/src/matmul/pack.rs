//! Packing of operands into panels.
//!
//! A panel holds so many neighbouring rows of the left operand, or columns of the right one ("lanes" here), as a tile has:
//! for each element of the common dimension in turn, one value of each lane. Lanes beyond the operand's are zero.

use std::ops::Range;

use half::{bf16, f16};

use super::matrix::{Elements, MatrixRef};
use crate::convert::{Element, widen};
use crate::simd::{LANES, Level, Simd, dispatch};

/// Packs the part `depth` of the common dimension for the lanes from `first` on: as many as `width` and the operand allow.
/// `operand` is `[lanes, common dimension]`, `panel` `[depth, width]`.
pub(super) fn panel(level: Level, operand: MatrixRef<'_>, first: usize, depth: Range<usize>, panel: &mut [f32]) {
    let width = panel.len() / depth.len();
    let lanes = first..operand.rows.min(first + width);
    let (interleaved, stride) = operand.order();
    match operand.elements {
        Elements::F32(data) => dispatch!(level, typed::<f32>(data, interleaved, stride, lanes, depth, panel)),
        Elements::Bf16(data) => dispatch!(level, typed::<bf16>(data, interleaved, stride, lanes, depth, panel)),
        Elements::F16(data) => dispatch!(level, typed::<f16>(data, interleaved, stride, lanes, depth, panel)),
    }
}

#[inline(always)]
fn typed<T: Element, S: Simd>(
    s: S,
    data: &[T],
    interleaved: bool,
    stride: usize,
    lanes: Range<usize>,
    depth: Range<usize>,
    panel: &mut [f32],
) {
    let width = panel.len() / depth.len();
    if interleaved {
        for (k, to) in depth.zip(panel.chunks_exact_mut(width)) {
            let from = &data[k * stride + lanes.start..k * stride + lanes.end];
            let (inside, outside) = to.split_at_mut(from.len());
            widen(s, from, inside);
            outside.fill(0.0);
        }
    } else {
        transposed(s, data, stride, lanes, depth, panel);
    }
}

/// Rows of the operand become columns of the panel, sixteen by sixteen elements at a time.
#[inline(always)]
fn transposed<T: Element, S: Simd>(
    s: S,
    data: &[T],
    stride: usize,
    lanes: Range<usize>,
    depth: Range<usize>,
    panel: &mut [f32],
) {
    let width = panel.len() / depth.len();
    for group in (0..width).step_by(LANES) {
        let group_width = LANES.min(width - group);
        for (step, to) in panel.chunks_mut(LANES * width).enumerate() {
            let start = depth.start + step * LANES;
            let count = LANES.min(depth.end - start);
            let mut block = [s.splat(0.0); LANES];
            for (lane, values) in (lanes.start + group..lanes.end).zip(block.iter_mut()) {
                let from = &data[lane * stride + start..lane * stride + start + count];
                *values = match from.first_chunk() {
                    Some(from) => T::load(s, from),
                    None => {
                        let mut few = [0.0; LANES];
                        from.iter().zip(&mut few).for_each(|(from, to)| *to = from.widened());
                        s.load(&few)
                    }
                };
            }
            for (values, to) in s.transpose(block).into_iter().zip(to.chunks_exact_mut(width)) {
                let to = &mut to[group..group + group_width];
                match to.first_chunk_mut() {
                    Some(to) => s.store(values, to),
                    None => s.store_partial(values, to),
                }
            }
        }
    }
}
