//! Addressing of one key-value head's rows in packed matrices.

/// The rows of one head in a packed matrix; for queries those of all the heads that share the key-value head, token by
/// token: row `r` is token `r / group`, head `r % group` of the group.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    group: usize,
    head_dim: usize,
}

impl<'a> Rows<'a> {
    /// `data` starts at the first row's first head and has rows of `stride` elements.
    pub(super) fn new(data: &'a [f32], stride: usize, group: usize, head_dim: usize) -> Self {
        Self {
            data,
            stride,
            group,
            head_dim,
        }
    }

    #[inline(always)]
    pub(super) fn row(&self, index: usize) -> &'a [f32] {
        let start = index / self.group * self.stride + index % self.group * self.head_dim;
        &self.data[start..start + self.head_dim]
    }

    /// Rows `start..start + N`, of which only the first `count` exist; the others are empty. Found once per block, so
    /// that inner loops do not divide.
    #[inline(always)]
    pub(super) fn block<const N: usize>(&self, start: usize, count: usize) -> [&'a [f32]; N] {
        let mut rows: [&[f32]; N] = [&[]; N];
        for (index, row) in rows.iter_mut().enumerate().take(count) {
            *row = self.row(start + index);
        }
        rows
    }
}
