//! Decoding of every weight format: one file a format, each with its block layout.
//!
//! A decoder hands out a block's values as sixteen-lane vectors in ascending order. [`dequantize`] stores them and
//! [`linear`](crate::linear()) multiplies them while they are in registers, so that both see the same values.

mod dense;
mod half_scales;
mod k_scales;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

pub(crate) use dense::{Bf16, F16, F32};
pub(crate) use q2_k::Q2K;
pub(crate) use q3_k::Q3K;
pub(crate) use q4_0::Q4_0;
pub(crate) use q4_1::Q4_1;
pub(crate) use q4_k::Q4K;
pub(crate) use q5_0::Q5_0;
pub(crate) use q5_1::Q5_1;
pub(crate) use q5_k::Q5K;
pub(crate) use q6_k::Q6K;
pub(crate) use q8_0::Q8_0;

use crate::WeightFormat;
use crate::simd::{LANES, Level, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};

/// A storage format's decoder.
pub(crate) trait Format {
    /// Bytes that are decoded at once.
    const BYTES: usize;
    /// Sixteen-lane vectors that they hold.
    const CHUNKS: usize;
    /// Numbers that scale a block's values, as [`Format::decode`] takes them; none for the dense formats.
    const SCALES: usize;

    /// The scales of a block, [`Format::SCALES`] numbers.
    fn scales<S: Simd>(s: S, block: &[u8], out: &mut [f32]);

    /// Calls `emit` with the number and the values of each vector of a block of [`Format::BYTES`], in ascending order.
    /// `scales` are the block's.
    fn decode<S: Simd>(s: S, block: &[u8], scales: &[f32], emit: impl FnMut(usize, S::F32));
}

/// The scales of some neighbouring blocks of `N` rows.
///
/// They are computed before the values: then each is in all lanes of a register by a load alone.
pub(crate) struct Scales<const N: usize>([[f32; SCALES]; N]);

/// The most scales that a row has in [`Scales`].
const SCALES: usize = 128;

impl<const N: usize> Scales<N> {
    pub(crate) fn new() -> Self {
        Self([[0.0; SCALES]; N])
    }

    /// Blocks whose scales fit; dense rows have as many as they like.
    pub(crate) const fn blocks<F: Format>() -> usize {
        match F::SCALES {
            0 => usize::MAX / F::BYTES,
            scales => SCALES / scales,
        }
    }

    /// Fills in those of the same blocks of each row, at most [`Scales::blocks`].
    #[inline(always)]
    pub(crate) fn fill<F: Format, S: Simd>(&mut self, s: S, rows: [&[u8]; N]) {
        if F::SCALES == 0 {
            return;
        }
        let count = (rows[0].len() / F::BYTES).min(Self::blocks::<F>());
        let rows = rows.map(
            #[inline(always)]
            |row| &row[..count * F::BYTES],
        );
        for index in 0..count {
            for (row, scales) in rows.iter().zip(&mut self.0) {
                let block = &row[index * F::BYTES..(index + 1) * F::BYTES];
                F::scales(s, block, &mut scales[index * F::SCALES..(index + 1) * F::SCALES]);
            }
        }
    }

    /// Those of one block of each row.
    #[inline(always)]
    pub(crate) fn of<F: Format>(&self, block: usize) -> [&[f32]; N] {
        self.0.each_ref().map(
            #[inline(always)]
            |scales| &scales[block * F::SCALES..(block + 1) * F::SCALES],
        )
    }
}

/// Evaluates an expression with a type alias for the decoder of a [`WeightFormat`].
macro_rules! with_format {
    ($format:expr, $name:ident => $value:expr) => {
        $crate::quantized::with_format!(@match $format, $name, $value,
            F32 F32, F16 F16, BF16 Bf16, Q4_0 Q4_0, Q4_1 Q4_1, Q5_0 Q5_0, Q5_1 Q5_1, Q8_0 Q8_0,
            Q2K Q2K, Q3K Q3K, Q4K Q4K, Q5K Q5K, Q6K Q6K)
    };
    (@match $format:expr, $name:ident, $value:expr, $($variant:ident $decoder:ident),+) => {
        match $format {
            $($crate::WeightFormat::$variant => {
                type $name = $crate::quantized::$decoder;
                $value
            })+
        }
    };
}
pub(crate) use with_format;

/// The `N` bytes at `offset`. Panics where `from` is shorter; the lengths are constants after inlining.
#[inline(always)]
pub(crate) fn bytes<const N: usize>(from: &[u8], offset: usize) -> &[u8; N] {
    match from[offset..].first_chunk() {
        Some(bytes) => bytes,
        None => panic!("a block of {} bytes has none at {offset}", from.len()),
    }
}

/// Expands stored weights to `f32`.
///
/// `from` holds whole blocks of `format` with as many elements as `out`.
///
/// # Panics
/// Where the lengths do not fit each other.
pub fn dequantize(format: WeightFormat, from: &[u8], out: &mut [f32]) {
    dequantize_with(level(), format, from, out);
}

fn dequantize_with(level: Level, format: WeightFormat, from: &[u8], out: &mut [f32]) {
    let elements = out.len();
    assert_eq!(
        format.row_bytes(elements),
        Some(from.len()),
        "{elements} elements in {format:?} need other bytes"
    );
    // Whole blocks of every format: 256 elements are the largest.
    const STEP: usize = 1 << 16;
    let tiles = Tiles::new(
        out,
        elements,
        Cuts::none(elements.min(1)),
        Cuts::Every {
            step: STEP,
            length: elements,
        },
    );
    parallel_for(elements.div_ceil(STEP), |task| {
        let mut tile = tiles.take(0, task);
        let out = tile.row(0);
        let offset = task * STEP / format.block_elements() * format.block_bytes();
        let length = out.len() / format.block_elements() * format.block_bytes();
        dequantize_row(level, format, &from[offset..offset + length], out);
    });
}

/// [`dequantize`] by the calling thread alone.
pub(crate) fn dequantize_row(level: Level, format: WeightFormat, from: &[u8], out: &mut [f32]) {
    with_format!(format, F => dispatch!(level, dequantize_body::<F>(from, out)));
}

#[inline(always)]
fn dequantize_body<F: Format, S: Simd>(s: S, from: &[u8], out: &mut [f32]) {
    let mut scales = Scales::<1>::new();
    let (bytes, elements) = (Scales::<1>::blocks::<F>() * F::BYTES, F::CHUNKS * LANES);
    let mut rest = out;
    for from in from.chunks(bytes) {
        scales.fill::<F, S>(s, [from]);
        let mut blocks = from.chunks_exact(F::BYTES);
        for (index, block) in (&mut blocks).enumerate() {
            let (out, behind) = std::mem::take(&mut rest).split_at_mut(elements);
            F::decode(
                s,
                block,
                scales.of::<F>(index)[0],
                #[inline(always)]
                |chunk, values| s.store_at(values, out, chunk * LANES),
            );
            rest = behind;
        }
        if F::CHUNKS == 1 && !rest.is_empty() {
            s.store_partial(dense_tail::<F, S>(s, blocks.remainder()), rest);
        }
    }
}

/// Decodes the last, incomplete vector of a row of a dense format, zeros behind its end.
#[inline(always)]
pub(crate) fn dense_tail<F: Format, S: Simd>(s: S, from: &[u8]) -> S::F32 {
    let mut block = [0; 4 * LANES];
    block[..from.len()].copy_from_slice(from);
    let mut tail = s.splat(0.0);
    F::decode(
        s,
        &block[..F::BYTES.min(4 * LANES)],
        &[],
        #[inline(always)]
        |_, values| tail = values,
    );
    tail
}

#[cfg(test)]
mod tests;
