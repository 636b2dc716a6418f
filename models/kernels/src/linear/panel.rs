//! Many rows of `x`: panels of weights are decoded once and multiplied with all rows, tile by tile.

use std::cell::RefCell;

use super::direct::{rows as direct_rows, tile_rows};
use crate::quantized::{F32, dequantize_row};
use crate::simd::{LANES, Level, dispatch};
use crate::tiles::Tile;
use crate::{WeightFormat, Weights};

/// Rows of weights in a panel. A panel of a thousand columns is 96 KiB and stays in the second-level cache.
const PANEL_ROWS: usize = 24;

/// Elements of `x` that are used again and again: 512 KiB, a part of the second-level cache.
const CACHED_ELEMENTS: usize = 1 << 17;

/// `out = x * W^T + bias`; `x` is [packed](super::direct::pack).
pub(super) fn rows(level: Level, x: &[f32], weights: Weights<'_>, bias: Option<&[f32]>, out: &mut Tile<'_, f32>) {
    thread_local! {
        static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let k = weights.columns;
    let (tile_rows, stride) = (tile_rows(level), k.next_multiple_of(LANES));
    // Rows of x that stay in the second-level cache while all panels pass: whole tiles.
    let block = (CACHED_ELEMENTS / stride.max(1)).max(1).next_multiple_of(tile_rows);
    SCRATCH.with_borrow_mut(|scratch| {
        for first in (0..out.rows()).step_by(block) {
            let last = out.rows().min(first + block);
            for start in (0..weights.rows).step_by(PANEL_ROWS) {
                let end = weights.rows.min(start + PANEL_ROWS);
                let panel = decoded(level, weights, [start, end], scratch);
                let bias = bias.map(|bias| &bias[start..end]);
                for row in (first..last).step_by(tile_rows) {
                    let x = &x[row * stride..];
                    dispatch!(level, direct_rows::<F32>(x, panel, bias, out, [row, start]));
                }
            }
        }
    });
}

/// Rows `start..end` of `weights` as f32: themselves, or decoded to `scratch`.
fn decoded<'a>(level: Level, weights: Weights<'a>, [start, end]: [usize; 2], scratch: &'a mut Vec<f32>) -> Weights<'a> {
    let k = weights.columns;
    let row_bytes = weights.data.len() / weights.rows;
    let data = &weights.data[start * row_bytes..end * row_bytes];
    let data = match weights.format {
        WeightFormat::F32 => data,
        format => {
            scratch.resize((end - start) * k, 0.0);
            let rows = data.chunks_exact(row_bytes.max(1));
            for (row, out) in rows.zip(scratch.chunks_exact_mut(k.max(1))) {
                dequantize_row(level, format, row, out);
            }
            bytemuck::cast_slice(scratch)
        }
    };
    Weights {
        format: WeightFormat::F32,
        data,
        rows: end - start,
        columns: k,
    }
}
