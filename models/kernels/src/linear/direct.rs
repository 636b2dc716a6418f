//! Few rows of `x`: each row of weights is read once, decoded in registers and multiplied with all of them.

use std::borrow::Cow;

use crate::quantized::{Format, Scales, dense_tail};
use crate::simd::{LANES, Level, Simd};
use crate::threads::parallel_for_worth;
use crate::tiles::{Cuts, Tile, Tiles};
use crate::{WeightFormat, Weights};

/// Bytes of weights that are asked of memory ahead of their use, at least: what arrives while one request is answered.
const AHEAD: usize = 3 << 10;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Elements of `x` that all rows of weights of a group are multiplied with before the next: 24 KiB, half of the first-level
/// cache.
const CACHED_ELEMENTS: usize = 6 << 10;

/// Vectors of sums of a group of weight rows.
const SUMS: usize = 192;

/// Rows of `x` up to which weights are decoded in registers, again for each tile of [`tile_rows`] rows: as long as that is
/// faster than decoding them once to memory.
pub(super) fn limit(level: Level, format: WeightFormat) -> usize {
    use WeightFormat::{BF16, F16, F32, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
    match (level, format) {
        (Level::Avx512, Q4_0 | Q4_1 | Q8_0) => usize::MAX,
        (Level::Avx512, F32 | F16 | BF16 | Q4K | Q6K) => 32,
        (Level::Avx512, _) => tile_rows(level),
        (Level::Avx2, _) => 2,
        (Level::Portable | Level::Neon, _) => 1,
    }
}

/// Rows of `x` of a tile, as many as have accumulators.
pub(super) fn tile_rows(level: Level) -> usize {
    match level {
        Level::Avx512 => 8,
        Level::Avx2 => 2,
        Level::Portable | Level::Neon => 1,
    }
}

/// `x` `[m, k]` in the order in which [`rows`] reads it: tile by tile, of each the first sixteen columns of all its rows,
/// then the next sixteen, and so on, with zeros behind the last column. The last tile's rows are filled up with zeros to
/// a number that there are tiles of.
pub(super) fn pack(x: &[f32], m: usize, tile_rows: usize) -> Cow<'_, [f32]> {
    let k = x.len() / m;
    if k == 0 || m == 1 && k.is_multiple_of(LANES) {
        return Cow::Borrowed(x);
    }
    let chunks = k.div_ceil(LANES);
    let (whole, rest) = (m / tile_rows, m % tile_rows);
    let rows = whole * tile_rows + if rest > 0 { rest.next_power_of_two() } else { 0 };
    let mut packed = vec![0.0; rows * chunks * LANES];
    let tile_length = tile_rows * chunks * LANES;
    let (tiles, last) = packed.split_at_mut(whole * tile_length);
    let every = |length| Cuts::Every { step: 1, length };
    let tiles = Tiles::new(tiles, tile_length, every(whole), Cuts::none(tile_length));
    parallel_for_worth(x.len(), whole, |index| {
        let x = &x[index * tile_rows * k..(index + 1) * tile_rows * k];
        pack_tile(x, tile_rows, tiles.take(index, 0).row(0));
    });
    if rest > 0 {
        pack_tile(&x[whole * tile_rows * k..], rest, last);
    }
    Cow::Owned(packed)
}

/// One tile of [`pack`], of `m` rows.
fn pack_tile(x: &[f32], m: usize, packed: &mut [f32]) {
    let rows = m.next_power_of_two();
    let k = x.len() / m;
    for (i, x) in x.chunks_exact(k.max(1)).enumerate() {
        for (x, packed) in x.chunks(LANES).zip(packed[i * LANES..].chunks_mut(rows * LANES)) {
            packed[..x.len()].copy_from_slice(x);
        }
    }
}

/// `out = x * W^T + bias` for one tile of `x`, [packed](pack): the rows of `out` from `first` on, as many as there are up
/// to a tile's.
#[inline(always)]
pub(super) fn rows<F: Format, S: Simd>(
    s: S,
    x: &[f32],
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    out: &mut Tile<'_, f32>,
    corner: [usize; 2],
) {
    let m = out.rows() - corner[0];
    // Several rows of weights at a time give the processor independent chains of additions. The branches on constants
    // leave only the tiles that are used to be compiled.
    if S::ACCUMULATORS < 4 {
        tile::<F, S, 1, 1>(s, x, weights, bias, out, corner);
    } else if m == 1 {
        match F::CHUNKS {
            1 | 2 => tile::<F, S, 1, 4>(s, x, weights, bias, out, corner),
            _ => tile::<F, S, 1, 2>(s, x, weights, bias, out, corner),
        }
    } else if S::ACCUMULATORS < 16 {
        tile::<F, S, 2, 2>(s, x, weights, bias, out, corner);
    } else {
        match (m, F::CHUNKS) {
            (2, 1 | 2) => tile::<F, S, 2, 4>(s, x, weights, bias, out, corner),
            (2, _) => tile::<F, S, 2, 2>(s, x, weights, bias, out, corner),
            (3 | 4, 1 | 2) => tile::<F, S, 4, 4>(s, x, weights, bias, out, corner),
            (3 | 4, _) => tile::<F, S, 4, 2>(s, x, weights, bias, out, corner),
            (_, 1) => tile::<F, S, 8, 3>(s, x, weights, bias, out, corner),
            (_, 2) => tile::<F, S, 8, 2>(s, x, weights, bias, out, corner),
            _ => tile::<F, S, 8, 1>(s, x, weights, bias, out, corner),
        }
    }
}

/// `M` packed rows of `x`, of which the last may be none of `out`, with all rows of weights, `N` at a time.
#[inline(always)]
fn tile<F: Format, S: Simd, const M: usize, const N: usize>(
    s: S,
    x: &[f32],
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    out: &mut Tile<'_, f32>,
    [first, column]: [usize; 2],
) {
    let n = weights.rows;
    let row_bytes = weights.data.len() / n;
    let row = |j: usize| &weights.data[j * row_bytes..(j + 1) * row_bytes];
    // Whole groups of N rows ahead.
    let ahead = AHEAD.next_multiple_of((N * row_bytes).max(1));
    // Dense rows may end with a part of a block.
    let blocks = weights.columns.div_ceil(F::CHUNKS * LANES);
    let step = Scales::<N>::blocks::<F>().min(CACHED_ELEMENTS / M / (F::CHUNKS * LANES));
    let mut scales = Scales::<N>::new();
    let group = SUMS / M;
    for group_start in (0..n).step_by(group) {
        let group_rows = group.min(n - group_start);
        let mut sums = [s.splat(0.0); SUMS];
        for start in (0..blocks).step_by(step) {
            let part = Part {
                start,
                end: blocks.min(start + step),
                ahead,
            };
            for (j, sums) in (0..group_rows).step_by(N).zip(sums.chunks_exact_mut(M * N)) {
                // At the end the last row is repeated; the copies' sums are dropped.
                let mut rows: [&[u8]; N] = [&[]; N];
                for (l, to) in rows.iter_mut().enumerate() {
                    *to = row((group_start + j + l).min(n - 1));
                }
                let mut tile_sums = [[s.splat(0.0); M]; N];
                for l in 0..N {
                    tile_sums[l].copy_from_slice(&sums[l * M..(l + 1) * M]);
                }
                add_dots::<F, S, M, N>(s, x, rows, part, &mut scales, &mut tile_sums);
                for l in 0..N {
                    sums[l * M..(l + 1) * M].copy_from_slice(&tile_sums[l]);
                }
            }
        }
        for (index, lanes) in sums.chunks_exact(LANES).enumerate() {
            let start = index * (LANES / M);
            if start >= group_rows {
                break;
            }
            let mut vectors = [s.splat(0.0); LANES];
            vectors.copy_from_slice(lanes);
            let sums = s.reduce_add_each(vectors);
            for i in 0..M.min(out.rows() - first) {
                let row = &mut out.row(first + i)[column + group_start..column + group_start + group_rows];
                for (j, out) in row[start..].iter_mut().enumerate().take(LANES / M) {
                    *out = sums[j * M + i] + bias.map_or(0.0, |bias| bias[group_start + start + j]);
                }
            }
        }
    }
}

/// Which blocks of rows are multiplied.
#[derive(Clone, Copy)]
struct Part {
    start: usize,
    /// Where all the row's are, the last may be incomplete.
    end: usize,
    /// Distance in bytes of what is asked of memory meanwhile.
    ahead: usize,
}

/// Adds the products of a part of `M` packed rows of `x` with `N` rows of weights to `sums`, lane by lane.
#[inline(always)]
fn add_dots<F: Format, S: Simd, const M: usize, const N: usize>(
    s: S,
    x: &[f32],
    rows: [&[u8]; N],
    part: Part,
    scales: &mut Scales<N>,
    sums: &mut [[S::F32; M]; N],
) {
    let rows = rows.map(
        #[inline(always)]
        |row| &row[part.start * F::BYTES..rows[0].len().min(part.end * F::BYTES)],
    );
    let x_block = F::CHUNKS * M * LANES;
    let x = &x[part.start * x_block..part.end * x_block];
    let blocks = rows[0].len() / F::BYTES;
    scales.fill::<F, S>(s, rows);
    let mut accumulators = *sums;
    for block in 0..blocks {
        for line in (0..N * F::BYTES).step_by(LINE) {
            s.prefetch(rows[0], part.ahead + block * N * F::BYTES + line);
        }
        let x = &x[block * x_block..(block + 1) * x_block];
        let scales = scales.of::<F>(block);
        if F::CHUNKS == 1 {
            // One vector of each row of weights stays in a register while those of x pass: fewer than the other way round.
            let mut weights = [s.splat(0.0); N];
            for l in 0..N {
                let block = &rows[l][block * F::BYTES..(block + 1) * F::BYTES];
                F::decode(
                    s,
                    block,
                    scales[l],
                    #[inline(always)]
                    |_, decoded| weights[l] = decoded,
                );
            }
            #[expect(clippy::needless_range_loop, reason = "it is the second index of the accumulators")]
            for i in 0..M {
                let x = s.load_at(x, i * LANES);
                for l in 0..N {
                    accumulators[l][i] = s.mul_add(weights[l], x, accumulators[l][i]);
                }
            }
            continue;
        }
        unrolled::<N>(
            #[inline(always)]
            |l| {
                F::decode(
                    s,
                    &rows[l][block * F::BYTES..(block + 1) * F::BYTES],
                    scales[l],
                    #[inline(always)]
                    |chunk, weights| {
                        for (i, sum) in accumulators[l].iter_mut().enumerate() {
                            *sum = s.mul_add(weights, s.load_at(x, (chunk * M + i) * LANES), *sum);
                        }
                    },
                );
            },
        );
    }
    // Only the dense formats have rows that are not whole blocks.
    if F::CHUNKS == 1 && blocks * F::BYTES < rows[0].len() {
        for (row, sums) in rows.iter().zip(&mut accumulators) {
            let weights = dense_tail::<F, S>(s, &row[blocks * F::BYTES..]);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = s.mul_add(weights, s.load_at(x, (blocks * M + i) * LANES), *sum);
            }
        }
    }
    *sums = accumulators;
}

/// Calls `body` with the numbers below `N`, at most 4. Not a loop, which the compiler might keep: then `body` would find
/// its accumulators in memory.
#[inline(always)]
fn unrolled<const N: usize>(mut body: impl FnMut(usize)) {
    const { assert!(N <= 4) };
    body(0);
    if N > 1 {
        body(1);
    }
    if N > 2 {
        body(2);
    }
    if N > 3 {
        body(3);
    }
}
