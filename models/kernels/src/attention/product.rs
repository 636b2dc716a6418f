//! The products of attention's tiles, out of panels (see [`super::panels`]), with the sums in registers.

use std::ops::Range;

use super::panels::Lanes;
use super::tile::{KEYS, TileScores};
use crate::simd::{LANES, Simd};

/// What is needed for some rows of a product: the others' factors are zero, or nobody reads the result.
pub(super) struct Extent {
    /// Terms of the sums.
    pub(super) depth: Range<usize>,
    /// Vectors of columns.
    pub(super) vectors: Range<usize>,
}

/// The left operand of a product.
pub(super) trait Factors: Copy {
    /// The factors of `M` rows from `row` on, as a function of the term's place in `depth`.
    fn rows<const M: usize>(self, row: usize, depth: Range<usize>) -> impl Fn(usize) -> [f32; M];
}

/// Factors that lie row after row.
#[derive(Clone, Copy)]
pub(super) struct RowFactors<'a> {
    pub(super) data: &'a [f32],
    /// Elements of a row.
    pub(super) stride: usize,
    /// The element of each row that is the factor of the first term.
    pub(super) first: usize,
}

impl<'a> RowFactors<'a> {
    /// All elements of rows of that length.
    #[inline(always)]
    pub(super) fn of_heads(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, first: 0 }
    }

    /// The rows of a tile of scores, from the key `first` on.
    #[inline(always)]
    pub(super) fn of_scores(scores: &'a [[f32; KEYS]], first: usize) -> Self {
        Self {
            data: scores.as_flattened(),
            stride: KEYS,
            first,
        }
    }
}

/// Factors whose rows are the columns of a tile of scores, from `first` on; the terms are its rows.
#[derive(Clone, Copy)]
pub(super) struct ColumnFactors<'a> {
    pub(super) scores: &'a TileScores,
    pub(super) first: usize,
}

impl Factors for RowFactors<'_> {
    #[inline(always)]
    fn rows<const M: usize>(self, row: usize, depth: Range<usize>) -> impl Fn(usize) -> [f32; M] {
        let mut rows: [&[f32]; M] = [&[]; M];
        for (index, to) in rows.iter_mut().enumerate() {
            let start = (row + index) * self.stride + self.first + depth.start;
            *to = &self.data[start..][..depth.len()];
        }
        move |place| {
            let mut factors = [0.0; M];
            for (factor, row) in factors.iter_mut().zip(rows) {
                *factor = row[place];
            }
            factors
        }
    }
}

impl Factors for ColumnFactors<'_> {
    #[inline(always)]
    fn rows<const M: usize>(self, row: usize, depth: Range<usize>) -> impl Fn(usize) -> [f32; M] {
        let column = self.first + row;
        // Checked here once, not for every term.
        assert!(column + M <= KEYS);
        let scores = &self.scores[depth];
        move |place| {
            let mut factors = [0.0; M];
            factors.copy_from_slice(&scores[place][column..column + M]);
            factors
        }
    }
}

/// `out[row][column] (+)= sum over k of factors(row, k) * panel(column / 16)[k][column % 16]`, in ascending order of `k`.
/// `out` has rows of `stride` elements. `extent` tells what of some neighbouring rows is needed.
#[inline(always)]
pub(super) fn products<'a, S: Simd>(
    s: S,
    add: bool,
    factors: impl Factors,
    panel: impl Fn(usize) -> &'a [Lanes],
    [rows, stride]: [usize; 2],
    extent: impl Fn(Range<usize>) -> Extent,
    out: &mut [f32],
) {
    s.apart(
        #[inline(always)]
        |s| {
            let mut row = 0;
            while row < rows {
                let out = &mut out[row * stride..];
                let taken = match rows - row {
                    6.. => 6,
                    4.. => 4,
                    _ => 1,
                };
                let extent = extent(row..row + taken);
                match taken {
                    6 => vectors::<S, _, 6>(s, add, factors, row, &panel, extent, stride, out),
                    4 => vectors::<S, _, 4>(s, add, factors, row, &panel, extent, stride, out),
                    _ => vectors::<S, _, 1>(s, add, factors, row, &panel, extent, stride, out),
                }
                row += taken;
            }
        },
    );
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn vectors<'a, S: Simd, F: Factors, const M: usize>(
    s: S,
    add: bool,
    factors: F,
    row: usize,
    panel: &impl Fn(usize) -> &'a [Lanes],
    extent: Extent,
    stride: usize,
    out: &mut [f32],
) {
    let Range { start, end } = extent.vectors;
    let depth = extent.depth;
    let factors = factors.rows::<M>(row, depth.clone());
    let mut vector = start;
    if S::ACCUMULATORS >= 16 {
        while vector + 4 <= end {
            let panels = [panel(vector), panel(vector + 1), panel(vector + 2), panel(vector + 3)];
            tile::<S, M, 4>(s, add, &factors, panels, depth.clone(), [stride, vector], out);
            vector += 4;
        }
        while vector + 2 <= end {
            let panels = [panel(vector), panel(vector + 1)];
            tile::<S, M, 2>(s, add, &factors, panels, depth.clone(), [stride, vector], out);
            vector += 2;
        }
    }
    while vector < end {
        tile::<S, M, 1>(s, add, &factors, [panel(vector)], depth.clone(), [stride, vector], out);
        vector += 1;
    }
}

#[inline(always)]
fn tile<S: Simd, const M: usize, const N: usize>(
    s: S,
    add: bool,
    factors: &impl Fn(usize) -> [f32; M],
    panels: [&[Lanes]; N],
    depth: Range<usize>,
    [stride, vector]: [usize; 2],
    out: &mut [f32],
) {
    let length = depth.len();
    let mut terms: [&[Lanes]; N] = [&[]; N];
    for (terms, panel) in terms.iter_mut().zip(panels) {
        *terms = &panel[depth.start..][..length];
    }
    let mut sums = [[s.splat(0.0); N]; M];
    if add {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = s.load_at(out, i * stride + (vector + n) * LANES);
            }
        }
    }
    for place in 0..length {
        let mut columns = [s.splat(0.0); N];
        for (column, terms) in columns.iter_mut().zip(terms) {
            *column = s.load(&terms[place]);
        }
        for (factor, sums) in factors(place).into_iter().zip(&mut sums) {
            let factor = s.splat(factor);
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = s.mul_add(factor, column, *sum);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (n, sum) in sums.into_iter().enumerate() {
            s.store_at(sum, out, i * stride + (vector + n) * LANES);
        }
    }
}
