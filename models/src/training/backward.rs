//! The backward pass: segments in reverse, every parameter's gradient added up in place as soon as it is known.

use candle_core::Tensor;
use candle_kernels_cpu::Dropout;

use super::dropout::DropoutSite;
use super::forward::gather_groups;
use super::packed::Attended;
use super::tape::{Kept, LayerTape, Tape};
use super::{Pass, check_cancelled};
use crate::decoder::{Layer, LowRank, NormParameters, ParameterId, Projection, QueryKeyValue, Weight, WeightType};
use crate::error::Result;
use crate::ops::attention::AttentionShape;
use crate::ops::backward::{
    self, AttentionTape, InputDropout, LowRankFactors, Matrix, NormWeights, OutputGradient, attention_backward,
    cross_entropy_head, embedding_backward, frozen_head, frozen_linear_backward, gather_rows, linear_backward,
    low_rank_backward,
};
use crate::ops::half::{rounded_gradient, widened};
use crate::ops::{heads, rotary};

impl Pass<'_> {
    /// Head, loss, and the way back. Returns the cross-entropy of every row that has a target.
    pub(super) fn backward(&self, tape: Tape) -> Result<Vec<f32>> {
        let Tape { mut layers, output } = tape;
        check_cancelled(self.cancelled)?;
        let (losses, mut gradient) = self.backward_head(&output)?;
        drop(output);
        while !layers.is_empty() {
            let end = layers.len();
            let mut tapes = self.last_tapes(&mut layers)?;
            for index in (layers.len()..end).rev() {
                check_cancelled(self.cancelled)?;
                // The last tapes are those of the layers that are no longer in the list.
                let Some(tape) = tapes.pop() else { break };
                gradient = self.backward_layer(index, tape, gradient)?;
            }
        }
        self.backward_embedding(&gradient)?;
        Ok(losses)
    }

    /// Takes the last layer, and those before it that are needed to run it again, off the list: their tapes as the
    /// forward pass recorded them, to the rounding of compression.
    fn last_tapes(&self, layers: &mut Vec<Kept>) -> Result<Vec<LayerTape>> {
        let end = layers.len();
        while let Some(kept) = layers.pop() {
            match kept {
                Kept::Everything(tape) => return Ok(vec![tape.restore(self.product_dtype())?]),
                Kept::Input(input) => {
                    let first = layers.len();
                    return self.replay(first, &self.layout.layers[first..end], input.restore(None)?);
                }
                Kept::Nothing => {}
            }
        }
        Ok(vec![])
    }

    /// Final norm, head and cross-entropy of the rows that have targets: their losses, and the gradient of the last
    /// layer's output, `[tokens, width]`.
    fn backward_head(&self, output: &Tensor) -> Result<(Vec<f32>, Tensor)> {
        let batch = self.batch;
        let whole = batch.every_row_has_a_target();
        let x = if whole {
            output.clone()
        } else {
            gather_rows(output, &batch.rows)?
        };
        let norm = self.norm(&self.layout.final_norm)?;
        let normed = norm.forward(&x)?;
        let (losses, dnormed) = self.cross_entropy(&self.layout.head, &normed.output)?;
        let zeros = x.zeros_like()?;
        norm.backward(&normed, &x, &dnormed, &zeros)?;
        if whole {
            return Ok((losses, zeros));
        }
        let gradient = output.zeros_like()?;
        embedding_backward(&batch.rows, &zeros, &gradient)?;
        Ok((losses, gradient))
    }

    /// Layer number `index`: `gradient` of its output, `[tokens, width]`, becomes that of its input.
    fn backward_layer(&self, index: usize, tape: LayerTape, gradient: Tensor) -> Result<Tensor> {
        let layer = &self.layout.layers[index];
        // Where both halves read the layer's input, that of the feed-forward half does not pass through attention.
        let parallel = self.decoder.config().residual.is_parallel();
        let doutput = if parallel { gradient.copy()? } else { gradient.clone() };
        self.backward_feed_forward(index, layer, &tape, &gradient)?;
        let LayerTape { input, attention, .. } = tape;
        let dadded = self.dropped(&doutput, DropoutSite::AttentionOutput(index))?;
        drop(doutput);
        let dattention = self.backward_linear(
            &layer.attention_output,
            &self.operand(&attention.output)?,
            &dadded,
            None,
        )?;
        drop(dadded);
        let dropout = self.dropout_at(DropoutSite::Attention(index));
        let shape = self.decoder.attention_shape(index);
        let (dquery, dkey, dvalue) = self.backward_attention(attention, &dattention, &shape, dropout.as_ref())?;
        drop(dattention);
        let dquery = self.rotate_back(dquery)?;
        let dkey = self.rotate_back(dkey)?;
        let norm = self.norm(&layer.attention_norm)?;
        let normed = norm.forward(&input)?;
        let x = self.operand(&normed.output)?;
        let [query_norm, key_norm] = layer
            .query_key_norm
            .as_ref()
            .map_or([None, None], |[q, k]| [Some(q), Some(k)]);
        let dnormed = match &layer.query_key_value {
            QueryKeyValue::Separate([query, key, value]) => {
                let dquery = self.backward_head_norm(query_norm, query, &x, dquery)?;
                let dkey = self.backward_head_norm(key_norm, key, &x, dkey)?;
                let dnormed = self.backward_linear(query, &x, &dquery, None)?;
                let dnormed = self.backward_linear(key, &x, &dkey, Some(dnormed))?;
                self.backward_linear(value, &x, &dvalue, Some(dnormed))?
            }
            // No family has both: their heads are not normalised.
            QueryKeyValue::PerHead(all) => {
                let dall = heads::join([&dquery, &dkey, &dvalue], self.decoder.config().head_dim)?;
                self.backward_linear(all, &x, &dall, None)?
            }
        };
        norm.backward(&normed, &input, &dnormed, &gradient)?;
        Ok(gradient)
    }

    /// The gradient of a projection's output from `dy`, that of its norm's, if it has one. What was normalised is computed
    /// again from the projection's input `x`.
    fn backward_head_norm(
        &self,
        norm: Option<&NormParameters>,
        projection: &Projection,
        x: &Tensor,
        dy: Tensor,
    ) -> Result<Tensor> {
        let Some(norm) = norm else { return Ok(dy) };
        let norm = self.norm(norm)?;
        let output = self.linear(projection, x)?;
        let dx = output.zeros_like()?;
        norm.backward(&norm.forward(&output)?, &output, &dy, &dx)?;
        Ok(dx)
    }

    /// The gradients of queries, keys and values from that of the attention's output, all by rows.
    fn backward_attention(
        &self,
        tape: AttentionTape,
        gradient: &Tensor,
        shape: &AttentionShape<'_>,
        dropout: Option<&Dropout<'_>>,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let bounds = &self.batch.bounds;
        let Some(Attended { rows: attended, first }) = &self.batch.attended else {
            return attention_backward(tape, gradient, bounds, shape, dropout);
        };
        let tape = tape.map(|tensor| widened(&tensor))?;
        let spread = AttentionTape {
            query: gather_rows(&tape.query, attended)?,
            key: gather_rows(&tape.key, attended)?,
            value: gather_rows(&tape.value, attended)?,
            output: gather_rows(&tape.output, attended)?,
            log_sum_exp: gather_groups(&tape.log_sum_exp, shape.heads, attended),
        };
        // Where a row attends in several sequences, its output was taken from the first.
        let spread_gradient = spread.output.zeros_like()?;
        embedding_backward(first, gradient, &spread_gradient)?;
        let (dquery, dkey, dvalue) = attention_backward(spread, &spread_gradient, bounds, shape, None)?;
        // Keys and values of a shared row have a part in every sequence.
        let gathered = |dx: &Tensor, like: &Tensor| -> Result<Tensor> {
            let sum = like.zeros_like()?;
            embedding_backward(attended, dx, &sum)?;
            Ok(sum)
        };
        Ok((
            gather_rows(&dquery, first)?,
            gathered(&dkey, &tape.key)?,
            gathered(&dvalue, &tape.value)?,
        ))
    }

    /// The feed-forward half: to `gradient` of the layer's output is added that of what the half reads, in place.
    fn backward_feed_forward(&self, index: usize, layer: &Layer, tape: &LayerTape, gradient: &Tensor) -> Result<()> {
        let network = &layer.feed_forward;
        if let Some(experts) = &layer.experts {
            let norm = self.norm(&layer.feed_forward_norm)?;
            let normed = norm.forward(&tape.middle)?;
            let dadded = self.dropped(gradient, DropoutSite::FeedForward(index))?;
            let dnormed = self.backward_experts(index, (layer, experts), tape, &normed.output, &dadded)?;
            return norm.backward(&normed, &tape.middle, &dnormed, gradient);
        }
        let inner = self.activate(tape.gate.as_ref(), &tape.up)?;
        let dadded = self.dropped(gradient, DropoutSite::FeedForward(index))?;
        let dinner = self.backward_linear(&network.down, &inner, &dadded, None)?;
        drop((inner, dadded));
        let activation = self.decoder.config().activation;
        let (gate, up) = (tape.gate.as_ref().map(widened).transpose()?, widened(&tape.up)?);
        let (dgate, dup) = backward::activate_backward(activation, gate.as_ref(), &up, &dinner)?;
        drop((gate, up, dinner));
        let norm = self.norm(&layer.feed_forward_norm)?;
        let input = self.decoder.feed_forward_input(&tape.input, &tape.middle);
        let normed = norm.forward(input)?;
        let x = self.operand(&normed.output)?;
        let mut dnormed = self.backward_linear(&network.up, &x, &dup, None)?;
        if let (Some(gate), Some(dgate)) = (&network.gate, &dgate) {
            dnormed = self.backward_linear(gate, &x, dgate, Some(dnormed))?;
        }
        norm.backward(&normed, input, &dnormed, gradient)
    }

    /// Adds the gradient of the embeddings, whose sum's is `gradient`.
    fn backward_embedding(&self, gradient: &Tensor) -> Result<()> {
        self.drop(gradient, DropoutSite::Embedding)?;
        if let Some(sum) = self.gradient_of(self.layout.token_embedding) {
            embedding_backward(&self.batch.tokens, gradient, sum)?;
        }
        if let Some(sum) = self
            .layout
            .position_embedding
            .and_then(|positions| self.gradient_of(positions))
        {
            embedding_backward(&self.batch.positions, gradient, sum)?;
        }
        Ok(())
    }

    /// A projection: adds the gradients of its matrix and bias, and returns that of `x`, added to `dx` if given.
    pub(super) fn backward_linear(
        &self,
        projection: &Projection,
        x: &Tensor,
        dy: &Tensor,
        dx: Option<Tensor>,
    ) -> Result<Tensor> {
        let dx = match self.frozen(projection.weight) {
            Some(weight) => frozen_linear_backward(weight, projection.rows.clone(), dy, dx)?,
            None => self.backward_matrix(projection, x, dy, dx)?,
        };
        if let Some(factors) = self.low_rank(projection)? {
            low_rank_backward(&factors, &widened(x)?, dy, &dx)?;
        }
        Ok(dx)
    }

    /// [`backward_linear`](Self::backward_linear) of the matrix alone, in the precision of the pass.
    fn backward_matrix(&self, projection: &Projection, x: &Tensor, dy: &Tensor, dx: Option<Tensor>) -> Result<Tensor> {
        let rounded = self
            .half
            .map(|half| rounded_gradient(dy, half.precision().dtype(), &self.losses));
        let rounded = rounded.transpose()?;
        let dy = OutputGradient {
            exact: dy,
            rounded: rounded.as_ref().unwrap_or(dy),
        };
        linear_backward(&self.matrix(projection)?, x, dy, dx)
    }

    /// Cross-entropy of the rows `x` `[rows, width]` that have targets, and the gradient of `x`.
    fn cross_entropy(&self, head: &Projection, x: &Tensor) -> Result<(Vec<f32>, Tensor)> {
        let (targets, factors) = (&self.batch.targets, &self.factors);
        let copy = self.half.and_then(|half| half.get(head.weight));
        let bias = head.bias.map(|bias| self.weight_f32(bias)).transpose()?;
        let trained = [Some(head.weight), head.bias].into_iter().flatten();
        if copy.is_none() && trained.into_iter().all(|part| self.gradient_of(part).is_none()) {
            let x = widened(&self.operand(x)?)?;
            return frozen_head(&x, self.decoder.weight(head.weight), bias, targets, factors);
        }
        let (x, matrix) = (self.operand(x)?, self.matrix(head)?);
        let (losses, dx, lost) = cross_entropy_head(&x, &matrix, bias, targets, factors)?;
        self.losses.count(lost);
        Ok((losses, dx))
    }

    /// A matrix of an adapter's base that is not held as f32 and is used as it is; none for others.
    pub(super) fn frozen(&self, matrix: ParameterId) -> Option<&Weight> {
        let weight = self.decoder.weight(matrix);
        (self.decoder.is_adapted() && weight.kind() != WeightType::F32).then_some(weight)
    }

    /// What an adapter adds to a projection, and where the gradients of that are added up.
    pub(super) fn low_rank(&self, projection: &Projection) -> Result<Option<LowRankFactors<'_>>> {
        let Some(matrix) = projection.low_rank else {
            return Ok(None);
        };
        let LowRank { a, b, scale, .. } = matrix;
        let masks = self.dropout_at(DropoutSite::LowRank(matrix));
        Ok(Some(LowRankFactors {
            a: self.weight_f32(a)?,
            b: self.weight_f32(b)?,
            rows: projection.rows.clone(),
            scale,
            da: self.gradient_of(a),
            db: self.gradient_of(b),
            dropout: masks.map(|masks| InputDropout {
                masks,
                bounds: &self.batch.bounds,
            }),
        }))
    }

    /// The gradient of what was dropped at a place from that of what was left, both `[tokens, width]`.
    fn dropped(&self, gradient: &Tensor, site: DropoutSite) -> Result<Tensor> {
        if self.dropout_at(site).is_none() {
            return Ok(gradient.clone());
        }
        let gradient = gradient.copy()?;
        self.drop(&gradient, site)?;
        Ok(gradient)
    }

    /// A projection's matrix, and where its gradients are added up.
    pub(super) fn matrix(&self, projection: &Projection) -> Result<Matrix<'_>> {
        Ok(Matrix {
            weight: self.operand_weight(projection.weight)?,
            rows: projection.rows.clone(),
            dweight: self.gradient_of(projection.weight),
            dbias: projection.bias.and_then(|bias| self.gradient_of(bias)),
        })
    }

    /// A norm's parameters, and where their gradients are added up.
    fn norm(&self, norm: &NormParameters) -> Result<NormWeights<'_>> {
        let config = self.decoder.config();
        Ok(NormWeights {
            kind: config.norm,
            epsilon: config.norm_epsilon as f32,
            weight: self.weight_f32(norm.weight)?,
            bias: norm.bias.map(|bias| self.weight_f32(bias)).transpose()?,
            dweight: self.gradient_of(norm.weight),
            dbias: norm.bias.and_then(|bias| self.gradient_of(bias)),
        })
    }

    /// The gradient of queries or keys before their rotation: rotated by the opposite angles.
    fn rotate_back(&self, dx: Tensor) -> Result<Tensor> {
        match &self.opposite_angles {
            Some(angles) => rotary::rotate(dx, angles, self.decoder.config().head_dim),
            None => Ok(dx),
        }
    }

    /// The values of a parameter, which must be held as f32.
    pub(super) fn weight_f32(&self, parameter: ParameterId) -> Result<&Tensor> {
        self.decoder.weight(parameter).as_f32()
    }

    /// The values of a matrix as products read them: in half precision if there is any.
    pub(super) fn operand_weight(&self, parameter: ParameterId) -> Result<&Tensor> {
        match self.half.and_then(|half| half.get(parameter)) {
            Some(copy) => Ok(copy),
            None => self.weight_f32(parameter),
        }
    }

    /// Where the gradient of a parameter is added up; none for a frozen one.
    pub(super) fn gradient_of(&self, parameter: ParameterId) -> Option<&Tensor> {
        self.gradient.sum(parameter.0)
    }
}
