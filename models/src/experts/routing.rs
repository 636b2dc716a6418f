//! What the router of a layer made of the tokens of a pass.

use candle_core::Tensor;
use candle_kernels_cpu::{Choice, ExpertGroups, Router};

use crate::config::ExpertsConfig;
use crate::error::Result;
use crate::ops::storage::with_slice;

/// One of the experts that a token goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenRoute {
    /// Position of the token, from 0.
    pub position: usize,
    /// Number of the layer, from 0.
    pub layer: usize,
    /// Its place among the token's experts, from 0, the best first.
    pub rank: usize,
    /// Number of the expert, from 0.
    pub expert: u32,
    /// The factor of its output.
    pub gate: f32,
}

/// The switches of a router.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Switches {
    /// Added to the scores for the choice alone, `[experts]`.
    pub(crate) bias: Vec<f32>,
    /// 1 for experts that may be chosen, `[experts]`.
    pub(crate) enabled: Vec<f32>,
}

impl Switches {
    /// From the parameter `[2, experts]`.
    pub(crate) fn read(switches: &Tensor) -> Result<Self> {
        let mut values: Vec<f32> = switches.flatten_all()?.to_vec1()?;
        let enabled = values.split_off(values.len() / 2);
        Ok(Self { bias: values, enabled })
    }

    /// The router that they belong to.
    pub(crate) fn router(&self, experts: &ExpertsConfig) -> Router<'_> {
        Router {
            per_token: experts.per_token,
            normalize: experts.normalize,
            bias: &self.bias,
            enabled: &self.enabled,
        }
    }
}

/// Where the tokens of a pass go in one layer.
#[derive(Clone, Debug)]
pub(crate) struct Routing {
    /// The switches that were in force.
    pub(crate) switches: Switches,
    /// Scores of the experts, `[tokens, experts]`.
    pub(crate) scores: Vec<f32>,
    /// The experts chosen, `[tokens, per_token]`, the best first.
    pub(crate) chosen: Vec<u32>,
    /// Their gates, `[tokens, per_token]`.
    pub(crate) gates: Vec<f32>,
    /// The tokens by expert.
    pub(crate) groups: ExpertGroups,
}

impl Routing {
    /// Routes by `scores` `[tokens, experts]`. `kept` may say for each place of the choice `[tokens, per_token]` whether the
    /// expert has room for it.
    pub(crate) fn new(
        experts: &ExpertsConfig,
        switches: Switches,
        scores: &Tensor,
        kept: impl FnOnce(&[u32]) -> Option<Vec<bool>>,
    ) -> Result<Self> {
        let scores = match crate::ops::storage::is_cpu(scores) {
            true => with_slice(scores, <[f32]>::to_vec)?,
            false => scores.flatten_all()?.to_vec1()?,
        };
        let places = scores.len() / experts.experts * experts.per_token;
        let (mut chosen, mut gates) = (vec![0; places], vec![0.0; places]);
        candle_kernels_cpu::route(switches.router(experts), &scores, &mut chosen, &mut gates);
        let kept = kept(&chosen);
        let groups = ExpertGroups::new(&chosen, experts.per_token, experts.experts, kept.as_deref());
        Ok(Self {
            switches,
            scores,
            chosen,
            gates,
            groups,
        })
    }

    /// The experts of the tokens, the first of which has the position `first`, in layer number `layer`.
    pub(crate) fn routes(&self, first: usize, layer: usize, per_token: usize) -> impl Iterator<Item = TokenRoute> + '_ {
        let places = self.chosen.iter().zip(&self.gates).enumerate();
        places.map(move |(place, (expert, gate))| TokenRoute {
            position: first + place / per_token,
            layer,
            rank: place % per_token,
            expert: *expert,
            gate: *gate,
        })
    }

    /// What was chosen.
    pub(crate) fn choice(&self) -> Choice<'_> {
        Choice {
            scores: &self.scores,
            chosen: &self.chosen,
            gates: &self.gates,
        }
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        4 * (self.scores.len() + 4 * self.chosen.len()) as u64
    }
}
