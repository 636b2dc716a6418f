//! Pages of cached keys and values: how they are laid out, and the way in and out.
//!
//! A page holds a fixed number of positions of one layer as *strips*: the keys of each key-value head, then the values of
//! each. A strip is `[positions, head_dim]` in one of three types. What a position is rounded to depends on that position
//! alone, and attention reads everything from pages, the newest positions too: so its result does not depend on how a
//! sequence was cut into passes.

use half::f16;

use crate::convert::{narrow, widen};
use crate::simd::{LANES, Simd, dispatch, level};

use super::AttentionHeads;
use super::mask::Runs;
use super::tile::KEYS;

/// Elements of a row that share a scale in 8-bit pages; the last block of a row may be shorter.
const SCALE_BLOCK: usize = 32;

/// How pages hold their elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheType {
    /// As they were computed.
    F32,
    /// Rounded to half precision; beyond its range the largest finite value.
    F16,
    /// Eight bits, with an f32 scale for every 32 elements of a head.
    Q8,
}

impl CacheType {
    /// Its name: `f32`, `f16`, `q8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8 => "q8",
        }
    }
}

/// The layout of one layer's part of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Type of the elements.
    pub kind: CacheType,
    /// Positions of a page.
    pub positions: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl PageLayout {
    /// Length of one layer's part of a page, in units of four bytes.
    pub fn words(&self) -> usize {
        2 * self.key_value_heads * self.strip_words()
    }

    fn strip_words(&self) -> usize {
        let elements = self.positions * self.head_dim;
        match self.kind {
            CacheType::F32 => elements,
            CacheType::F16 => elements.div_ceil(2),
            CacheType::Q8 => self.scales() + elements.div_ceil(4),
        }
    }

    /// Scales of a strip, which precede its bytes.
    fn scales(&self) -> usize {
        self.positions * self.row_scales()
    }

    fn row_scales(&self) -> usize {
        self.head_dim.div_ceil(SCALE_BLOCK)
    }

    /// Writes the keys and values of neighbouring positions, each `[positions, key_value_heads * head_dim]`, into one
    /// layer's part of a page, from its position `first` on.
    ///
    /// # Panics
    /// Where they do not fit.
    pub fn store(&self, page: &mut [f32], first: usize, keys: &[f32], values: &[f32]) {
        let width = self.key_value_heads * self.head_dim;
        assert_eq!(page.len(), self.words(), "one layer's part of a page");
        assert!(
            keys.len() == values.len() && first * width + keys.len() <= self.positions * width,
            "{} keys and {} values do not fit a page from position {first} on",
            keys.len(),
            values.len()
        );
        let strips = page.chunks_exact_mut(self.strip_words());
        for (index, strip) in strips.enumerate() {
            let rows = if index < self.key_value_heads { keys } else { values };
            let column = index % self.key_value_heads * self.head_dim;
            for (offset, row) in rows.chunks_exact(width).enumerate() {
                let row = &row[column..column + self.head_dim];
                dispatch!(level(), store_row(self, strip, first + offset, row));
            }
        }
    }

    /// Reads keys and values back, each `[positions, key_value_heads * head_dim]`, from one layer's part of a page.
    ///
    /// # Panics
    /// Where they are more than a page has.
    pub fn load(&self, page: &[f32], keys: &mut [f32], values: &mut [f32]) {
        let width = self.key_value_heads * self.head_dim;
        for (index, strip) in page.chunks_exact(self.strip_words()).enumerate() {
            let rows = if index < self.key_value_heads {
                &mut *keys
            } else {
                &mut *values
            };
            let column = index % self.key_value_heads * self.head_dim;
            for (position, row) in rows.chunks_exact_mut(width).enumerate() {
                let row = &mut row[column..column + self.head_dim];
                dispatch!(level(), load_row(self, strip, position, row));
            }
        }
    }

    /// The bytes and the scales of a position's row in an 8-bit strip.
    #[inline(always)]
    fn quantized<'a>(&self, strip: &'a [f32], position: usize) -> (&'a [u8], &'a [f32]) {
        let (scales, bytes) = strip.split_at(self.scales());
        let bytes: &[u8] = bytemuck::cast_slice(bytes);
        let row = position * self.head_dim;
        let scales = &scales[position * self.row_scales()..][..self.row_scales()];
        (&bytes[row..row + self.head_dim], scales)
    }
}

#[inline(always)]
fn store_row<S: Simd>(s: S, layout: &PageLayout, strip: &mut [f32], position: usize, row: &[f32]) {
    let start = position * layout.head_dim;
    let range = start..start + layout.head_dim;
    match layout.kind {
        CacheType::F32 => strip[range].copy_from_slice(row),
        CacheType::F16 => {
            let halves: &mut [f16] = bytemuck::cast_slice_mut(strip);
            let halves = &mut halves[range];
            narrow(s, row, halves);
            for half in halves.iter_mut().filter(|half| half.is_infinite()) {
                *half = if half.is_sign_negative() { f16::MIN } else { f16::MAX };
            }
        }
        CacheType::Q8 => {
            let (scales, bytes) = strip.split_at_mut(layout.scales());
            let bytes: &mut [i8] = bytemuck::cast_slice_mut(bytes);
            let scales = &mut scales[position * layout.row_scales()..][..layout.row_scales()];
            let blocks = bytes[range].chunks_mut(SCALE_BLOCK).zip(row.chunks(SCALE_BLOCK));
            for (scale, (bytes, block)) in scales.iter_mut().zip(blocks) {
                *scale = quantize(block, bytes);
            }
        }
    }
}

/// Rounds a block to multiples of its largest magnitude's 127th part, which is returned.
#[inline(always)]
fn quantize(block: &[f32], bytes: &mut [i8]) -> f32 {
    let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    // An infinite element would make the others NaN, and the largest number round to infinity on the way back.
    let scale = largest.min(f32::MAX / 2.0) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (byte, value) in bytes.iter_mut().zip(block) {
        // The conversion saturates, so that it cannot leave the range; NaN becomes 0.
        *byte = (value * inverse).round_ties_even() as i8;
    }
    scale
}

#[inline(always)]
fn load_row<S: Simd>(s: S, layout: &PageLayout, strip: &[f32], position: usize, row: &mut [f32]) {
    let start = position * layout.head_dim;
    let range = start..start + layout.head_dim;
    match layout.kind {
        CacheType::F32 => row.copy_from_slice(&strip[range]),
        CacheType::F16 => widen::<f16, S>(s, &bytemuck::cast_slice(strip)[range], row),
        CacheType::Q8 => {
            let (bytes, scales) = layout.quantized(strip, position);
            let blocks = row.chunks_mut(SCALE_BLOCK).zip(bytes.chunks(SCALE_BLOCK));
            for (scale, (row, bytes)) in scales.iter().zip(blocks) {
                dequantize(s, *scale, bytes, row);
            }
        }
    }
}

#[inline(always)]
fn dequantize<S: Simd>(s: S, scale: f32, bytes: &[u8], row: &mut [f32]) {
    let ((lanes, rest), (bytes, bytes_rest)) = (row.as_chunks_mut::<LANES>(), bytes.as_chunks::<LANES>());
    for (lanes, bytes) in lanes.iter_mut().zip(bytes) {
        s.store(s.mul(s.load_i8(bytes), s.splat(scale)), lanes);
    }
    for (value, byte) in rest.iter_mut().zip(bytes_rest) {
        *value = f32::from(byte.cast_signed()) * scale;
    }
}

/// One key-value head's past in pages.
#[derive(Clone, Copy)]
pub(super) struct PagedPast<'a> {
    layout: &'a PageLayout,
    /// One layer's part of each page.
    pages: &'a [&'a [f32]],
    head: usize,
}

impl<'a> PagedPast<'a> {
    pub(super) fn new(heads: &AttentionHeads<'_>, layout: &'a PageLayout, pages: &'a [&'a [f32]], head: usize) -> Self {
        assert!(
            layout.key_value_heads == heads.key_value_heads && layout.head_dim == heads.head_dim,
            "pages of {layout:?} are not those of {heads:?}"
        );
        Self { layout, pages, head }
    }

    /// The strip of keys or values of a page.
    #[inline(always)]
    fn strip(&self, page: usize, which: usize) -> &'a [f32] {
        let words = self.layout.strip_words();
        let index = which * self.layout.key_value_heads + self.head;
        &self.pages[page][index * words..(index + 1) * words]
    }

    /// Elements that [`rows`](Self::rows) needs to put a block into.
    #[inline(always)]
    pub(super) fn scratch(&self, positions: usize) -> usize {
        match self.layout.kind {
            CacheType::F32 => 0,
            CacheType::F16 | CacheType::Q8 => positions.min(KEYS) * self.layout.head_dim,
        }
    }

    /// The keys (`which` 0) or values (1) of some positions, at most [`KEYS`]; the other rows are empty.
    #[inline(always)]
    pub(super) fn rows<'b, S: Simd>(
        &'b self,
        s: S,
        which: usize,
        keys: Runs<'_>,
        scratch: &'b mut [f32],
    ) -> [&'b [f32]; KEYS] {
        let (positions, width) = (self.layout.positions, self.layout.head_dim);
        let mut rows: [&[f32]; KEYS] = [&[]; KEYS];
        let mut scratch = scratch.chunks_exact_mut(width);
        let mut done = 0;
        for (mut start, count) in keys {
            let end = start + count;
            while start < end {
                let (page, first) = (start / positions, start % positions);
                let strip = self.strip(page, which);
                let length = (end - start).min(positions - first);
                for (offset, row) in rows[done..done + length].iter_mut().enumerate() {
                    let position = first + offset;
                    match (self.layout.kind, scratch.next()) {
                        (CacheType::F16 | CacheType::Q8, Some(into)) => {
                            load_row(s, self.layout, strip, position, into);
                            *row = into;
                        }
                        _ => *row = &strip[position * width..(position + 1) * width],
                    }
                }
                done += length;
                start += length;
            }
        }
        rows
    }
}
