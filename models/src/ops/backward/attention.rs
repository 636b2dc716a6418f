//! Causal attention over packed sequences, forward with what backward needs, and backward.

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{self as kernels, Dropout};

use super::composed;
use crate::error::{Error, Result};
use crate::ops::attention::{AttentionShape, CachedSequence};
use crate::ops::half::widened;
use crate::ops::storage::{CpuSlice, is_cpu};

/// What backward needs of attention; `T` is how its tensors are kept.
pub(crate) struct AttentionTape<T = Tensor> {
    /// Rotated queries, `[tokens, heads * head_dim]`, like keys and values f32 or as they were given.
    pub(crate) query: T,
    /// Rotated keys, `[tokens, key_value_heads * head_dim]`.
    pub(crate) key: T,
    /// Values, `[tokens, key_value_heads * head_dim]`.
    pub(crate) value: T,
    /// The attention's output, `[tokens, heads * head_dim]`.
    pub(crate) output: T,
    /// Logarithms of the softmax' denominators, `[tokens, heads]`; empty on devices without kernels of our own.
    pub(crate) log_sum_exp: Vec<f32>,
}

impl<T> AttentionTape<T> {
    /// The same with tensors kept in another way.
    pub(crate) fn map<U>(self, keep: impl Fn(T) -> Result<U>) -> Result<AttentionTape<U>> {
        Ok(AttentionTape {
            query: keep(self.query)?,
            key: keep(self.key)?,
            value: keep(self.value)?,
            output: keep(self.output)?,
            log_sum_exp: self.log_sum_exp,
        })
    }
}

/// Attends within each sequence, which has the rows from `bounds[i]` to `bounds[i + 1]`. Computes in f32 whatever the types
/// are; the output is f32. With `dropout` probabilities are dropped, which only the CPU does.
pub(crate) fn attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: &[usize],
    shape: &AttentionShape<'_>,
    dropout: Option<&Dropout<'_>>,
) -> Result<AttentionTape> {
    let [q, k, v] = [widened(&query)?, widened(&key)?, widened(&value)?];
    if !is_cpu(&query) {
        refuse_dropout(dropout)?;
        let output = forward_elsewhere(&q, &k, &v, bounds, shape)?;
        return Ok(AttentionTape {
            query,
            key,
            value,
            output,
            log_sum_exp: vec![],
        });
    }
    let mut output = vec![0.0; query.elem_count()];
    let mut log_sum_exp = vec![0.0; query.dim(0)? * shape.heads];
    {
        let (q, k, v) = (CpuSlice::new(&q)?, CpuSlice::new(&k)?, CpuSlice::new(&v)?);
        let inputs = [q.f32()?, k.f32()?, v.f32()?];
        let log_sum_exp = Some(log_sum_exp.as_mut_slice());
        kernels::attention_forward(&shape.heads(), bounds, inputs, dropout, &mut output, log_sum_exp);
    }
    let output = Tensor::from_vec(output, query.shape(), &Device::Cpu)?;
    Ok(AttentionTape {
        query,
        key,
        value,
        output,
        log_sum_exp,
    })
}

pub(super) fn forward_elsewhere(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    bounds: &[usize],
    shape: &AttentionShape<'_>,
) -> Result<Tensor> {
    let sequence = |bound: &[usize]| -> Result<CachedSequence> {
        let rows = bound[0]..bound[1];
        let part = |x: &Tensor| x.narrow(0, rows.start, rows.len());
        Ok(CachedSequence {
            keys: part(key)?,
            values: part(value)?,
            rows: rows.clone(),
        })
    };
    let sequences: Vec<_> = bounds.windows(2).map(sequence).collect::<Result<_>>()?;
    crate::ops::attention::composed(query, &sequences, shape)
}

/// The gradients of queries, keys and values, f32, from the gradient `dy` `[tokens, heads * head_dim]` of the output.
pub(crate) fn attention_backward(
    tape: AttentionTape,
    dy: &Tensor,
    bounds: &[usize],
    shape: &AttentionShape<'_>,
    dropout: Option<&Dropout<'_>>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let AttentionTape {
        query,
        key,
        value,
        output,
        log_sum_exp,
    } = tape.map(|tensor| widened(&tensor))?;
    if !is_cpu(dy) {
        refuse_dropout(dropout)?;
        return composed::attention((&query, &key, &value), dy, bounds, shape);
    }
    let [mut dq, mut dk, mut dv] = [&query, &key, &value].map(|x| vec![0.0; x.elem_count()]);
    {
        let (q, k, v) = (CpuSlice::new(&query)?, CpuSlice::new(&key)?, CpuSlice::new(&value)?);
        let (out, dy) = (CpuSlice::new(&output)?, CpuSlice::new(dy)?);
        let saved = kernels::AttentionSaved {
            q: q.f32()?,
            k: k.f32()?,
            v: v.f32()?,
            out: out.f32()?,
            log_sum_exp: &log_sum_exp,
        };
        let gradients = [dq.as_mut_slice(), &mut dk, &mut dv];
        kernels::attention_backward(&shape.heads(), bounds, &saved, dropout, dy.f32()?, gradients);
    }
    let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu);
    Ok((tensor(dq, &query)?, tensor(dk, &key)?, tensor(dv, &value)?))
}

/// The error of dropping probabilities on a device without kernels of our own.
fn refuse_dropout(dropout: Option<&Dropout<'_>>) -> Result<()> {
    match dropout {
        None => Ok(()),
        Some(_) => Err(Error::Unsupported("attn_pdrop is for models on the CPU".into())),
    }
}
