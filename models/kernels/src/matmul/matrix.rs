//! The operands of a product: borrowed matrices of three element types, in either order.

use std::ops::Range;

use half::{bf16, f16};

use super::dense::Strided;
use crate::rounding::HalfType;

/// A borrowed matrix `[rows, columns]` of f32, bf16 or f16.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    pub(super) elements: Elements<'a>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    transposed: bool,
}

/// The elements of a matrix, row after row of the matrix that is not transposed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl<'a> MatrixRef<'a> {
    /// A row-major matrix `[rows, columns]` of f32.
    ///
    /// # Panics
    /// Where `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::of(Elements::F32(data), data.len(), rows, columns)
    }

    /// A row-major matrix `[rows, columns]` of bf16.
    ///
    /// # Panics
    /// Where `data` has another length.
    pub fn bf16(data: &'a [bf16], rows: usize, columns: usize) -> Self {
        Self::of(Elements::Bf16(data), data.len(), rows, columns)
    }

    /// A row-major matrix `[rows, columns]` of f16.
    ///
    /// # Panics
    /// Where `data` has another length.
    pub fn f16(data: &'a [f16], rows: usize, columns: usize) -> Self {
        Self::of(Elements::F16(data), data.len(), rows, columns)
    }

    fn of(elements: Elements<'a>, length: usize, rows: usize, columns: usize) -> Self {
        assert_eq!(length, rows * columns, "matrix is not [{rows}, {columns}]");
        Self {
            elements,
            rows,
            columns,
            transposed: false,
        }
    }

    /// Some of the rows of a matrix that is not transposed.
    ///
    /// # Panics
    /// Where the matrix is transposed or has fewer rows.
    pub fn part(self, rows: Range<usize>) -> Self {
        assert!(!self.transposed, "rows of a transposed matrix");
        let range = rows.start * self.columns..rows.end * self.columns;
        let elements = match self.elements {
            Elements::F32(data) => Elements::F32(&data[range]),
            Elements::Bf16(data) => Elements::Bf16(&data[range]),
            Elements::F16(data) => Elements::F16(&data[range]),
        };
        Self {
            elements,
            rows: rows.len(),
            ..self
        }
    }

    /// Rows and columns.
    pub(crate) fn shape(self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The half type of the elements; none for f32.
    pub(crate) fn half_type(self) -> Option<HalfType> {
        match self.elements {
            Elements::F32(_) => None,
            Elements::Bf16(_) => Some(HalfType::Bf16),
            Elements::F16(_) => Some(HalfType::F16),
        }
    }

    /// The transposed view; nothing is moved.
    pub fn transpose(self) -> Self {
        Self {
            elements: self.elements,
            rows: self.columns,
            columns: self.rows,
            transposed: !self.transposed,
        }
    }

    /// The strides, if it is of f32.
    pub(super) fn dense(self) -> Option<Strided<'a>> {
        let Elements::F32(data) = self.elements else {
            return None;
        };
        let strides = match self.order() {
            (true, distance) => [1, distance],
            (false, distance) => [distance, 1],
        };
        let shape = [self.rows, self.columns];
        Some(Strided { data, shape, strides })
    }

    /// Whether its elements are of a half type.
    pub(super) fn is_half(self) -> bool {
        !matches!(self.elements, Elements::F32(_))
    }

    /// Whether its elements are bf16.
    pub(super) fn is_bf16(self) -> bool {
        matches!(self.elements, Elements::Bf16(_))
    }

    /// Whether neighbours in memory are those in a column, and the distance in elements of neighbours in the other
    /// direction.
    pub(super) fn order(self) -> (bool, usize) {
        if self.transposed {
            (true, self.rows)
        } else {
            (false, self.columns)
        }
    }
}
