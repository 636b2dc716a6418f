//! Rotary position embedding (Su et al., "RoFormer", 2021).

use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// Which elements of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryLayout {
    /// Element `i` with element `i + rotary_dim / 2` (transformers' Llama).
    HalfSplit,
    /// Element `2 i` with element `2 i + 1` (GPT-J, the original Llama).
    Interleaved,
}

/// Cosines and sines of all positions.
#[derive(Clone, Copy, Debug)]
pub struct RotaryTable<'a> {
    /// Cosines `[positions, rotary_dim / 2]`.
    pub cos: &'a [f32],
    /// Sines `[positions, rotary_dim / 2]`.
    pub sin: &'a [f32],
    /// Elements of a head that are rotated, the first ones; even.
    pub rotary_dim: usize,
}

/// Rotates the heads of each token in place by the angles of its position; `inverse` rotates back, which is also the
/// gradient.
///
/// `x` is `[tokens, heads * head_dim]` with any number of heads, `positions` `[tokens]`.
///
/// # Panics
/// Where the lengths do not fit each other or a position lies outside the table.
pub fn rotary(
    x: &mut [f32],
    head_dim: usize,
    positions: &[u32],
    table: RotaryTable<'_>,
    layout: RotaryLayout,
    inverse: bool,
) {
    rotary_with(level(), x, head_dim, positions, table, layout, inverse);
}

fn rotary_with(
    level: Level,
    x: &mut [f32],
    head_dim: usize,
    positions: &[u32],
    table: RotaryTable<'_>,
    layout: RotaryLayout,
    inverse: bool,
) {
    let half = table.rotary_dim / 2;
    assert!(
        table.rotary_dim.is_multiple_of(2) && table.rotary_dim <= head_dim,
        "{} of {head_dim}",
        table.rotary_dim
    );
    assert_eq!(table.cos.len(), table.sin.len(), "cosines and sines");
    if x.is_empty() || half == 0 {
        return;
    }
    let width = x.len() / positions.len().max(1);
    assert_eq!(x.len(), width * positions.len(), "{} positions", positions.len());
    assert!(
        width.is_multiple_of(head_dim),
        "rows of {width} are not heads of {head_dim}"
    );
    let limit = table.cos.len() / half;
    if let Some(position) = positions.iter().find(|&&position| position as usize >= limit) {
        panic!("position {position} outside a table of {limit}");
    }
    // About as many elements a task as elsewhere.
    let step = (crate::elementwise::STEP / width).max(1);
    let tiles = Tiles::new(
        x,
        width,
        Cuts::Every {
            step,
            length: positions.len(),
        },
        Cuts::none(width),
    );
    parallel_for(positions.len().div_ceil(step), |task| {
        let mut tile = tiles.take(task, 0);
        for (row, &position) in (0..tile.rows()).zip(&positions[task * step..]) {
            let angles = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&table.cos[angles.clone()], &table.sin[angles]);
            for head in tile.row(row).chunks_exact_mut(head_dim) {
                match layout {
                    RotaryLayout::HalfSplit => dispatch!(level, half_split(head, cos, sin, inverse)),
                    RotaryLayout::Interleaved => interleaved(head, cos, sin, inverse),
                }
            }
        }
    });
}

#[inline(always)]
fn half_split<S: Simd>(s: S, head: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
    let half = cos.len();
    let (first, second) = head[..2 * half].split_at_mut(half);
    let sign = s.splat(if inverse { -1.0 } else { 1.0 });
    let angles = cos.chunks(LANES).zip(sin.chunks(LANES));
    for ((first, second), (cos, sin)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).zip(angles) {
        let (a, b) = (s.load_partial(first), s.load_partial(second));
        let (cos, sin) = (s.load_partial(cos), s.mul(s.load_partial(sin), sign));
        s.store_partial(s.sub(s.mul(a, cos), s.mul(b, sin)), first);
        s.store_partial(s.mul_add(b, cos, s.mul(a, sin)), second);
    }
}

fn interleaved(head: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
    let sign = if inverse { -1.0 } else { 1.0 };
    let (pairs, _) = head.as_chunks_mut::<2>();
    for (([a, b], cos), sin) in pairs.iter_mut().zip(cos).zip(sin) {
        let sin = sign * sin;
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::available;
    use crate::test_util::{assert_close, random};

    /// Table of `positions` positions with base 10000.
    fn table(positions: usize, rotary_dim: usize) -> (Vec<f32>, Vec<f32>) {
        let half = rotary_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
        (0..positions * half).map(|i| (angle(i).cos(), angle(i).sin())).unzip()
    }

    #[test]
    fn pairs_are_rotated_by_their_positions_angle() {
        for (head_dim, rotary_dim) in [(2, 2), (16, 14), (64, 64), (66, 66), (80, 32)] {
            let (cos, sin) = table(12, rotary_dim);
            let positions = [0, 3, 11, 5, 5];
            let x = random(positions.len() * 3 * head_dim, 1);
            let half = rotary_dim / 2;
            for layout in [RotaryLayout::HalfSplit, RotaryLayout::Interleaved] {
                let mut want = x.clone();
                for (row, head) in want.chunks_exact_mut(head_dim).enumerate() {
                    let position = positions[row / 3] as usize;
                    for i in 0..half {
                        let (a, b) = match layout {
                            RotaryLayout::HalfSplit => (i, i + half),
                            RotaryLayout::Interleaved => (2 * i, 2 * i + 1),
                        };
                        let (c, s) = (cos[position * half + i], sin[position * half + i]);
                        (head[a], head[b]) = (head[a] * c - head[b] * s, head[b] * c + head[a] * s);
                    }
                }
                let table = RotaryTable {
                    cos: &cos,
                    sin: &sin,
                    rotary_dim,
                };
                for level in available() {
                    let mut got = x.clone();
                    rotary_with(level, &mut got, head_dim, &positions, table, layout, false);
                    assert_close(&got, &want, 1e-6);
                    rotary_with(level, &mut got, head_dim, &positions, table, layout, true);
                    assert_close(&got, &x, 1e-6);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "position 12 outside a table of 12")]
    fn a_position_outside_the_table_is_named() {
        let (cos, sin) = table(12, 4);
        let table = RotaryTable {
            cos: &cos,
            sin: &sin,
            rotary_dim: 4,
        };
        rotary(&mut [0.0; 4], 4, &[12], table, RotaryLayout::HalfSplit, false);
    }
}
