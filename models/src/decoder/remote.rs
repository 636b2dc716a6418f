//! Experts of which other servers compute some.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Decoder, ExpertGradient, Layer};
use crate::error::{Error, Result};
use crate::ops::storage::with_slice;

/// The rows of one expert, `[rows, width]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertRows {
    /// Number of the expert.
    pub expert: usize,
    /// The elements of the rows.
    pub rows: Vec<f32>,
}

/// The rows of one expert on the way back.
#[derive(Clone, Debug, PartialEq)]
pub struct GatedRows {
    /// Number of the expert.
    pub expert: usize,
    /// Its rows, `[rows, width]`.
    pub rows: Vec<f32>,
    /// What its outputs were multiplied by, `[rows]`.
    pub gates: Vec<f32>,
    /// The gradient of the products, `[rows, width]`.
    pub gradient: Vec<f32>,
}

/// Whose experts are asked for.
#[derive(Clone, Copy, Debug)]
pub struct ExpertsCall<'a> {
    /// The decoder whose weights they have.
    pub decoder: &'a Decoder,
    /// Number of the layer.
    pub layer: usize,
    /// In training, what products read: f32, f16 or bf16. None in inference, whose products read weights as they are held.
    pub products: Option<DType>,
}

/// What is under way on other servers: waits for the results, in the order in which they were asked for. Ends with
/// [`Error::Cancelled`] soon after the function that it is given returns true.
pub type Pending<'a, T> = Box<dyn FnOnce(&dyn Fn() -> bool) -> Result<T> + 'a>;

/// Other servers, which compute some of the experts with the decoder's weights.
pub trait RemoteExperts: Debug + Send + Sync {
    /// Whether an expert is computed elsewhere.
    fn holds(&self, expert: usize) -> bool;

    /// Sends rows on their way to their experts, each group to one that is held elsewhere. Gives the outputs, as many rows
    /// as were sent.
    ///
    /// # Errors
    /// Of a server that cannot be reached, naming it; here or of what is returned.
    fn forward<'a>(&self, call: ExpertsCall<'a>, groups: Vec<ExpertRows>) -> Result<Pending<'a, Vec<Vec<f32>>>>;

    /// Sends rows on the way back through their experts, each group to one that is held elsewhere.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn backward<'a>(&self, call: ExpertsCall<'a>, groups: Vec<GatedRows>) -> Result<Pending<'a, Vec<ExpertGradient>>>;
}

impl Decoder {
    /// Lets other servers compute some of its experts, with the weights that it has at the time.
    pub fn set_remote_experts(&mut self, remote: Option<Arc<dyn RemoteExperts>>) {
        self.remote = remote;
    }

    /// Whether other servers compute some of its experts.
    pub fn has_remote_experts(&self) -> bool {
        self.remote.is_some()
    }

    /// The servers that compute some of its experts, if any.
    pub(crate) fn remote_experts(&self) -> Option<&dyn RemoteExperts> {
        self.remote.as_deref()
    }

    /// What experts of layer number `layer` make of rows, here.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] for a decoder without experts, [`Error::InvalidArgument`] for a layer or an expert that
    /// it does not have, and for what are no rows of its width.
    pub fn expert_outputs(&self, layer: usize, groups: &[ExpertRows]) -> Result<Vec<Vec<f32>>> {
        let (experts, width) = (self.experts_config()?.experts, self.config.width);
        let refuse = |message: String| Err(Error::InvalidArgument(message));
        let Some(layer) = self.layout.layers.get(layer) else {
            return refuse(format!("there is no layer {layer}"));
        };
        let mut outputs = Vec::with_capacity(groups.len());
        for group in groups {
            if group.expert >= experts {
                return refuse(format!("there is no expert {}", group.expert));
            }
            if group.rows.is_empty() || !group.rows.len().is_multiple_of(width) {
                return refuse(format!(
                    "{} elements are not rows of the width {width}",
                    group.rows.len()
                ));
            }
            let rows = group.rows.len() / width;
            let x = Tensor::from_slice(&group.rows, (rows, width), &self.device)?;
            let bounds: Vec<usize> = (0..=experts)
                .map(|expert| if expert > group.expert { rows } else { 0 })
                .collect();
            outputs.push(self.run_experts(layer, &x, &bounds)?.flatten_all()?.to_vec1()?);
        }
        Ok(outputs)
    }

    /// [`run_experts`](Self::run_experts), some of them on other servers while the others are computed here.
    pub(super) fn run_experts_everywhere(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        bounds: &[usize],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Tensor> {
        let Some(remote) = &self.remote else {
            return self.run_experts(layer, x, bounds);
        };
        let (rows, width) = x.dims2()?;
        let elements = x.to_device(&Device::Cpu)?;
        let (mut away, mut here, mut here_bounds) = (Vec::new(), Vec::new(), vec![0]);
        with_slice(&elements, |elements| {
            for (expert, bounds) in bounds.windows(2).enumerate() {
                let part = &elements[bounds[0] * width..bounds[1] * width];
                if part.is_empty() || !remote.holds(expert) {
                    here.extend_from_slice(part);
                } else {
                    let rows = part.to_vec();
                    away.push(ExpertRows { expert, rows });
                }
                here_bounds.push(here.len() / width);
            }
        })?;
        if away.is_empty() {
            return self.run_experts(layer, x, bounds);
        }
        let asked: Vec<(usize, usize)> = away.iter().map(|group| (group.expert, group.rows.len())).collect();
        let call = ExpertsCall {
            decoder: self,
            layer: index,
            products: None,
        };
        let pending = remote.forward(call, away)?;
        let own = match here.len() / width {
            0 => Vec::new(),
            rows => {
                let x = Tensor::from_vec(here, (rows, width), &Device::Cpu)?.to_device(x.device())?;
                self.run_experts(layer, &x, &here_bounds)?.flatten_all()?.to_vec1()?
            }
        };
        let mut outputs = asked.into_iter().zip(pending(cancelled)?).peekable();
        let mut all = Vec::with_capacity(rows * width);
        for (expert, bounds) in here_bounds.windows(2).enumerate() {
            all.extend_from_slice(&own[bounds[0] * width..bounds[1] * width]);
            if let Some(((_, length), output)) = outputs.next_if(|((other, _), _)| *other == expert) {
                if output.len() != length {
                    return Err(Error::FailedPrecondition(format!(
                        "an expert server answered {} elements for expert {expert}, not {length}",
                        output.len()
                    )));
                }
                all.extend_from_slice(&output);
            }
        }
        Ok(Tensor::from_vec(all, (rows, width), &Device::Cpu)?.to_device(x.device())?)
    }
}
