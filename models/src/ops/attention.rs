//! Causal grouped-query attention (arXiv:2305.13245) of new tokens over cached keys and values, dense, banded or
//! block-sparse.

use super::storage::{CpuSlice, new_tensor};
use crate::config::DecoderConfig;
use crate::error::Result;
use candle_core::{D, Device, Tensor};
use candle_kernels_cpu::{AttentionHeads, AttentionMask, PageLayout};
use std::ops::Range;

/// How the widths divide into heads, and what these see.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; each serves `heads / key_value_heads` query heads in a row.
    pub key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Which of the tokens up to its own a token sees.
    pub mask: AttentionMask<'a>,
}

impl<'a> AttentionShape<'a> {
    /// That of a configuration's layers, which see what `mask` says.
    pub fn of(config: &DecoderConfig, mask: AttentionMask<'a>) -> Self {
        Self {
            heads: config.heads,
            key_value_heads: config.key_value_heads,
            head_dim: config.head_dim,
            scale: config.attention_scale(),
            mask,
        }
    }

    /// The kernels' words for it.
    pub(crate) fn heads(&self) -> AttentionHeads<'a> {
        let &Self {
            heads,
            key_value_heads,
            head_dim,
            scale,
            mask,
        } = self;
        AttentionHeads {
            heads,
            key_value_heads,
            head_dim,
            scale,
            mask,
        }
    }

    /// What is added to the scores of `rows` tokens that follow `past` ones, 0 or minus infinity:
    /// `[heads, rows, past + rows]`, with one head where all see the same.
    pub(crate) fn additive_mask(&self, past: usize, rows: usize, device: &Device) -> Result<Tensor> {
        let heads = if self.mask.layouts.is_empty() { 1 } else { self.heads };
        let length = past + rows;
        let mut mask = vec![f32::NEG_INFINITY; heads * rows * length];
        for (index, row) in mask.chunks_exact_mut(length).enumerate() {
            let (head, query) = (index / rows, past + index % rows);
            for (key, value) in row.iter_mut().enumerate().take(query + 1) {
                if self.mask.sees(head, query, key) {
                    *value = 0.0;
                }
            }
        }
        Ok(Tensor::from_vec(mask, (heads, rows, length), device)?)
    }
}

/// One sequence of a batch as tensors; the batch's sequences follow each other in the rows of the queries.
#[derive(Debug)]
pub struct CachedSequence {
    /// Its rows of the queries: the last tokens of the sequence.
    pub rows: Range<usize>,
    /// Keys of all its tokens, `[length, key_value_heads * head_dim]`.
    pub keys: Tensor,
    /// Values of all its tokens, `[length, key_value_heads * head_dim]`.
    pub values: Tensor,
}

/// Attends from `queries` `[rows, heads * head_dim]` on the CPU to each sequence's own pages of keys and values, each
/// query to the tokens up to its own. Returns `[rows, heads * head_dim]`.
pub fn attend_cached(
    queries: &Tensor,
    layout: &PageLayout,
    sequences: &[candle_kernels_cpu::CachedSequence<'_>],
    shape: &AttentionShape<'_>,
) -> Result<Tensor> {
    let heads = shape.heads();
    let q = CpuSlice::new(queries)?;
    new_tensor(queries.shape(), |out| {
        candle_kernels_cpu::attention_decode(&heads, layout, q.f32()?, sequences, out);
        Ok(())
    })
}

/// [`attend_cached`] from plain candle operations on keys and values that lie whole: for devices without kernels of our
/// own, and the tests' oracle.
pub fn composed(queries: &Tensor, sequences: &[CachedSequence], shape: &AttentionShape<'_>) -> Result<Tensor> {
    let attended: Vec<Tensor> = sequences
        .iter()
        .map(|sequence| {
            let queries = queries.narrow(0, sequence.rows.start, sequence.rows.len())?;
            attend_one(&queries, sequence, shape)
        })
        .collect::<Result<_>>()?;
    Ok(Tensor::cat(&attended, 0)?)
}

/// One sequence, with its whole score matrix `[heads, queries, length]`.
fn attend_one(queries: &Tensor, sequence: &CachedSequence, shape: &AttentionShape<'_>) -> Result<Tensor> {
    let &AttentionShape {
        heads,
        key_value_heads,
        head_dim,
        scale,
        ..
    } = shape;
    let (rows, length) = (queries.dim(0)?, sequence.keys.dim(0)?);
    let queries = queries
        .reshape((rows, heads, head_dim))?
        .transpose(0, 1)?
        .contiguous()?;
    // Each key-value head once for every query head that it serves: [heads, length, head_dim].
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let x = x
            .reshape((length, key_value_heads, head_dim))?
            .transpose(0, 1)?
            .unsqueeze(1)?;
        let repeated = x.broadcast_as((key_value_heads, heads / key_value_heads, length, head_dim))?;
        Ok(repeated.contiguous()?.reshape((heads, length, head_dim))?)
    };
    let (keys, values) = (repeat(&sequence.keys)?, repeat(&sequence.values)?);
    let mask = shape.additive_mask(length - rows, rows, queries.device())?;
    let scores = (queries.matmul(&keys.t()?)? * f64::from(scale))?.broadcast_add(&mask)?;
    let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
    let attended = weights.matmul(&values)?.transpose(0, 1)?.contiguous()?;
    Ok(attended.reshape((rows, heads * head_dim))?)
}
