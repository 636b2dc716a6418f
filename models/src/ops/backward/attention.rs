//! Causal attention over packed sequences, forward with what backward needs, and backward.

use candle_core::Tensor;

use super::composed;
use crate::error::Result;
use crate::ops::attention::{AttentionShape, CachedSequence};

/// What backward needs of attention.
pub(crate) struct AttentionTape {
    /// Rotated queries, `[tokens, heads * head_dim]`.
    query: Tensor,
    /// Rotated keys, `[tokens, key_value_heads * head_dim]`.
    key: Tensor,
    /// Values, `[tokens, key_value_heads * head_dim]`.
    value: Tensor,
    /// The attention's output, `[tokens, heads * head_dim]`.
    pub(crate) output: Tensor,
}

/// Attends within each sequence, which has the rows from `bounds[i]` to `bounds[i + 1]`.
pub(crate) fn attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: &[usize],
    shape: &AttentionShape,
) -> Result<AttentionTape> {
    let sequence = |bound: &[usize]| -> Result<CachedSequence> {
        let rows = bound[0]..bound[1];
        let part = |x: &Tensor| x.narrow(0, rows.start, rows.len());
        Ok(CachedSequence {
            keys: part(&key)?,
            values: part(&value)?,
            rows: rows.clone(),
        })
    };
    let sequences: Vec<_> = bounds.windows(2).map(sequence).collect::<Result<_>>()?;
    let output = crate::ops::attention::composed(&query, &sequences, shape)?;
    Ok(AttentionTape {
        query,
        key,
        value,
        output,
    })
}

/// The gradients of queries, keys and values from the gradient `dy` `[tokens, heads * head_dim]` of the output.
pub(crate) fn attention_backward(
    tape: AttentionTape,
    dy: &Tensor,
    bounds: &[usize],
    shape: &AttentionShape,
) -> Result<(Tensor, Tensor, Tensor)> {
    composed::attention((&tape.query, &tape.key, &tape.value), dy, bounds, shape)
}
