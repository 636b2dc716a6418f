//! Rows of heads as the products of [`super::product`] read them: in panels of sixteen lanes.

use std::ops::Range;

use super::mask::Runs;
use super::tile::KEYS;
use crate::simd::{LANES, Simd};

/// Sixteen neighbouring elements.
pub(super) type Lanes = [f32; LANES];

/// Panels of [`KEYS`] keys.
pub(super) const CHUNKS: usize = KEYS / LANES;

/// Words of the columns of `rows` rows: see [`pack_columns`].
pub(super) fn column_words(rows: usize, head_dim: usize) -> usize {
    rows * head_dim.next_multiple_of(LANES)
}

/// Words of `rows` turned rows: see [`pack_turned`].
pub(super) fn turned_words(rows: usize, head_dim: usize) -> usize {
    rows.next_multiple_of(LANES) * head_dim
}

/// Packs rows into panels of sixteen of their columns, `[columns / 16, rows, 16]`, for sums over the rows. Columns beyond
/// the last are zero.
#[inline(always)]
pub(super) fn pack_columns<'a, S: Simd>(
    s: S,
    count: usize,
    row: impl Fn(usize) -> &'a [f32],
    scale: f32,
    to: &mut [f32],
) {
    let (to, _) = to.as_chunks_mut::<LANES>();
    let scale = s.splat(scale);
    for index in 0..count {
        let (whole, rest) = row(index).as_chunks::<LANES>();
        for (vector, from) in whole.iter().enumerate() {
            s.store(s.mul(s.load(from), scale), &mut to[vector * count + index]);
        }
        if !rest.is_empty() {
            s.store(s.mul(s.load_partial(rest), scale), &mut to[whole.len() * count + index]);
        }
    }
}

/// Packs rows of `head_dim` elements into panels of sixteen rows, `[rows / 16, head_dim, 16]`, for sums over the elements.
/// Rows beyond the last are zero.
#[inline(always)]
pub(super) fn pack_turned<'a, S: Simd>(
    s: S,
    count: usize,
    row: impl Fn(usize) -> &'a [f32],
    head_dim: usize,
    to: &mut [f32],
) {
    for (first, panel) in (0..count).step_by(LANES).zip(to.chunks_exact_mut(head_dim * LANES)) {
        let (panel, _) = panel.as_chunks_mut::<LANES>();
        for (step, to) in panel.chunks_mut(LANES).enumerate() {
            let start = step * LANES;
            let mut block = [s.splat(0.0); LANES];
            for (index, values) in (first..count).zip(block.iter_mut()) {
                let from = &row(index)[start..start + to.len()];
                *values = match from.first_chunk() {
                    Some(from) => s.load(from),
                    None => s.load_partial(from),
                };
            }
            for (values, to) in s.transpose(block).into_iter().zip(to) {
                s.store(values, to);
            }
        }
    }
}

/// The turned rows of the keys of a block, sixteen by sixteen: those of `turned` where a panel holds just them, others are
/// turned anew into `scratch`.
#[inline(always)]
pub(super) fn turned_keys<'a, S: Simd>(
    s: S,
    turned: &'a [f32],
    keys: Runs<'_>,
    row: impl Fn(usize) -> &'a [f32],
    head_dim: usize,
    scratch: &'a mut [f32],
) -> [&'a [Lanes]; CHUNKS] {
    let words = head_dim * LANES;
    let mut positions = [0; KEYS];
    let mut count = 0;
    for (first, run) in keys {
        for (position, value) in positions[count..count + run].iter_mut().zip(first..) {
            *position = value;
        }
        count += run;
    }
    let whole = |positions: &[usize]| {
        let first = positions[0];
        let follow = positions[positions.len() - 1] - first + 1 == positions.len();
        (first.is_multiple_of(LANES) && follow).then_some(first / LANES)
    };
    for (positions, to) in positions[..count].chunks(LANES).zip(scratch.chunks_exact_mut(words)) {
        if whole(positions).is_none() {
            pack_turned(s, positions.len(), |index| row(positions[index]), head_dim, to);
        }
    }
    let scratch = &*scratch;
    let mut panels: [&[Lanes]; CHUNKS] = [&[]; CHUNKS];
    for (index, (positions, panel)) in positions[..count].chunks(LANES).zip(&mut panels).enumerate() {
        let words = match whole(positions) {
            Some(chunk) => &turned[chunk * words..(chunk + 1) * words],
            None => &scratch[index * words..(index + 1) * words],
        };
        *panel = words.as_chunks().0;
    }
    panels
}

/// The panel `vector` of the columns of `count` rows, see [`pack_columns`], for some of the rows.
#[inline(always)]
pub(super) fn columns(packed: &[f32], count: usize, vector: usize, rows: Range<usize>) -> &[Lanes] {
    let (lanes, _) = packed.as_chunks();
    &lanes[vector * count..][rows]
}
