//! Backward passes as compositions of plain candle operations: what runs on devices without kernels of our own, and the
//! oracle that the kernels are tested against. Every function returns what is to be added to the gradients.

use candle_core::{D, DType, IndexOp, Tensor};

use crate::config::Activation;
use crate::error::Result;
use crate::ops::attention::AttentionShape;

/// Sum over the rows of `[rows, columns]`, `[columns]`.
pub(crate) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.sum(0)?)
}

/// Linear layer `y = x W^T + b`: `x` `[rows, in]`, `weight` `[out, in]`, `dy` `[rows, out]`. Returns (dx, dweight).
pub(crate) fn linear(x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    Ok((dy.matmul(weight)?, dy.t()?.matmul(x)?))
}

/// LayerNorm: `x`, `dy` `[rows, width]`, `weight` `[width]`. Returns (dx, dweight, dbias).
pub(crate) fn layer_norm(x: &Tensor, weight: &Tensor, dy: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor, Tensor)> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
    let normed = centred.broadcast_div(&deviation)?;
    let dnormed = dy.broadcast_mul(weight)?;
    let mean = dnormed.mean_keepdim(D::Minus1)?;
    let slope = (&dnormed * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = dnormed
        .broadcast_sub(&mean)?
        .sub(&normed.broadcast_mul(&slope)?)?
        .broadcast_div(&deviation)?;
    Ok((dx, sum_rows(&(dy * normed)?)?, sum_rows(dy)?))
}

/// RMSNorm: `x`, `dy` `[rows, width]`, `weight` `[width]`. Returns (dx, dweight).
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, dy: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
    let normed = x.broadcast_div(&root)?;
    let dnormed = dy.broadcast_mul(weight)?;
    let slope = (&dnormed * &normed)?.mean_keepdim(D::Minus1)?;
    let dx = dnormed.sub(&normed.broadcast_mul(&slope)?)?.broadcast_div(&root)?;
    Ok((dx, sum_rows(&(dy * normed)?)?))
}

/// An activation, elementwise. Returns dx.
pub(crate) fn activation(activation: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::GeluTanh => gelu_tanh(x, dy),
        Activation::GeluErf => gelu_erf(x, dy),
        Activation::Silu => silu(x, dy),
    }
}

/// `activation(gate) * up`, elementwise. Returns (dgate, dup).
pub(crate) fn gate(kind: Activation, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let dup = (dy * crate::ops::activation::composed(gate, kind)?)?;
    Ok((activation(kind, gate, &(dy * up)?)?, dup))
}

/// GELU by its tanh approximation, elementwise. Returns dx.
fn gelu_tanh(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let factor = (2.0 / std::f64::consts::PI).sqrt();
    let square = x.sqr()?;
    let tanh = ((x * ((&square * 0.044_715)? + 1.0)?)? * factor)?.tanh()?;
    let slope = (((&square * (3.0 * 0.044_715))? + 1.0)? * factor)?;
    let inner = ((1.0 - tanh.sqr()?)? * slope)?;
    let derivative = (((tanh + 1.0)? + (x * inner)?)? * 0.5)?;
    Ok((dy * derivative)?)
}

/// GELU by the error function, elementwise. Returns dx.
fn gelu_erf(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let cumulative = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
    let density = ((x.sqr()? * -0.5)?.exp()? * (0.5 / std::f64::consts::PI).sqrt())?;
    Ok((dy * (cumulative + (x * density)?)?)?)
}

/// SiLU, elementwise. Returns dx.
fn silu(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let sigmoid = ((x.neg()?.exp()? + 1.0)?.recip())?;
    let derivative = (&sigmoid * ((x * (1.0 - &sigmoid)?)? + 1.0)?)?;
    Ok((dy * derivative)?)
}

/// Causal grouped-query attention over packed sequences: `q`, `dy` `[tokens, heads * head_dim]`, `k`, `v`
/// `[tokens, key_value_heads * head_dim]`, sequence `i` in the rows from `bounds[i]` to `bounds[i + 1]`.
/// Returns (dq, dk, dv).
pub(crate) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    bounds: &[usize],
    shape: &AttentionShape<'_>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (mut dqs, mut dks, mut dvs) = (vec![], vec![], vec![]);
    for range in bounds.windows(2).map(|bound| bound[0]..bound[1]) {
        let rows = |x: &Tensor| x.i(range.clone());
        let (dq, dk, dv) = attention_of_one((&rows(q)?, &rows(k)?, &rows(v)?), &rows(dy)?, shape)?;
        dqs.push(dq);
        dks.push(dk);
        dvs.push(dv);
    }
    Ok((Tensor::cat(&dqs, 0)?, Tensor::cat(&dks, 0)?, Tensor::cat(&dvs, 0)?))
}

/// [`attention`] of one sequence, with its whole score matrix `[heads, tokens, tokens]`.
fn attention_of_one(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    dy: &Tensor,
    shape: &AttentionShape<'_>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let tokens = q.dim(0)?;
    let &AttentionShape {
        heads,
        key_value_heads: groups,
        head_dim,
        scale,
        ..
    } = shape;
    // [tokens, heads * head_dim] to [heads, tokens, head_dim] and back.
    let split = |x: &Tensor, heads: usize| x.reshape((tokens, heads, head_dim))?.transpose(0, 1)?.contiguous();
    let join = |x: &Tensor, heads: usize| x.transpose(0, 1)?.contiguous()?.reshape((tokens, heads * head_dim));
    let repeat = |x: &Tensor| {
        let repeated = split(x, groups)?
            .unsqueeze(1)?
            .broadcast_as((groups, heads / groups, tokens, head_dim))?;
        repeated.contiguous()?.reshape((heads, tokens, head_dim))
    };
    let sum_groups = |x: &Tensor| join(&x.reshape((groups, heads / groups, tokens, head_dim))?.sum(1)?, groups);
    let (q, k, v, dy) = (split(q, heads)?, repeat(k)?, repeat(v)?, split(dy, heads)?);
    let scores =
        (q.matmul(&k.t()?)? * f64::from(scale))?.broadcast_add(&shape.additive_mask(0, tokens, q.device())?)?;
    let weights = softmax(&scores)?;
    let dv = weights.t()?.matmul(&dy)?;
    let dweights = dy.matmul(&v.t()?)?;
    let mean = (&dweights * &weights)?.sum_keepdim(D::Minus1)?;
    let dscores = ((weights * dweights.broadcast_sub(&mean)?)? * f64::from(scale))?;
    Ok((
        join(&dscores.matmul(&k)?, heads)?,
        sum_groups(&dscores.t()?.matmul(&q)?)?,
        sum_groups(&dv)?,
    ))
}

/// Softmax over the last dimension.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?)
}

/// What [`cross_entropy_head`] gives.
pub(crate) struct HeadBackward {
    /// Cross-entropy of every row, `[rows]`.
    pub(crate) losses: Vec<f32>,
    /// Gradient of the rows, `[rows, width]`.
    pub(crate) dx: Tensor,
    /// Gradient of the head's matrix, `[vocabulary, width]`.
    pub(crate) dweight: Tensor,
    /// Gradient of the head's bias, `[vocabulary]`, whether it has one or not.
    pub(crate) dbias: Tensor,
}

/// Output head and cross-entropy in blocks of rows: `x` `[rows, width]`, `weight` `[vocabulary, width]`, `bias`
/// `[vocabulary]`; row `i` adds `factors[i]` times its cross-entropy against `targets[i]` to the sum whose gradient is taken.
pub(crate) fn cross_entropy_head(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &[u32],
    factors: &[f32],
) -> Result<HeadBackward> {
    const BLOCK: usize = 256;
    let device = x.device();
    let mut losses = Vec::with_capacity(targets.len());
    let mut dxs = vec![];
    let mut dweight = weight.zeros_like()?.to_dtype(DType::F32)?;
    let mut dbias = Tensor::zeros(weight.dim(0)?, DType::F32, device)?;
    for (index, (targets, factors)) in targets.chunks(BLOCK).zip(factors.chunks(BLOCK)).enumerate() {
        let rows = targets.len();
        let x = x.narrow(0, index * BLOCK, rows)?;
        let mut logits = x.matmul(&weight.t()?)?;
        if let Some(bias) = bias {
            logits = logits.broadcast_add(bias)?;
        }
        let target = Tensor::from_slice(targets, (rows, 1), device)?;
        let factor = Tensor::from_slice(factors, (rows, 1), device)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
        let exponentials = shifted.exp()?;
        let sums = exponentials.sum_keepdim(1)?;
        losses.extend(
            (sums.log()? - shifted.gather(&target, 1)?)?
                .flatten_all()?
                .to_vec1::<f32>()?,
        );
        let probabilities = exponentials.broadcast_div(&sums)?.broadcast_mul(&factor)?;
        let dlogits = probabilities.scatter_add(&target, &factor.neg()?, 1)?;
        dxs.push(dlogits.matmul(weight)?);
        dweight = (dweight + dlogits.t()?.matmul(&x)?)?;
        dbias = (dbias + dlogits.sum(0)?)?;
    }
    Ok(HeadBackward {
        losses,
        dx: Tensor::cat(&dxs, 0)?,
        dweight,
        dbias,
    })
}

/// Rows `dy` `[rows, width]` added up by `ids` into `[vocabulary, width]`.
pub(crate) fn embedding(ids: &[u32], dy: &Tensor, vocabulary: usize) -> Result<Tensor> {
    let zeros = Tensor::zeros((vocabulary, dy.dim(1)?), DType::F32, dy.device())?;
    let ids = Tensor::from_slice(ids, ids.len(), dy.device())?;
    Ok(zeros.index_add(&ids, dy, 0)?)
}
