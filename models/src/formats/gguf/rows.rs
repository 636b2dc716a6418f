//! llama.cpp's order of query, key and value rows. Whole rows move, so quantised blocks stay as they are.
//!
//! Its converter interleaves the two halves of every head of the `llama` architecture, for its own rotary embedding:
//! row `2 * i + half` of a head holds what transformers has in row `half * (head_dim / 2) + i`. Of the `gptneox`
//! architecture it puts all queries before all keys before all values, where transformers has each head's three in turn.

/// What the converter did to the rows of a tensor of so many heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reordered {
    /// Interleaved the halves of every head.
    Halves(usize),
    /// Gathered queries, keys and values of all heads.
    Kinds(usize),
}

impl Reordered {
    /// Puts rows of `row_length` units each back into transformers' order; `None` if they do not divide into heads.
    pub(super) fn undo<T: Copy + Default>(self, rows: &[T], row_length: usize) -> Option<Vec<T>> {
        match self {
            Self::Halves(heads) => undo_interleaving(rows, row_length, heads),
            Self::Kinds(heads) => undo_gathering(rows, row_length, heads),
        }
    }
}

/// `rows` holds `3 * heads * head_dim` rows.
fn undo_gathering<T: Copy + Default>(rows: &[T], row_length: usize, heads: usize) -> Option<Vec<T>> {
    let block = rows.len().checked_div(heads.checked_mul(3)?)?;
    if row_length == 0 || !block.is_multiple_of(row_length) || 3 * heads * block != rows.len() {
        return None;
    }
    let mut ordered = Vec::with_capacity(rows.len());
    for head in 0..heads {
        for kind in 0..3 {
            ordered.extend_from_slice(&rows[(kind * heads + head) * block..][..block]);
        }
    }
    Some(ordered)
}

/// `rows` holds `heads * head_dim` rows of `row_length` units each.
///
/// `None` if the rows do not divide into heads of even size.
fn undo_interleaving<T: Copy + Default>(rows: &[T], row_length: usize, heads: usize) -> Option<Vec<T>> {
    let count = rows.len().checked_div(row_length)?;
    let head_rows = count.checked_div(heads)?;
    if head_rows * heads * row_length != rows.len() || head_rows % 2 != 0 {
        return None;
    }
    let half_rows = head_rows / 2;
    let mut ordered = vec![T::default(); rows.len()];
    for (index, row) in rows.chunks_exact(row_length).enumerate() {
        let (head, within) = (index / head_rows, index % head_rows);
        let target = head * head_rows + (within % 2) * half_rows + within / 2;
        ordered[target * row_length..][..row_length].copy_from_slice(row);
    }
    Some(ordered)
}

#[cfg(test)]
mod tests {
    use super::{undo_gathering, undo_interleaving};

    /// The converter's own operation: reshape to [heads, 2, half, row], swap the middle two.
    fn interleave(rows: &[u8], row_bytes: usize, heads: usize) -> Vec<u8> {
        let half = rows.len() / row_bytes / heads / 2;
        let row = |head: usize, part: usize, i: usize| &rows[((head * 2 + part) * half + i) * row_bytes..][..row_bytes];
        let order = (0..heads).flat_map(|head| (0..half).flat_map(move |i| (0..2).map(move |part| (head, part, i))));
        order.flat_map(|(head, part, i)| row(head, part, i).to_vec()).collect()
    }

    #[test]
    fn undoes_the_converters_permutation() {
        for (heads, head_rows, row_bytes) in [(1, 2, 1), (3, 8, 5), (9, 64, 18), (2, 6, 3)] {
            let rows: Vec<u8> = (0..heads * head_rows * row_bytes).map(|i| (i % 251) as u8).collect();
            assert_eq!(
                undo_interleaving(&interleave(&rows, row_bytes, heads), row_bytes, heads),
                Some(rows)
            );
        }
    }

    #[test]
    fn each_head_gets_its_three_back() {
        // Two heads of one row of two units: q0 q1 k0 k1 v0 v1.
        let gathered = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        let ordered = vec![0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11];
        assert_eq!(undo_gathering(&gathered, 2, 2), Some(ordered));
        for (length, row_length, heads) in [(12, 2, 0), (12, 0, 2), (10, 2, 2), (12, 4, 2)] {
            assert_eq!(undo_gathering(&gathered[..length], row_length, heads), None);
        }
    }

    #[test]
    fn refuses_rows_that_do_not_divide() {
        assert_eq!(undo_interleaving(&[0u8; 12], 2, 4), None);
        assert_eq!(undo_interleaving(&[0u8; 12], 2, 0), None);
        assert_eq!(undo_interleaving(&[0u8; 12], 0, 1), None);
        assert_eq!(undo_interleaving(&[0u8; 6], 2, 1), None);
    }
}
