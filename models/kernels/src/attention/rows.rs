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

    /// The rows from `start` on.
    #[inline(always)]
    pub(super) fn from(self, start: usize) -> impl Fn(usize) -> &'a [f32] {
        move |index| self.row(start + index)
    }
}
