//! Experts that this server computes for another one, which holds the same model and may train it: with the model's own
//! weights, or with weights that were lent. Nothing here belongs to the state of the model: it is not staged, logged or
//! saved, and a server that has lost it asks for it again.

use std::collections::{HashMap, VecDeque};

use candle_models::{DType, ExpertDigest, ExpertGradient, ExpertRows, ExpertWeights, WeightType};

use super::state::Owner;
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// Weights of one expert that are kept: what two servers lend in turn, or one before and after a step.
const KEPT: usize = 2;

/// Weights that other servers have lent, by layer and expert; those that were used last come first.
#[derive(Default)]
pub(super) struct LentExperts(HashMap<(u32, u32), VecDeque<Lent>>);

struct Lent {
    digest: ExpertDigest,
    weights: ExpertWeights,
    _memory: Reservation,
}

/// A request to run experts of a layer on rows.
pub(crate) struct ForwardCall {
    pub(crate) layer: u32,
    /// The rows of each expert, and which weights it is to have; none for the model's own.
    pub(crate) groups: Vec<(ExpertRows, Option<ExpertDigest>)>,
    /// None in inference.
    pub(crate) products: Option<DType>,
}

/// A request to run an expert on rows and back.
pub(crate) struct BackwardCall {
    pub(crate) layer: u32,
    pub(crate) expert: u32,
    pub(crate) weights: Option<ExpertDigest>,
    pub(crate) products: DType,
    pub(crate) rows: Vec<f32>,
    pub(crate) gates: Vec<f32>,
    pub(crate) gradient: Vec<f32>,
}

/// Weights to be kept.
pub(crate) struct Loan {
    pub(crate) layer: u32,
    pub(crate) expert: u32,
    pub(crate) digest: ExpertDigest,
    /// Of each part.
    pub(crate) types: [WeightType; 2],
    /// Gate and up projection, and the down projection.
    pub(crate) data: [Vec<u8>; 2],
    pub(crate) memory: Reservation,
}

/// What came of a request.
pub(crate) enum Computed<T> {
    Done(T),
    /// Experts whose weights have to be lent first.
    Missing(Vec<u32>),
}

/// Whose weights an expert has.
enum Place {
    Own,
    Lent,
    Nowhere,
}

impl Owner {
    /// What experts make of rows that another server sent. Ends with `Cancelled` soon after `cancelled` returns true.
    ///
    /// # Errors
    /// `Precondition` for a model without experts, or one whose experts live on other servers themselves: two that wait for
    /// each other would wait for ever. `InvalidArgument` for a layer or an expert that there is not, and for what are no rows.
    pub(crate) fn forward_experts(
        &mut self,
        call: &ForwardCall,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Computed<Vec<Vec<f32>>>> {
        self.check_serves_experts()?;
        let mut missing = Vec::new();
        for (group, weights) in &call.groups {
            let expert = group.expert as u32;
            self.check_rows(call.layer, expert, &group.rows)?;
            if let Place::Nowhere = self.place(call.layer, expert, weights.as_ref())? {
                missing.push(expert);
            }
        }
        if !missing.is_empty() {
            return Ok(Computed::Missing(missing));
        }
        let layer = call.layer as usize;
        let mut outputs = Vec::with_capacity(call.groups.len());
        for (group, weights) in &call.groups {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let place = self.place(call.layer, group.expert as u32, weights.as_ref())?;
            outputs.push(match (place, call.products) {
                (Place::Own, None) => {
                    let outputs = self.model.decoder.expert_outputs(layer, std::slice::from_ref(group))?;
                    outputs.into_iter().next().unwrap_or_default()
                }
                (place, products) => {
                    let weights = self.expert_at(place, call.layer, group.expert as u32)?;
                    match products {
                        None => weights.infer(&group.rows)?,
                        Some(products) => weights.forward(&group.rows, products)?,
                    }
                }
            });
        }
        Ok(Computed::Done(outputs))
    }

    /// The gradients of an expert and of rows that another server sent.
    ///
    /// # Errors
    /// As [`forward_experts`](Self::forward_experts).
    pub(crate) fn backward_expert(&mut self, call: &BackwardCall) -> Result<Computed<ExpertGradient>> {
        self.check_serves_experts()?;
        self.check_rows(call.layer, call.expert, &call.rows)?;
        match self.place(call.layer, call.expert, call.weights.as_ref())? {
            Place::Nowhere => Ok(Computed::Missing(vec![call.expert])),
            place => {
                let weights = self.expert_at(place, call.layer, call.expert)?;
                let gradient = weights.backward(&call.rows, &call.gates, &call.gradient, call.products)?;
                Ok(Computed::Done(gradient))
            }
        }
    }

    /// Keeps weights that another server lends.
    ///
    /// # Errors
    /// `Precondition` and `InvalidArgument` as [`forward_experts`](Self::forward_experts), and for weights that are not those
    /// of the digest.
    pub(crate) fn lend_expert(&mut self, loan: Loan) -> Result<()> {
        self.check_serves_experts()?;
        self.check_expert(loan.layer, loan.expert)?;
        let [up, down] = &loan.data;
        let weights = ExpertWeights::from_bytes(&self.model.decoder, loan.types, [up, down])?;
        if weights.digest()? != loan.digest {
            return Err(Error::invalid("the weights of the expert are not those of the digest"));
        }
        let kept = self.lent.0.entry((loan.layer, loan.expert)).or_default();
        kept.retain(|lent| lent.digest != loan.digest);
        kept.push_front(Lent {
            digest: loan.digest,
            weights,
            _memory: loan.memory,
        });
        kept.truncate(KEPT);
        Ok(())
    }

    /// Finds the weights that an expert is to have; where they were lent, they are the first from now on.
    fn place(&mut self, layer: u32, expert: u32, digest: Option<&ExpertDigest>) -> Result<Place> {
        let Some(digest) = digest else { return Ok(Place::Own) };
        let own = self.model.decoder.expert_digest(layer as usize, expert as usize)?;
        if own == *digest {
            return Ok(Place::Own);
        }
        let kept = self.lent.0.get_mut(&(layer, expert));
        let found = kept.and_then(|kept| {
            let index = kept.iter().position(|lent| lent.digest == *digest)?;
            let lent = kept.remove(index)?;
            kept.push_front(lent);
            Some(())
        });
        Ok(found.map_or(Place::Nowhere, |()| Place::Lent))
    }

    /// The weights that [`place`](Self::place) has found.
    fn expert_at(&self, place: Place, layer: u32, expert: u32) -> Result<ExpertWeights> {
        let lent = self.lent.0.get(&(layer, expert)).and_then(VecDeque::front);
        match (place, lent) {
            (Place::Own, _) => Ok(self.model.decoder.expert_weights(layer as usize, expert as usize)?),
            (Place::Lent, Some(lent)) => Ok(lent.weights.clone()),
            _ => Err(Error::Internal(format!("the weights of expert {expert} are lost"))),
        }
    }

    fn check_serves_experts(&self) -> Result<()> {
        self.expert_count()?;
        if !self.model.decoder.has_remote_experts() {
            return Ok(());
        }
        Err(Error::Precondition {
            message: format!("model \"{}\" has \"expert_servers\" of its own", self.shared.name),
            hint: "Send rows to a server whose model has no expert_servers.",
        })
    }

    fn check_rows(&self, layer: u32, expert: u32, rows: &[f32]) -> Result<()> {
        self.check_expert(layer, expert)?;
        let width = self.shared.decoder_config.width;
        match !rows.is_empty() && rows.len().is_multiple_of(width) {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "{} elements are not rows of the width {width}",
                rows.len()
            ))),
        }
    }
}
