//! A decoder whose weights are another one's, shared, with an adapter's low-rank matrices beside them.

use std::ops::Range;

use super::expert_weights::ExpertDigests;
use super::layout::Layer;
use super::{Decoder, LowRank, ParameterId, ParameterInfo, ParameterRole, Weight};
use crate::adapters::LoraConfig;
use crate::error::{Error, Result};

/// What makes a decoder an adapted one.
#[derive(Debug, Clone)]
pub(super) struct Adapted {
    /// Number of parameters of the base; the adapter's follow them.
    base: usize,
    /// The adapted matrices in the order of the base's parameters.
    modules: Vec<(ParameterId, LowRank)>,
    /// Whether the adapter has been added to the base, so that it must not be added again.
    merged: bool,
    config: LoraConfig,
}

/// The low-rank factors of one matrix of the base.
#[derive(Clone)]
pub(crate) struct Factors {
    /// The matrix.
    pub(crate) matrix: ParameterId,
    /// Name of `A`.
    pub(crate) a_name: String,
    /// `A`, `[rank, in]` f32.
    pub(crate) a: Weight,
    /// Name of `B`.
    pub(crate) b_name: String,
    /// `B`, `[out, rank]` f32.
    pub(crate) b: Weight,
}

impl Decoder {
    /// A decoder that shares the weights of this one: where these are changed in place, both are.
    pub fn share(&self) -> Self {
        Self {
            config: self.config.clone(),
            device: self.device.clone(),
            parameters: self.parameters.clone(),
            weights: self.weights.clone(),
            layout: self.layout.clone(),
            inverse_frequencies: self.inverse_frequencies.clone(),
            attention_layouts: self.attention_layouts.clone(),
            adapted: self.adapted.clone(),
            // The weights may change under it, which it would not notice: it computes its experts itself.
            remote: None,
            expert_digests: ExpertDigests::default(),
        }
    }

    /// A decoder with the weights of this one, which it shares, and `scale * B A` added to the matrices that `factors`
    /// name. Only the factors are its own: they are what it counts, reads, writes and trains.
    pub(crate) fn with_low_rank(&self, factors: Vec<Factors>, config: LoraConfig) -> Result<Self> {
        if self.is_adapted() {
            return Err(Error::Unsupported("an adapter of an adapter is not supported".into()));
        }
        if !self.shared_names().is_empty() {
            let message = "a model whose layers share parameters takes no adapters: PEFT has no file for them";
            return Err(Error::Unsupported(message.into()));
        }
        let mut decoder = self.share();
        let frozen = decoder.parameters.iter_mut();
        frozen.for_each(|parameter| parameter.trainable = false);
        let (scale, dropout) = (config.scale() as f32, config.dropout as f32);
        let mut modules = Vec::with_capacity(factors.len());
        for factor in factors {
            let a = decoder.push_low_rank(factor.a_name, factor.a);
            let b = decoder.push_low_rank(factor.b_name, factor.b);
            let low_rank = LowRank { a, b, scale, dropout };
            modules.push((factor.matrix, low_rank));
        }
        decoder.set_low_rank(&modules);
        decoder.adapted = Some(Adapted {
            base: self.parameters.len(),
            modules,
            merged: false,
            config,
        });
        Ok(decoder)
    }

    fn push_low_rank(&mut self, name: String, weight: Weight) -> ParameterId {
        self.parameters.push(ParameterInfo {
            name,
            shape: weight.dims().to_vec(),
            transposed: false,
            role: ParameterRole::LowRank,
            dtype: weight.kind().name(),
            trainable: true,
        });
        self.weights.push(weight);
        ParameterId(self.weights.len() - 1)
    }

    /// Puts low-rank matrices over the projections, and takes those away that are not named.
    fn set_low_rank(&mut self, modules: &[(ParameterId, LowRank)]) {
        let projections = self.layout.layers.iter_mut().flat_map(Layer::projections_mut);
        for projection in projections {
            let found = modules.iter().find(|(matrix, _)| *matrix == projection.weight);
            projection.low_rank = found.map(|(_, low_rank)| *low_rank);
        }
    }

    /// Whether its weights are another decoder's, with an adapter's beside them.
    pub fn is_adapted(&self) -> bool {
        self.adapted.is_some()
    }

    /// What its adapter is made of; none without one.
    pub fn lora_config(&self) -> Option<&LoraConfig> {
        self.adapted.as_ref().map(|adapted| &adapted.config)
    }

    /// Whether its adapter has been added to the base's weights, so that it adds nothing any more.
    pub fn is_merged(&self) -> bool {
        self.adapted.as_ref().is_some_and(|adapted| adapted.merged)
    }

    /// Says that the adapter has been added to the base's weights. Without an adapter nothing happens.
    pub fn set_merged(&mut self) {
        if let Some(adapted) = &mut self.adapted {
            adapted.merged = true;
            self.set_low_rank(&[]);
        }
    }

    /// The parameters that are its own, by number: all, or an adapter's.
    pub fn own_parameters(&self) -> Range<usize> {
        self.adapted.as_ref().map_or(0, |adapted| adapted.base)..self.parameters.len()
    }

    /// The adapted matrices with their low-rank factors; none without an adapter.
    pub(crate) fn adapted_modules(&self) -> &[(ParameterId, LowRank)] {
        self.adapted.as_ref().map_or(&[], |adapted| &adapted.modules)
    }

    /// Shares the present weights and attention layouts of the base, which may have been trained or replaced since.
    ///
    /// Fails with [`Error::InvalidArgument`] when `base` has other parameters than the base that it was made for.
    pub fn share_base(&mut self, base: &Self) -> Result<()> {
        let own = self.own_parameters().start;
        let same = |(held, base): (&ParameterInfo, &ParameterInfo)| held.name == base.name && held.shape == base.shape;
        let held = &mut self.parameters[..own];
        if own != base.parameters.len() || !held.iter().zip(&base.parameters).all(same) {
            return Err(Error::InvalidArgument("the base has other parameters".into()));
        }
        for (held, base) in held.iter_mut().zip(&base.parameters) {
            held.dtype = base.dtype;
        }
        self.weights[..own].clone_from_slice(&base.weights);
        self.attention_layouts = base.attention_layouts.clone();
        Ok(())
    }
}
