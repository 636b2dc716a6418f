//! Experts that other servers compute, forward and backward. The weights stay here, and so do the sums of their gradients:
//! those servers keep nothing that a transaction would have to take back.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use candle_kernels_cpu::OutOfRange;

use super::{Pass, check_cancelled};
use crate::decoder::{ExpertGradient, ExpertRows, ExpertsCall, GatedRows, Layer, ParameterId, Pending};
use crate::error::{Error, Result};
use crate::experts::Routing;
use crate::ops::backward::{add_in_place, gather_rows};
use crate::ops::storage::with_mut_slice;

/// Rows that are computed elsewhere, among those of all experts, and what is under way for them.
pub(super) struct Away<'a, T> {
    rows: Vec<(usize, Range<usize>)>,
    pending: Pending<'a, Vec<T>>,
}

impl Pass<'_> {
    /// Whether an expert is computed elsewhere.
    pub(super) fn is_away(&self, expert: usize) -> bool {
        self.decoder.remote_experts().is_some_and(|remote| remote.holds(expert))
    }

    /// Sends the rows of experts that are elsewhere on their way; none without such rows. `normed` is `[tokens, width]`.
    pub(super) fn begin_away(
        &self,
        index: usize,
        routing: &Routing,
        normed: &Tensor,
    ) -> Result<Option<Away<'_, Vec<f32>>>> {
        let rows = self.rows_away(routing);
        let Some(remote) = self.decoder.remote_experts().filter(|_| !rows.is_empty()) else {
            return Ok(None);
        };
        let mut groups = Vec::with_capacity(rows.len());
        for (expert, range) in &rows {
            groups.push(ExpertRows {
                expert: *expert,
                rows: gathered(normed, routing, range)?,
            });
        }
        let call = self.call(index);
        let pending = match self.alone {
            false => remote.forward(call, groups)?,
            true => Box::new(move |cancelled: &dyn Fn() -> bool| {
                let output = |group: &ExpertRows| {
                    check_cancelled(cancelled)?;
                    let weights = call.decoder.expert_weights(call.layer, group.expert)?;
                    weights.forward(&group.rows, call.products.unwrap_or(DType::F32))
                };
                groups.iter().map(output).collect()
            }),
        };
        Ok(Some(Away { rows, pending }))
    }

    /// Waits for outputs and puts them among those of all rows, `y` `[rows, width]`.
    pub(super) fn take_outputs(&self, away: Option<Away<'_, Vec<f32>>>, y: &Tensor) -> Result<()> {
        let Some(Away { rows, pending }) = away else {
            return Ok(());
        };
        for ((expert, range), output) in rows.into_iter().zip(pending(self.cancelled)?) {
            put_rows(y, expert, range, output)?;
        }
        Ok(())
    }

    /// Sends the rows of experts that are elsewhere on the way back, with the gradient `dy` `[tokens, width]` of what the
    /// experts give to the stream.
    pub(super) fn begin_away_backward(
        &self,
        index: usize,
        routing: &Routing,
        normed: &Tensor,
        dy: &Tensor,
    ) -> Result<Option<Away<'_, ExpertGradient>>> {
        let rows = self.rows_away(routing);
        let Some(remote) = self.decoder.remote_experts().filter(|_| !rows.is_empty()) else {
            return Ok(None);
        };
        let gates = routing.groups.by_row(&routing.gates);
        let mut groups = Vec::with_capacity(rows.len());
        for (expert, range) in &rows {
            groups.push(GatedRows {
                expert: *expert,
                rows: gathered(normed, routing, range)?,
                gates: gates[range.clone()].to_vec(),
                gradient: gathered(dy, routing, range)?,
            });
        }
        let call = self.call(index);
        let pending = match self.alone {
            false => remote.backward(call, groups)?,
            true => Box::new(move |cancelled: &dyn Fn() -> bool| {
                let gradient = |group: &GatedRows| {
                    check_cancelled(cancelled)?;
                    let weights = call.decoder.expert_weights(call.layer, group.expert)?;
                    let products = call.products.unwrap_or(DType::F32);
                    weights.backward(&group.rows, &group.gates, &group.gradient, products)
                };
                groups.iter().map(gradient).collect()
            }),
        };
        Ok(Some(Away { rows, pending }))
    }

    /// Waits for gradients: puts those of rows among `drows` `[rows, width]`, those of gates into `dgates`
    /// `[tokens, per_token]`, and adds those of the weights.
    pub(super) fn take_gradients(
        &self,
        away: Option<Away<'_, ExpertGradient>>,
        layer: &Layer,
        routing: &Routing,
        drows: &Tensor,
        dgates: &mut [f32],
    ) -> Result<()> {
        let Some(Away { rows, pending }) = away else {
            return Ok(());
        };
        let config = self.decoder.config();
        let (inner, width) = (config.feed_forward_width, config.width);
        let network = &layer.feed_forward;
        for ((expert, range), gradient) in rows.into_iter().zip(pending(self.cancelled)?) {
            check_length(expert, gradient.gates.len(), range.len())?;
            routing.groups.set_places(range.start, &gradient.gates, dgates);
            put_rows(drows, expert, range, gradient.rows)?;
            let [gate, _, down] = network.expert_rows(expert, inner, width);
            self.add_gradient(network.up.weight, expert, gate.start, (2 * inner, width), gradient.up)?;
            self.add_gradient(network.down.weight, expert, down.start, (width, inner), gradient.down)?;
            self.losses.count(OutOfRange {
                overflows: gradient.overflows,
                underflows: gradient.underflows,
            });
        }
        Ok(())
    }

    /// Adds the gradient of rows from `start` on of a parameter, unless that is frozen.
    fn add_gradient(
        &self,
        parameter: ParameterId,
        expert: usize,
        start: usize,
        shape: (usize, usize),
        values: Vec<f32>,
    ) -> Result<()> {
        let Some(sum) = self.gradient_of(parameter) else {
            return Ok(());
        };
        check_length(expert, values.len(), shape.0 * shape.1)?;
        let values = Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(sum.device())?;
        add_in_place(&sum.narrow(0, start, shape.0)?, &values)
    }

    /// The experts that are elsewhere and have rows, with these.
    fn rows_away(&self, routing: &Routing) -> Vec<(usize, Range<usize>)> {
        if self.decoder.remote_experts().is_none() {
            return vec![];
        }
        let experts = routing.groups.bounds.windows(2).enumerate();
        experts
            .map(|(expert, bounds)| (expert, bounds[0]..bounds[1]))
            .filter(|(expert, rows)| !rows.is_empty() && self.is_away(*expert))
            .collect()
    }

    fn call(&self, layer: usize) -> ExpertsCall<'_> {
        ExpertsCall {
            decoder: self.decoder,
            layer,
            products: Some(self.product_dtype()),
        }
    }
}

/// The elements of the tokens' rows of `x` `[tokens, width]` that a range of the experts' rows reads.
fn gathered(x: &Tensor, routing: &Routing, rows: &Range<usize>) -> Result<Vec<f32>> {
    let rows = gather_rows(x, &routing.groups.tokens[rows.clone()])?;
    Ok(rows.flatten_all()?.to_vec1()?)
}

/// Replaces rows of `x` `[rows, width]`.
fn put_rows(x: &Tensor, expert: usize, rows: Range<usize>, values: Vec<f32>) -> Result<()> {
    let width = x.dims2()?.1;
    check_length(expert, values.len(), rows.len() * width)?;
    if !x.device().is_cpu() {
        let values = Tensor::from_vec(values, (rows.len(), width), x.device())?;
        return Ok(x.slice_set(&values, 0, rows.start)?);
    }
    with_mut_slice(x, |x| x[rows.start * width..rows.end * width].copy_from_slice(&values))
}

fn check_length(expert: usize, found: usize, expected: usize) -> Result<()> {
    match found == expected {
        true => Ok(()),
        false => Err(Error::FailedPrecondition(format!(
            "an expert server answered {found} elements for expert {expert}, not {expected}"
        ))),
    }
}
