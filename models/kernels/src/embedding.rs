//! Rows of an embedding table by token, and the gradient of the table.

use crate::quantized::dequantize_row;
use crate::simd::{LANES, Simd, dispatch, level};
use crate::threads::parallel_for;
use crate::tiles::{Cuts, Tiles};
use crate::{Weights, elementwise};

/// `out[i] = table[ids[i]]`. `table` is `[rows, width]` in any format, `out` `[ids, width]`.
///
/// # Panics
/// Where the lengths do not fit each other or an id has no row.
pub fn embedding_gather(table: Weights<'_>, ids: &[u32], out: &mut [f32]) {
    let row_bytes = table.checked_row_bytes();
    let width = table.columns;
    assert_eq!(out.len(), ids.len() * width, "output is not [{}, {width}]", ids.len());
    check_ids(ids, table.rows);
    if out.is_empty() {
        return;
    }
    let level = level();
    let step = (elementwise::STEP / width).max(1);
    let tiles = Tiles::new(
        out,
        width,
        Cuts::Every {
            step,
            length: ids.len(),
        },
        Cuts::none(width),
    );
    parallel_for(ids.len().div_ceil(step), |task| {
        let mut tile = tiles.take(task, 0);
        for (row, &id) in (0..tile.rows()).zip(&ids[task * step..]) {
            let start = id as usize * row_bytes;
            dequantize_row(
                level,
                table.format,
                &table.data[start..start + row_bytes],
                tile.row(row),
            );
        }
    });
}

/// `table[ids[i]] += dy[i]`: the gradient of an embedding table. `dy` is `[ids, width]`, `table` `[rows, width]`.
///
/// Rows of one id are added in the order of `ids`, whatever the number of threads.
///
/// # Panics
/// Where the lengths do not fit each other or an id has no row.
pub fn embedding_scatter_add(dy: &[f32], ids: &[u32], width: usize, table: &mut [f32]) {
    const COLUMNS: usize = 8 * LANES;
    assert_eq!(dy.len(), ids.len() * width, "gradient is not [{}, {width}]", ids.len());
    if dy.is_empty() {
        return;
    }
    assert!(table.len().is_multiple_of(width), "table is not rows of {width}");
    check_ids(ids, table.len() / width);
    let level = level();
    let rows = table.len() / width;
    // Tasks own columns, so that ids may repeat.
    let tiles = Tiles::new(
        table,
        width,
        Cuts::none(rows),
        Cuts::Every {
            step: COLUMNS,
            length: width,
        },
    );
    parallel_for(width.div_ceil(COLUMNS), |task| {
        let mut tile = tiles.take(0, task);
        for (dy, &id) in dy.chunks_exact(width).zip(ids) {
            let row = tile.row(id as usize);
            let dy = &dy[task * COLUMNS..][..row.len()];
            dispatch!(level, add_row(row, dy));
        }
    });
}

#[inline(always)]
fn add_row<S: Simd>(s: S, row: &mut [f32], dy: &[f32]) {
    elementwise::update_lanes(
        s,
        row,
        dy,
        #[inline(always)]
        |row, dy| s.add(row, dy),
    );
}

fn check_ids(ids: &[u32], rows: usize) {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
        panic!("id {id} in a table of {rows} rows");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightFormat;
    use crate::test_util::{assert_close, at_every_level, random};

    #[test]
    fn gathered_rows_are_the_tables() {
        at_every_level(|| {
            for width in [1, 7, 33, 100] {
                let table = random(11 * width, 1);
                let ids = [10, 0, 3, 3];
                let mut out = vec![0.0; 4 * width];
                embedding_gather(Weights::from_f32(&table, 11, width), &ids, &mut out);
                for (row, id) in out.chunks(width).zip(ids) {
                    assert_eq!(row, &table[id as usize * width..][..width]);
                }
            }
        });
    }

    #[test]
    fn quantised_rows_are_decoded() {
        at_every_level(|| {
            let data = [0, 0x3c, 0x21, 0x43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            let table = Weights {
                format: WeightFormat::Q4_0,
                data: &data,
                rows: 1,
                columns: 32,
            };
            let mut out = [0.0; 32];
            embedding_gather(table, &[0], &mut out);
            assert_eq!(out[..3], [-7.0, -5.0, -8.0]);
            assert_eq!(out[16..19], [-6.0, -4.0, -8.0]);
        });
    }

    #[test]
    fn repeated_ids_are_added_up() {
        at_every_level(|| {
            for width in [1, 7, 130, 300] {
                let ids = [4, 1, 4, 4, 0];
                let dy = random(ids.len() * width, 1);
                let mut table = random(5 * width, 2);
                let mut want = table.clone();
                for (dy, id) in dy.chunks(width).zip(ids) {
                    for (want, dy) in want[id as usize * width..].iter_mut().zip(dy) {
                        *want += dy;
                    }
                }
                embedding_scatter_add(&dy, &ids, width, &mut table);
                assert_close(&table, &want, 1e-6);
            }
        });
    }

    #[test]
    #[should_panic(expected = "id 2 in a table of 2 rows")]
    fn an_id_without_a_row_is_named() {
        embedding_gather(Weights::from_f32(&[0.0; 4], 2, 2), &[1, 2], &mut [0.0; 4]);
    }
}
