//! The decoder's state: its configuration, its weights, and what is known of each.

use super::expert_weights::ExpertDigests;
use super::layout::shared_names;
use super::{Adapted, KeyValueCache, Layout, ParameterId, ParameterInfo, RemoteExperts, Weight, WeightType};
use crate::attention_layouts::{AttentionLayouts, FILE_NAME};
use crate::config::{DecoderConfig, Position};
use crate::error::{Error, Result};
use crate::ops::attention::AttentionShape;
use candle_core::Device;
use candle_kernels_cpu::AttentionMask;
use std::path::Path;
use std::sync::Arc;

/// A decoder-only transformer. Immutable while it is run; training changes the weights through
/// [`weight_mut`](Self::weight_mut).
///
/// Deliberately not `Clone`: a clone's tensors would share storage with the original's. See
/// [`deep_copy`](Self::deep_copy).
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    pub(super) device: Device,
    pub(super) parameters: Vec<ParameterInfo>,
    pub(super) weights: Vec<Weight>,
    pub(super) layout: Layout,
    /// Angle per position of each rotated pair of a head's elements, `[pairs]`; empty for learned positions.
    pub(super) inverse_frequencies: Vec<f32>,
    /// Which blocks each head sees.
    pub(super) attention_layouts: AttentionLayouts,
    /// Set where low-rank matrices of an adapter were put over another decoder's weights.
    pub(super) adapted: Option<Adapted>,
    /// Other servers that compute some of the experts.
    pub(super) remote: Option<Arc<dyn RemoteExperts>>,
    /// What tells the weights of its experts from others.
    pub(super) expert_digests: ExpertDigests,
}

impl Decoder {
    /// Its shape and kind.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What is known of each parameter, in transformers' order; [`ParameterId`] is the index.
    pub fn parameters(&self) -> &[ParameterInfo] {
        &self.parameters
    }

    /// The names under which transformers expects a parameter besides its own, because several layers share it.
    pub fn shared_names(&self) -> Vec<(String, ParameterId)> {
        shared_names(&self.config, &self.parameters)
    }

    /// Which parameters each part of the decoder uses.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Angle per position of each rotated pair of a head's elements, `[pairs]`; empty for learned positions.
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    /// Which blocks each head sees.
    pub fn attention_layouts(&self) -> &AttentionLayouts {
        &self.attention_layouts
    }

    /// Changes which blocks each head sees. Fails as [`AttentionLayouts::check`], and leaves them as they were.
    pub fn set_attention_layouts(&mut self, layouts: AttentionLayouts) -> Result<()> {
        layouts.check(&self.config)?;
        self.attention_layouts = layouts;
        Ok(())
    }

    /// As [`set_attention_layouts`](Self::set_attention_layouts) for layouts that the caller checks before the decoder runs.
    pub fn put_attention_layouts(&mut self, layouts: AttentionLayouts) {
        self.attention_layouts = layouts;
    }

    /// Takes the attention layouts from the document [`FILE_NAME`] of the model at `source`.
    ///
    /// Fails with [`Error::InvalidFile`] for a document that does not hold layouts of this model.
    pub(crate) fn load_attention_layouts(&mut self, source: &Path, document: &str) -> Result<()> {
        let layouts = AttentionLayouts::from_json(&self.config, document.as_bytes());
        let refuse = |error: Error| Error::invalid_file(source.join(FILE_NAME), error.to_string());
        self.attention_layouts = layouts.map_err(refuse)?;
        Ok(())
    }

    /// The heads of a layer, and what they see.
    pub(crate) fn attention_shape(&self, layer: usize) -> AttentionShape<'_> {
        let mask = AttentionMask {
            window: self.config.attention_pattern.window_of(layer),
            layouts: self.attention_layouts.layer(layer),
        };
        AttentionShape::of(&self.config, mask)
    }

    /// The values of a parameter.
    pub fn weight(&self, id: ParameterId) -> &Weight {
        &self.weights[id.0]
    }

    /// Whether a parameter is no part of transformers' model and has the value that it has when a file lacks it, so that
    /// files need not hold it.
    pub fn is_default(&self, id: ParameterId) -> Result<bool> {
        let info = &self.parameters[id.0];
        if info.is_listed() {
            return Ok(false);
        }
        let values: Vec<f32> = self.weights[id.0].to_f32()?.flatten_all()?.to_vec1()?;
        Ok(values == super::initialize::default_switches(info))
    }

    /// The values of a parameter, to be replaced or changed in place. The shape must stay.
    pub fn weight_mut(&mut self, id: ParameterId) -> &mut Weight {
        self.weights_change();
        &mut self.weights[id.0]
    }

    /// Forgets what was derived from the weights, which are about to change.
    pub(crate) fn weights_change(&mut self) {
        self.expert_digests.clear();
    }

    /// The number of its own parameter of that name. Fails with [`Error::NotFound`].
    pub fn parameter_id(&self, name: &str) -> Result<ParameterId> {
        let own = self.own_parameters();
        let index = self.parameters[own.clone()].iter().position(|info| info.name == name);
        index.map(|index| ParameterId(own.start + index)).ok_or_else(|| {
            let shown: String = name.chars().take(200).collect();
            Error::NotFound(format!("the model has no parameter `{shown}`"))
        })
    }

    /// Excludes a parameter from optimizer steps, or includes it again.
    pub fn set_trainable(&mut self, id: ParameterId, trainable: bool) {
        self.parameters[id.0].trainable = trainable;
    }

    /// Number of elements of its own parameters, tied ones counted once.
    pub fn parameter_count(&self) -> u64 {
        let own = &self.parameters[self.own_parameters()];
        let listed = own.iter().filter(|info| info.is_listed());
        listed.map(|info| info.elements() as u64).sum()
    }

    /// Bytes of its own weights.
    pub fn memory_bytes(&self) -> u64 {
        self.weights[self.own_parameters()].iter().map(Weight::bytes).sum()
    }

    /// The type that most of the weights are held in: `f32`, `q4_1`.
    pub fn dtype(&self) -> &'static str {
        let mut elements: Vec<(WeightType, usize)> = Vec::new();
        for weight in &self.weights {
            match elements.iter_mut().find(|(kind, _)| *kind == weight.kind()) {
                Some((_, count)) => *count += weight.elements(),
                None => elements.push((weight.kind(), weight.elements())),
            }
        }
        elements
            .iter()
            .max_by_key(|(_, count)| *count)
            .map_or("f32", |(kind, _)| kind.name())
    }

    /// An empty cache for one sequence, with pages of its own as f32. See [`PagePool`](super::PagePool) for shared ones.
    pub fn new_cache(&self) -> KeyValueCache {
        KeyValueCache::new(&self.config)
    }

    /// A decoder with the same weights. The storage of its own parameters is not shared.
    pub fn deep_copy(&self) -> Result<Self> {
        let own = self.own_parameters().start;
        let (shared, weights) = self.weights.split_at(own);
        let copies = weights.iter().map(Weight::deep_copy);
        Ok(Self {
            config: self.config.clone(),
            device: self.device.clone(),
            parameters: self.parameters.clone(),
            weights: shared.iter().cloned().map(Ok).chain(copies).collect::<Result<_>>()?,
            layout: self.layout.clone(),
            inverse_frequencies: self.inverse_frequencies.clone(),
            attention_layouts: self.attention_layouts.clone(),
            adapted: self.adapted.clone(),
            remote: self.remote.clone(),
            expert_digests: ExpertDigests::default(),
        })
    }

    /// Expands every weight to f32, which training needs. Fails with [`Error::ResourceExhausted`] when the memory is
    /// too small for it, and leaves the decoder as it was. Of an adapted decoder nothing is expanded: only what is f32
    /// already is trained.
    pub fn make_trainable(&mut self) -> Result<()> {
        if self.is_adapted() {
            return Ok(());
        }
        let held_otherwise = |weight: &&Weight| weight.kind() != WeightType::F32;
        let growth: u64 = self
            .weights
            .iter()
            .filter(held_otherwise)
            .map(|weight| 4 * weight.elements() as u64)
            .sum();
        super::check_memory("expanding the weights to f32", growth)?;
        let expanded: Vec<Weight> = self
            .weights
            .iter()
            .map(|weight| Ok(Weight::Dense(weight.to_f32()?)))
            .collect::<Result<_>>()?;
        self.weights_change();
        self.weights = expanded;
        for info in &mut self.parameters {
            info.dtype = WeightType::F32.name();
        }
        Ok(())
    }

    pub(super) fn inverse_frequencies_of(config: &DecoderConfig) -> Vec<f32> {
        match &config.position {
            Position::Learned => Vec::new(),
            Position::Rotary(rotary) => rotary.inverse_frequencies(),
        }
    }
}
