//! Storage formats of weights and the borrowed weight matrix.

/// How the elements of a weight matrix are stored. Multi-byte values are little-endian; the quantised formats are
/// ggml's, as found in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of IEEE single precision.
    BF16,
    /// 32 elements: scale f16, 4-bit values around 8.
    Q4_0,
    /// 32 elements: scale and minimum f16, 4-bit values.
    Q4_1,
    /// 32 elements: scale f16, 5-bit values around 16.
    Q5_0,
    /// 32 elements: scale and minimum f16, 5-bit values.
    Q5_1,
    /// 32 elements: scale f16, 8-bit signed values.
    Q8_0,
    /// 256 elements: 2-bit values, 4-bit scales and minima of 16 groups.
    Q2K,
    /// 256 elements: 3-bit values, 6-bit scales of 16 groups.
    Q3K,
    /// 256 elements: 4-bit values, 6-bit scales and minima of 8 groups.
    Q4K,
    /// 256 elements: 5-bit values, 6-bit scales and minima of 8 groups.
    Q5K,
    /// 256 elements: 6-bit values, 8-bit scales of 16 groups.
    Q6K,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: [WeightFormat; 13] = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::BF16,
        WeightFormat::Q4_0,
        WeightFormat::Q4_1,
        WeightFormat::Q5_0,
        WeightFormat::Q5_1,
        WeightFormat::Q8_0,
        WeightFormat::Q2K,
        WeightFormat::Q3K,
        WeightFormat::Q4K,
        WeightFormat::Q5K,
        WeightFormat::Q6K,
    ];

    /// Elements per block: 1 for the dense formats, 32 or 256 for the quantised ones. Rows hold whole blocks.
    pub const fn block_elements(self) -> usize {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::BF16 => 1,
            WeightFormat::Q4_0 | WeightFormat::Q4_1 | WeightFormat::Q5_0 | WeightFormat::Q5_1 | WeightFormat::Q8_0 => {
                32
            }
            WeightFormat::Q2K | WeightFormat::Q3K | WeightFormat::Q4K | WeightFormat::Q5K | WeightFormat::Q6K => 256,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::BF16 => 2,
            WeightFormat::Q4_0 => 18,
            WeightFormat::Q4_1 => 20,
            WeightFormat::Q5_0 => 22,
            WeightFormat::Q5_1 => 24,
            WeightFormat::Q8_0 => 34,
            WeightFormat::Q2K => 84,
            WeightFormat::Q3K => 110,
            WeightFormat::Q4K => 144,
            WeightFormat::Q5K => 176,
            WeightFormat::Q6K => 210,
        }
    }

    /// Bytes of a row of `columns` elements, or `None` where that is not a whole number of blocks.
    pub const fn row_bytes(self, columns: usize) -> Option<usize> {
        if columns.is_multiple_of(self.block_elements()) {
            Some(columns / self.block_elements() * self.block_bytes())
        } else {
            None
        }
    }
}

/// A borrowed weight matrix `[rows, columns]`, row-major: `rows` outputs of a linear layer with `columns` inputs.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// How `data` stores the elements.
    pub format: WeightFormat,
    /// The rows one after another, each `format.row_bytes(columns)` bytes; any alignment.
    pub data: &'a [u8],
    /// Number of rows (outputs, or vocabulary entries).
    pub rows: usize,
    /// Number of columns (inputs).
    pub columns: usize,
}

impl<'a> Weights<'a> {
    /// A view of dense single-precision weights `[rows, columns]`.
    pub fn from_f32(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self {
            format: WeightFormat::F32,
            data: bytemuck::cast_slice(data),
            rows,
            columns,
        }
    }

    /// Bytes of one row. Panics where the columns are not whole blocks or `data` has another length than the shape
    /// says.
    pub(crate) fn checked_row_bytes(&self) -> usize {
        let Some(row_bytes) = self.format.row_bytes(self.columns) else {
            panic!("{} columns are not whole blocks of {:?}", self.columns, self.format);
        };
        assert_eq!(
            self.data.len(),
            row_bytes * self.rows,
            "weights [{}, {}] in {:?} need another number of bytes",
            self.rows,
            self.columns,
            self.format
        );
        row_bytes
    }
}
