//! The mixture of experts of inference.

use std::ops::Range;

use super::forward::Beside;
use super::{Decoder, ExpertLayer, FeedForward, Layer};
use crate::error::Result;
use crate::experts::{Routing, Switches, TokenRoute};
use crate::ops::activation;
use crate::ops::backward::{add_in_place, gather_rows};
use crate::ops::experts::{combine, grouped_linear, sigmoid_rows};
use candle_core::Tensor;

impl FeedForward {
    /// Of the experts' matrices together: rows of the gate, the up and the down projection of expert `expert`, whose inner
    /// layer is `inner` wide.
    pub(crate) fn expert_rows(&self, expert: usize, inner: usize, width: usize) -> [Range<usize>; 3] {
        let start = 2 * inner * expert;
        [
            start..start + inner,
            start + inner..start + 2 * inner,
            width * expert..width * (expert + 1),
        ]
    }
}

impl Decoder {
    /// What a layer's experts make of `normalized` `[rows, width]`, added with their gates; and the shared expert. A row's
    /// result does not depend on the other rows: every expert has room for all of them.
    pub(super) fn mix_experts(
        &self,
        index: usize,
        layer: &Layer,
        experts: &ExpertLayer,
        normalized: &Tensor,
        beside: &Beside<'_>,
    ) -> Result<Tensor> {
        let routing = self.routing(experts, normalized)?;
        if let Some(observer) = beside.routings {
            observer.borrow_mut().push(routing.clone());
        }
        let x = gather_rows(normalized, &routing.groups.tokens)?;
        let y = self.run_experts_everywhere(index, layer, &x, &routing.groups.bounds, beside.cancelled)?;
        let output = combine(&routing.groups, &y, Some(&routing.gates), normalized)?;
        if let Some(shared) = &experts.shared {
            let own = self.network(shared, normalized, beside)?;
            let own = match &experts.shared_gate {
                Some(gate) => sigmoid_rows(&own, &self.project(normalized, gate)?)?,
                None => own,
            };
            add_in_place(&output, &own)?;
        }
        Ok(output)
    }

    /// Which experts each token of a sequence goes to, by position, layer and rank. Ends with
    /// [`Error::Cancelled`](crate::Error::Cancelled) soon after `cancelled` returns true; fails as
    /// [`forward`](Self::forward), and with [`Error::FailedPrecondition`](crate::Error::FailedPrecondition) for a decoder
    /// without experts.
    pub fn routes(&self, tokens: &[u32], cancelled: &dyn Fn() -> bool) -> Result<Vec<TokenRoute>> {
        const BLOCK: usize = 64;
        let per_token = self.experts_config()?.per_token;
        let mut cache = self.new_cache();
        self.check_tokens(tokens, cache.remaining())?;
        let mut routes = Vec::new();
        for (block, tokens) in tokens.chunks(BLOCK).enumerate() {
            if cancelled() {
                return Err(crate::Error::Cancelled);
            }
            let routings = self.routings(tokens, &mut cache, cancelled)?;
            for (layer, routing) in routings.iter().enumerate() {
                routes.extend(routing.routes(block * BLOCK, layer, per_token));
            }
        }
        routes.sort_by_key(|route| (route.position, route.layer, route.rank));
        Ok(routes)
    }

    /// Which experts the rows of `normalized` `[rows, width]` go to.
    pub(crate) fn routing(&self, experts: &ExpertLayer, normalized: &Tensor) -> Result<Routing> {
        let scores = self.project(normalized, &experts.router)?;
        let switches = Switches::read(self.weight(experts.switches).as_f32()?)?;
        Routing::new(self.experts_config()?, switches, &scores, |_| None)
    }

    /// The networks of the experts, on rows `[rows, width]` of which expert `e` has `bounds[e]..bounds[e + 1]`.
    pub(crate) fn run_experts(&self, layer: &Layer, x: &Tensor, bounds: &[usize]) -> Result<Tensor> {
        let (inner, width) = (self.config.feed_forward_width, self.config.width);
        let network = &layer.feed_forward;
        let rows = |matrix: usize| move |expert: usize| network.expert_rows(expert, inner, width)[matrix].clone();
        let up = self.weight(network.up.weight);
        let [gate, up] = grouped_linear(x, bounds, [(up, &rows(0)), (up, &rows(1))])?;
        let inner = activation::gate(&gate, &up, self.config.activation)?;
        let [y] = grouped_linear(&inner, bounds, [(self.weight(network.down.weight), &rows(2))])?;
        Ok(y)
    }

    /// The configuration of the experts. Fails for a decoder without.
    pub(crate) fn experts_config(&self) -> Result<&crate::config::ExpertsConfig> {
        let missing = || crate::Error::FailedPrecondition("the model has no experts".into());
        self.config.experts.as_ref().ok_or_else(missing)
    }
}
