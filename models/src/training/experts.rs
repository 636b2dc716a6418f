//! Forward and backward of a mixture of experts: only the chosen experts compute, each on its rows together.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_kernels_cpu::{RouterLosses, expert_gate_gradients, route_backward, scale_expert_rows};

use super::Pass;
use super::tape::LayerTape;
use crate::config::ExpertsConfig;
use crate::decoder::{ExpertLayer, FeedForward, Layer, ParameterId, Projection};
use crate::error::Result;
use crate::experts::{Routing, Switches};
use crate::ops::backward::{
    self, ExpertMatrix, OutputGradient, add_in_place, experts_backward, experts_forward, frozen_linear_backward,
    gather_rows, linear_backward,
};
use crate::ops::experts::{RowsOf, combine, grouped_linear, sigmoid, sigmoid_rows};
use crate::ops::half::{rounded_gradient, widened};
use crate::ops::storage::{with_mut_slice, with_slice};

/// One of the three projections of every expert: its matrix, and its rows of an expert.
#[derive(Clone, Copy)]
struct Part<'a> {
    parameter: ParameterId,
    rows: RowsOf<'a>,
}

impl Pass<'_> {
    /// The outputs of the gate and the up projection on the rows of the experts, `[rows, feed_forward_width]`, from the
    /// normalised stream `[tokens, width]` f32.
    pub(super) fn record_experts(
        &self,
        index: usize,
        layer: &Layer,
        experts: &ExpertLayer,
        normed: &Tensor,
    ) -> Result<[Tensor; 2]> {
        let routing = self.routing(index, experts, normed)?;
        let x = self.operand(&gather_rows(normed, &routing.groups.tokens)?)?;
        self.with_parts(&layer.feed_forward, |[gate, up, _]| {
            let gate = self.operand(&self.experts_linear(gate, &routing, &x)?)?;
            let up = self.operand(&self.experts_linear(up, &routing, &x)?)?;
            Ok([gate, up])
        })
    }

    /// What the experts give to the stream, `[tokens, width]`.
    pub(super) fn mix_experts(
        &self,
        index: usize,
        layer: &Layer,
        experts: &ExpertLayer,
        tape: &LayerTape,
    ) -> Result<Tensor> {
        let normed = self.decoder.normalize(&tape.middle, &layer.feed_forward_norm)?;
        let routing = self.routing(index, experts, &normed)?;
        let pending = self.begin_away(index, &routing, &normed)?;
        let inner = self.activate(tape.gate.as_ref(), &tape.up)?;
        let y = self.with_parts(&layer.feed_forward, |[_, _, down]| {
            self.experts_linear(down, &routing, &inner)
        })?;
        self.take_outputs(pending, &y)?;
        let output = combine(&routing.groups, &y, Some(&routing.gates), &normed)?;
        if let Some(shared) = &experts.shared {
            let (_, _, y) = self.shared_forward(shared, &normed)?;
            let y = match &experts.shared_gate {
                Some(gate) => sigmoid_rows(&y, &self.router_scores(gate, &normed)?)?,
                None => y,
            };
            add_in_place(&output, &y)?;
        }
        Ok(output)
    }

    /// The way back from the gradient `dy` `[tokens, width]` of [`mix_experts`](Self::mix_experts)'s result to that of the
    /// normalised stream `normed` `[tokens, width]` f32.
    pub(super) fn backward_experts(
        &self,
        index: usize,
        (layer, experts): (&Layer, &ExpertLayer),
        tape: &LayerTape,
        normed: &Tensor,
        dy: &Tensor,
    ) -> Result<Tensor> {
        let config = self.decoder.experts_config()?;
        let routing = self.routing(index, experts, normed)?;
        let pending = self.begin_away_backward(index, &routing, normed, dy)?;
        let (drows, mut dgates) = self.backward_rows(layer, &routing, tape, normed, dy)?;
        self.take_gradients(pending, layer, &routing, &drows, &mut dgates)?;
        let dnormed = combine(&routing.groups, &drows, None, normed)?;
        drop(drows);
        let dscores = self.router_gradient(config, &routing, &dgates)?;
        let shape = (self.batch.tokens.len(), config.experts);
        let dscores = Tensor::from_vec(dscores, shape, &Device::Cpu)?.to_device(normed.device())?;
        let dnormed = self.backward_router(&experts.router, normed, &dscores, dnormed)?;
        match &experts.shared {
            Some(shared) => self.backward_shared(shared, experts.shared_gate.as_ref(), normed, (dy, dnormed)),
            None => Ok(dnormed),
        }
    }

    /// The gradients of the experts' rows `[rows, width]`, and of the gates `[tokens, per_token]`.
    fn backward_rows(
        &self,
        layer: &Layer,
        routing: &Routing,
        tape: &LayerTape,
        normed: &Tensor,
        dy: &Tensor,
    ) -> Result<(Tensor, Vec<f32>)> {
        let groups = &routing.groups;
        let inner = widened(&self.activate(tape.gate.as_ref(), &tape.up)?)?;
        let dy = gather_rows(dy, &groups.tokens)?;
        self.with_parts(&layer.feed_forward, |[gate_part, up_part, down_part]| {
            // Of the gate times the output: the gate is brought into `inner` for the matrix, and into `dinner` after it.
            let gated = inner.copy()?;
            self.scale_rows(routing, &gated)?;
            let dinner = self.experts_linear_backward(down_part, routing, &self.operand(&gated)?, &dy, None)?;
            drop(gated);
            let mut dgates = vec![0.0; routing.gates.len()];
            let on_host = [dinner.to_device(&Device::Cpu)?, inner.to_device(&Device::Cpu)?];
            with_slice(&on_host[0], |dinner| {
                with_slice(&on_host[1], |inner| {
                    expert_gate_gradients(groups, dinner, inner, &mut dgates);
                })
            })??;
            drop(on_host);
            self.scale_rows(routing, &dinner)?;
            let activation = self.decoder.config().activation;
            let (gate, up) = (tape.gate.as_ref().map(widened).transpose()?, widened(&tape.up)?);
            let (dgate, dup) = backward::activate_backward(activation, gate.as_ref(), &up, &dinner)?;
            drop((gate, up, dinner));
            let x = self.operand(&gather_rows(normed, &groups.tokens)?)?;
            let mut dx = self.experts_linear_backward(up_part, routing, &x, &dup, None)?;
            if let Some(dgate) = dgate {
                dx = self.experts_linear_backward(gate_part, routing, &x, &dgate, Some(dx))?;
            }
            Ok((dx, dgates))
        })
    }

    /// Multiplies the rows of the experts by their gates in place.
    fn scale_rows(&self, routing: &Routing, rows: &Tensor) -> Result<()> {
        if crate::ops::storage::is_cpu(rows) {
            return with_mut_slice(rows, |rows| scale_expert_rows(&routing.groups, &routing.gates, rows));
        }
        let host = rows.to_device(&Device::Cpu)?;
        with_mut_slice(&host, |rows| scale_expert_rows(&routing.groups, &routing.gates, rows))?;
        Ok(rows.slice_set(&host.to_device(rows.device())?, 0, 0)?)
    }

    /// The gradient of the scores `[tokens, experts]` from that of the gates, and from the losses of the routers.
    fn router_gradient(&self, config: &ExpertsConfig, routing: &Routing, dgates: &[f32]) -> Result<Vec<f32>> {
        let mut dscores = vec![0.0; routing.scores.len()];
        let sums = self.router_losses.borrow();
        let gradients = sums.as_ref().map(|sums| sums.gradients(config, routing));
        let losses = gradients.as_ref().map(|(dprobabilities, dlog_sum_exp)| RouterLosses {
            dprobabilities,
            dlog_sum_exp,
        });
        let router = routing.switches.router(config);
        route_backward(router, routing.choice(), dgates, losses, &mut dscores);
        // An expert that had no room for a token took nothing from its gate; what the other gates owe to it is left.
        Ok(dscores)
    }

    /// Where the tokens go in layer number `index`, as its first forward pass decided.
    fn routing(&self, index: usize, experts: &ExpertLayer, normed: &Tensor) -> Result<Arc<Routing>> {
        if let Some(routing) = &self.routings.borrow()[index] {
            return Ok(Arc::clone(routing));
        }
        let config = self.decoder.experts_config()?;
        let switches = Switches::read(self.weight_f32(experts.switches)?)?;
        let scores = self.router_scores(&experts.router, normed)?;
        let kept = |chosen: &[u32]| self.router.kept(config, self.batch, chosen);
        let routing = Arc::new(Routing::new(config, switches, &scores, kept)?);
        self.routings.borrow_mut()[index] = Some(Arc::clone(&routing));
        Ok(routing)
    }

    /// A router's product, which is f32 in every precision: `[tokens, rows]`.
    fn router_scores(&self, router: &Projection, normed: &Tensor) -> Result<Tensor> {
        backward::linear_forward(&self.matrix(router)?, None, normed)
    }

    /// The way back of [`router_scores`](Self::router_scores), added to `dx`.
    fn backward_router(&self, router: &Projection, normed: &Tensor, dy: &Tensor, dx: Tensor) -> Result<Tensor> {
        let dy = OutputGradient { exact: dy, rounded: dy };
        linear_backward(&self.matrix(router)?, normed, dy, Some(dx))
    }

    /// Gate, up and output of a shared network.
    fn shared_forward(&self, shared: &FeedForward, normed: &Tensor) -> Result<(Option<Tensor>, Tensor, Tensor)> {
        let x = self.operand(normed)?;
        let gate = shared.gate.as_ref().map(|gate| self.linear(gate, &x)).transpose()?;
        let up = self.linear(&shared.up, &x)?;
        let y = self.linear(&shared.down, &self.activate(gate.as_ref(), &up)?)?;
        Ok((gate, up, y))
    }

    /// The way back through the shared network: the gradient of `normed`, added to `dnormed`.
    fn backward_shared(
        &self,
        shared: &FeedForward,
        shared_gate: Option<&Projection>,
        normed: &Tensor,
        (dy, mut dnormed): (&Tensor, Tensor),
    ) -> Result<Tensor> {
        let (gate, up, y) = self.shared_forward(shared, normed)?;
        let mut dy = dy.clone();
        if let Some(projection) = shared_gate {
            let scores = self.router_scores(projection, normed)?;
            let factors: Vec<f32> = scores
                .flatten_all()?
                .to_vec1::<f32>()?
                .into_iter()
                .map(sigmoid)
                .collect();
            let products: Vec<f32> = (&dy * &y)?.sum(1)?.to_vec1()?;
            let slopes = products
                .iter()
                .zip(&factors)
                .map(|(product, factor)| product * factor * (1.0 - factor));
            let shape = (factors.len(), 1);
            let dscores = Tensor::from_vec(slopes.collect::<Vec<f32>>(), shape, normed.device())?;
            dnormed = self.backward_router(projection, normed, &dscores, dnormed)?;
            dy = dy.broadcast_mul(&Tensor::from_vec(factors, shape, normed.device())?)?;
        }
        let inner = self.activate(gate.as_ref(), &up)?;
        let dinner = self.backward_linear(&shared.down, &inner, &dy, None)?;
        let activation = self.decoder.config().activation;
        let (dgate, dup) = backward::activate_backward(activation, gate.as_ref(), &up, &dinner)?;
        let x = self.operand(normed)?;
        dnormed = self.backward_linear(&shared.up, &x, &dup, Some(dnormed))?;
        match (&shared.gate, &dgate) {
            (Some(gate), Some(dgate)) => self.backward_linear(gate, &x, dgate, Some(dnormed)),
            _ => Ok(dnormed),
        }
    }

    /// Calls `body` with the gate, the up and the down projection of the experts.
    fn with_parts<T>(&self, network: &FeedForward, body: impl FnOnce([Part<'_>; 3]) -> Result<T>) -> Result<T> {
        let config = self.decoder.config();
        let (inner, width) = (config.feed_forward_width, config.width);
        let rows = |matrix: usize| {
            move |expert: usize| -> Range<usize> { network.expert_rows(expert, inner, width)[matrix].clone() }
        };
        let (gate, up, down) = (rows(0), rows(1), rows(2));
        let part = |parameter, rows| Part { parameter, rows };
        body([
            part(network.up.weight, &gate),
            part(network.up.weight, &up),
            part(network.down.weight, &down),
        ])
    }

    fn expert_matrix<'a>(&'a self, part: Part<'a>, routing: &'a Routing) -> Result<ExpertMatrix<'a>> {
        Ok(ExpertMatrix {
            weight: self.operand_weight(part.parameter)?,
            rows: part.rows,
            dweight: self.gradient_of(part.parameter),
            bounds: &routing.groups.bounds,
            elsewhere: self.decoder.remote_experts(),
        })
    }

    /// A projection of the experts on their rows `x` `[rows, in]`: `[rows, out]` f32.
    fn experts_linear(&self, part: Part<'_>, routing: &Routing, x: &Tensor) -> Result<Tensor> {
        match self.frozen(part.parameter) {
            Some(weight) => {
                let [y] = grouped_linear(&widened(x)?, &routing.groups.bounds, [(weight, part.rows)])?;
                Ok(y)
            }
            None => experts_forward(self.expert_matrix(part, routing)?, x),
        }
    }

    /// The way back of [`experts_linear`](Self::experts_linear).
    fn experts_linear_backward(
        &self,
        part: Part<'_>,
        routing: &Routing,
        x: &Tensor,
        dy: &Tensor,
        dx: Option<Tensor>,
    ) -> Result<Tensor> {
        let Some(weight) = self.frozen(part.parameter) else {
            let half = self.half.map(|half| half.precision().dtype());
            let dy = match half {
                Some(dtype) => rounded_gradient(dy, dtype, &self.losses)?,
                None => dy.clone(),
            };
            return experts_backward(self.expert_matrix(part, routing)?, x, &dy, dx);
        };
        let mut parts = vec![];
        let bounds = routing.groups.bounds.windows(2).enumerate();
        for (expert, bounds) in bounds.filter(|(_, bounds)| bounds[0] < bounds[1]) {
            let dy = dy.narrow(0, bounds[0], bounds[1] - bounds[0])?.contiguous()?;
            parts.push(frozen_linear_backward(weight, (part.rows)(expert), &dy, None)?);
        }
        let own = Tensor::cat(&parts, 0)?;
        match dx {
            Some(dx) => add_in_place(&dx, &own).map(|()| dx),
            None => Ok(own),
        }
    }
}
