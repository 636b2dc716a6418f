//! Disjoint rectangles of one output matrix, so that parallel tasks write it without locks.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

/// A row-major matrix cut into a grid of tiles, each of which can be taken once, from any thread.
pub(crate) struct Tiles<'a, T> {
    data: *mut T,
    stride: usize,
    rows: Cuts<'a>,
    columns: Cuts<'a>,
    taken: Box<[AtomicBool]>,
    lifetime: PhantomData<&'a mut [T]>,
}

/// Where one dimension is cut.
#[derive(Clone, Copy)]
pub(crate) enum Cuts<'a> {
    /// Pieces of `step` elements (the last may be shorter) of so many in all.
    Every { step: usize, length: usize },
    /// Ascending bounds: piece `i` is `bounds[i]..bounds[i + 1]`.
    At(&'a [usize]),
}

impl Cuts<'_> {
    /// The whole dimension as one piece.
    pub(crate) fn none(length: usize) -> Self {
        Cuts::Every {
            step: length.max(1),
            length,
        }
    }

    fn pieces(self) -> usize {
        match self {
            Cuts::Every { step, length } => length.div_ceil(step),
            Cuts::At(bounds) => bounds.len() - 1,
        }
    }

    /// Start and end of a piece.
    fn piece(self, index: usize) -> (usize, usize) {
        match self {
            Cuts::Every { step, length } => (index * step, length.min((index + 1) * step)),
            Cuts::At(bounds) => (bounds[index], bounds[index + 1]),
        }
    }

    /// Panics where pieces would overlap or leave `0..length`.
    fn check(self, length: usize) {
        match self {
            Cuts::Every { step, length: own } => assert!(step > 0 && own == length, "cut at {own} of {length}"),
            Cuts::At(bounds) => {
                assert!(
                    bounds.is_sorted() && bounds.last().is_some_and(|&last| last <= length),
                    "cut at {bounds:?}"
                );
            }
        }
    }
}

// SAFETY: tiles are disjoint and each is handed out once, so that sharing `Tiles` only ever gives several threads
// exclusive access to different elements.
unsafe impl<T: Send> Sync for Tiles<'_, T> {}

impl<'a, T> Tiles<'a, T> {
    /// Cuts `data`, rows of `stride` elements.
    pub(crate) fn new(data: &'a mut [T], stride: usize, rows: Cuts<'a>, columns: Cuts<'a>) -> Self {
        let height = data.len().checked_div(stride).unwrap_or(0);
        assert_eq!(height * stride, data.len(), "not whole rows of {stride}");
        rows.check(height);
        columns.check(stride);
        let taken = (0..rows.pieces() * columns.pieces())
            .map(|_| AtomicBool::new(false))
            .collect();
        Self {
            data: data.as_mut_ptr(),
            stride,
            rows,
            columns,
            taken,
            lifetime: PhantomData,
        }
    }

    /// The tile of that piece of rows and of columns. Panics where it was taken before.
    pub(crate) fn take(&self, row: usize, column: usize) -> Tile<'_, T> {
        assert!(column < self.columns.pieces());
        let taken = self.taken[row * self.columns.pieces() + column].swap(true, Ordering::Relaxed);
        assert!(!taken, "tile {row}, {column} is taken");
        let (top, bottom) = self.rows.piece(row);
        let (left, right) = self.columns.piece(column);
        // SAFETY: `check` made sure that the piece's first element is inside, or that the piece is empty.
        let data = unsafe { self.data.add((top * self.stride + left).min(self.taken_end())) };
        Tile {
            data,
            stride: self.stride,
            rows: bottom - top,
            columns: right - left,
            lifetime: PhantomData,
        }
    }

    /// Index one past the last element.
    fn taken_end(&self) -> usize {
        let rows = match self.rows {
            Cuts::Every { length, .. } => length,
            Cuts::At(bounds) => bounds[bounds.len() - 1],
        };
        rows * self.stride
    }
}

/// Exclusive access to a rectangle of a matrix.
pub(crate) struct Tile<'a, T> {
    data: *mut T,
    stride: usize,
    rows: usize,
    columns: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

impl<T> Tile<'_, T> {
    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The tile's part of one of its rows.
    pub(crate) fn row(&mut self, index: usize) -> &mut [T] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        // SAFETY: the elements lie inside the matrix by `Tiles::new`'s checks, belong to this tile alone (tiles are
        // disjoint, each taken once), and are borrowed through `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(index * self.stride), self.columns) }
    }

    /// The first element, for code that addresses rows by [`Tile::stride`] itself. Valid for the tile's rectangle.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        self.data
    }

    /// Distance of rows in elements.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_partition_the_matrix() {
        let mut data = vec![0; 5 * 7];
        {
            let tiles = Tiles::new(
                &mut data,
                7,
                Cuts::At(&[0, 2, 2, 5]),
                Cuts::Every { step: 3, length: 7 },
            );
            for (row, column) in (0..3).flat_map(|row| (0..3).map(move |column| (row, column))) {
                let mut tile = tiles.take(row, column);
                for i in 0..tile.rows() {
                    tile.row(i).iter_mut().for_each(|value| *value += 10 * row + column + 1);
                }
            }
        }
        assert_eq!(data[..7], [1, 1, 1, 2, 2, 2, 3]);
        assert_eq!(data[28..], [21, 21, 21, 22, 22, 22, 23]);
        assert!(data.iter().all(|&value| value != 0));
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn a_tile_cannot_be_taken_twice() {
        let mut data = vec![0; 4];
        let tiles = Tiles::new(&mut data, 2, Cuts::none(2), Cuts::none(2));
        let _first = tiles.take(0, 0);
        let _second = tiles.take(0, 0);
    }

    #[test]
    #[should_panic(expected = "cut at")]
    fn overlapping_pieces_are_refused() {
        let mut data = vec![0; 4];
        let _ = Tiles::new(&mut data, 2, Cuts::At(&[0, 2, 1]), Cuts::none(2));
    }
}
