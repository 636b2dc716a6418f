//! llama.cpp's order of query and key rows.
//!
//! Its converter interleaves the two halves of every head of the `llama` architecture, for its own rotary embedding:
//! row `2 * i + half` of a head holds what transformers has in row `half * (head_dim / 2) + i`. Whole rows move, so
//! quantised blocks stay as they are.

/// Puts rows back into transformers' order: `rows` holds `heads * head_dim` rows of `row_length` units each.
///
/// `None` if the rows do not divide into heads of even size.
pub(super) fn undo_interleaving<T: Copy + Default>(rows: &[T], row_length: usize, heads: usize) -> Option<Vec<T>> {
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
    use super::undo_interleaving;

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
    fn refuses_rows_that_do_not_divide() {
        assert_eq!(undo_interleaving(&[0u8; 12], 2, 4), None);
        assert_eq!(undo_interleaving(&[0u8; 12], 2, 0), None);
        assert_eq!(undo_interleaving(&[0u8; 12], 0, 1), None);
        assert_eq!(undo_interleaving(&[0u8; 6], 2, 1), None);
    }
}
