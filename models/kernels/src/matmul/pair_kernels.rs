//! The kernels of [`super::pairs`].
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::blocks::Kernel;
use super::matrix::MatrixRef;
use super::pack;
use super::tile::{self, TileShape};
use crate::simd::{Avx512, LANES, Level};
use crate::tiles::Tile;

/// Rows and vectors of columns of a tile.
const ROWS: usize = 8;
const VECTORS: usize = 3;
/// Elements of a lane that share a scale. So many products of two integers of 12 bits and sign fit into 32 bits.
const GROUP: usize = 128;
/// The largest integer.
const LARGEST: f32 = 4095.0;

/// Whether AMD made the processor.
pub(super) fn is_amd() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx]
        .map(u32::to_le_bytes)
        .as_flattened()
        == b"AuthenticAMD"
}

/// Products of scaled integers. A value is the evidence that the machine has AVX-512 with VNNI.
#[derive(Clone, Copy)]
pub(super) struct Integers(());

/// Products of bf16. A value is the evidence that the machine has AVX-512 with BF16.
#[derive(Clone, Copy)]
pub(super) struct Bf16Dots(());

impl Integers {
    pub(super) fn new() -> Option<Self> {
        (Level::Avx512.is_available() && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }
}

impl Bf16Dots {
    pub(super) fn new() -> Option<Self> {
        (Level::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }
}

const SHAPE: TileShape = TileShape {
    rows: ROWS,
    columns: VECTORS * LANES,
};

thread_local! {
    /// One group of a panel as f32.
    static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `body` with the lanes' elements of the part `depth` as f32 `[depth rounded up to even, width]`.
fn with_wide(operand: MatrixRef<'_>, first: usize, depth: Range<usize>, width: usize, body: impl FnOnce(&[f32])) {
    WIDE.with_borrow_mut(|wide| {
        wide.clear();
        wide.resize(width * depth.len().next_multiple_of(2), 0.0);
        pack::panel(
            Level::Avx512,
            operand,
            first,
            depth.clone(),
            &mut wide[..width * depth.len()],
        );
        body(wide);
    });
}

impl Kernel for Integers {
    const DEPTH: usize = 4 * GROUP;

    fn shape(self) -> TileShape {
        SHAPE
    }

    /// For each group its pairs of integers `[pairs, width]`, then its scales `[width]`.
    fn panel_words(self, width: usize, depth: usize) -> usize {
        (depth.div_ceil(2) + depth.div_ceil(GROUP)) * width
    }

    fn pack(self, operand: MatrixRef<'_>, first: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        for (start, panel) in depth
            .clone()
            .step_by(GROUP)
            .zip(panel.chunks_mut((GROUP / 2 + 1) * width))
        {
            let group = start..depth.end.min(start + GROUP);
            let (pairs, scales) = panel.split_at_mut(panel.len() - width);
            with_wide(operand, first, group, width, |wide| {
                // SAFETY: the value is the evidence of the features.
                unsafe { to_integers(wide, bytemuck::cast_slice_mut(pairs), scales) }
            });
        }
    }

    fn multiply(self, [a, b]: [&[f32]; 2], depth: usize, add: bool, out: &mut Tile<'_, f32>) {
        let words = [ROWS, SHAPE.columns].map(|width| self.panel_words(width, depth));
        Avx512::run(
            #[inline(always)]
            |s| {
                for (i, a) in a.chunks_exact(words[0]).enumerate() {
                    for (j, b) in b.chunks_exact(words[1]).enumerate() {
                        // SAFETY: the value is the evidence of the features.
                        let sums = unsafe { integer_tile(a, b) };
                        tile::store::<_, ROWS, VECTORS>(s, sums, [i * ROWS, j * SHAPE.columns], add, out);
                    }
                }
            },
        );
    }
}

impl Kernel for Bf16Dots {
    const DEPTH: usize = 512;

    fn shape(self) -> TileShape {
        SHAPE
    }

    fn panel_words(self, width: usize, depth: usize) -> usize {
        depth.div_ceil(2) * width
    }

    fn pack(self, operand: MatrixRef<'_>, first: usize, depth: Range<usize>, width: usize, panel: &mut [f32]) {
        with_wide(operand, first, depth, width, |wide| {
            let pairs: &mut [u32] = bytemuck::cast_slice_mut(panel);
            for (wide, pairs) in wide.chunks_exact(2 * width).zip(pairs.chunks_exact_mut(width)) {
                let (low, high) = wide.split_at(width);
                for ((low, high), pair) in low.iter().zip(high).zip(pairs) {
                    *pair = low.to_bits() >> 16 | high.to_bits() & 0xFFFF_0000;
                }
            }
        });
    }

    fn multiply(self, [a, b]: [&[f32]; 2], depth: usize, add: bool, out: &mut Tile<'_, f32>) {
        let words = [ROWS, SHAPE.columns].map(|width| self.panel_words(width, depth));
        Avx512::run(
            #[inline(always)]
            |s| {
                for (i, a) in a.chunks_exact(words[0]).enumerate() {
                    for (j, b) in b.chunks_exact(words[1]).enumerate() {
                        // SAFETY: the value is the evidence of the features.
                        let sums = unsafe { bf16_tile(a, b) };
                        tile::store::<_, ROWS, VECTORS>(s, sums, [i * ROWS, j * SHAPE.columns], add, out);
                    }
                }
            },
        );
    }
}

/// Integers `round(x / scale)` of the elements `[depth, lanes]`, paired along the depth, and the scale of each lane: a power of two.
/// A lane with an element that is not finite has NaN as its scale.
#[target_feature(enable = "avx2,avx512f,avx512vl,avx512bw,avx512dq")]
fn to_integers(wide: &[f32], pairs: &mut [i32], scales: &mut [f32]) {
    const EIGHT: usize = 8;
    let width = scales.len();
    let at = |values: &[f32], offset: usize| {
        let values = &values[offset..offset + EIGHT];
        // SAFETY: the slice has eight elements.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    };
    for lane in (0..width).step_by(EIGHT) {
        let (mut largest, mut bad) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        for row in wide.chunks_exact(width) {
            let x = at(row, lane);
            largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0), x));
            bad = _mm256_fmadd_ps(x, _mm256_setzero_ps(), bad);
        }
        // Biased exponents. Of the largest element, but so large that the scale is a normal number; with 2^exponent as
        // that element's power of two, it becomes an integer from 2^11 up to 2^12.
        let exponent = _mm256_srli_epi32::<23>(_mm256_castps_si256(largest));
        let exponent = _mm256_max_epi32(exponent, _mm256_set1_epi32(12));
        let scale = _mm256_slli_epi32::<23>(_mm256_sub_epi32(exponent, _mm256_set1_epi32(11)));
        let factor = _mm256_slli_epi32::<23>(_mm256_sub_epi32(_mm256_set1_epi32(265), exponent));
        let (scale, factor) = (_mm256_castsi256_ps(scale), _mm256_castsi256_ps(factor));
        let integers = |x: __m256| {
            let x = _mm256_mul_ps(x, factor);
            let x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(LARGEST)), _mm256_set1_ps(-LARGEST));
            _mm256_cvtps_epi32(x)
        };
        for (rows, to) in wide.chunks_exact(2 * width).zip(pairs.chunks_exact_mut(width)) {
            let (low, high) = (integers(at(rows, lane)), integers(at(rows, width + lane)));
            let pair = _mm256_blend_epi16::<0xAA>(low, _mm256_slli_epi32::<16>(high));
            let to = &mut to[lane..lane + EIGHT];
            // SAFETY: the slice has eight elements.
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), pair) };
        }
        let to = &mut scales[lane..lane + EIGHT];
        // SAFETY: the slice has eight elements.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_add_ps(scale, bad)) };
    }
}

type Sums = [[__m512; VECTORS]; ROWS];

/// The vector of `LANES` words from `offset` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn words(from: &[f32], offset: usize) -> __m512 {
    let from = &from[offset..offset + LANES];
    // SAFETY: the slice has as many elements as the vector.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// A tile's sums from one panel of each operand.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn integer_tile(a: &[f32], b: &[f32]) -> Sums {
    const COLUMNS: usize = SHAPE.columns;
    let mut total = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (a, b) in a
        .chunks((GROUP / 2 + 1) * ROWS)
        .zip(b.chunks((GROUP / 2 + 1) * COLUMNS))
    {
        let (a, a_scales) = a.split_at(a.len() - ROWS);
        let (b, b_scales) = b.split_at(b.len() - COLUMNS);
        let mut sums = [[_mm512_setzero_si512(); VECTORS]; ROWS];
        for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(COLUMNS)) {
            let mut columns = [_mm512_setzero_si512(); VECTORS];
            for (c, column) in columns.iter_mut().enumerate() {
                *column = _mm512_castps_si512(words(b, c * LANES));
            }
            for (a, sums) in a.iter().zip(&mut sums) {
                let pair = _mm512_set1_epi32(a.to_bits() as i32);
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpwssd_epi32(*sum, pair, column);
                }
            }
        }
        for ((total, sums), a_scale) in total.iter_mut().zip(sums).zip(a_scales) {
            for (c, (total, sum)) in total.iter_mut().zip(sums).enumerate() {
                let scale = _mm512_mul_ps(_mm512_set1_ps(*a_scale), words(b_scales, c * LANES));
                *total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *total);
            }
        }
    }
    total
}

/// A tile's sums from one panel of each operand.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn bf16_tile(a: &[f32], b: &[f32]) -> Sums {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for (a, b) in a.chunks_exact(ROWS).zip(b.chunks_exact(SHAPE.columns)) {
        let mut columns = [_mm512_setzero_ps(); VECTORS];
        for (c, column) in columns.iter_mut().enumerate() {
            *column = words(b, c * LANES);
        }
        for (a, sums) in a.iter().zip(&mut sums) {
            let pair = _mm512_set1_ps(*a);
            for (sum, column) in sums.iter_mut().zip(columns) {
                // SAFETY: both types are the same 512 bits.
                let [pair, column] = unsafe { std::mem::transmute::<[__m512; 2], [__m512bh; 2]>([pair, column]) };
                *sum = _mm512_dpbf16_ps(*sum, pair, column);
            }
        }
    }
    sums
}
