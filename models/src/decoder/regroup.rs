//! Letting layers share their parameters, and ending that.

use std::collections::HashMap;

use super::expert_weights::ExpertDigests;
use super::layout::lay_out;
use super::{Decoder, ParameterId};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

impl Decoder {
    /// A decoder whose layers share their parameters in `groups` groups ([`DecoderConfig::groups`]), and for each of its
    /// parameters the one of this decoder that it was copied from: that which the first layer of its group uses here. No
    /// storage is shared.
    ///
    /// With as many groups as layers every layer gets a copy of its own, so that the decoder computes the same.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a number of groups that is not from 1 to the number of layers, and
    /// [`Error::Unsupported`] for an adapted decoder.
    pub fn regrouped(&self, groups: usize) -> Result<(Self, Vec<ParameterId>)> {
        if self.is_adapted() {
            return Err(Error::Unsupported(
                "layers of an adapted model cannot share parameters".into(),
            ));
        }
        let config = DecoderConfig {
            groups,
            ..self.config.clone()
        };
        config.validate()?;
        let (mut parameters, layout) = lay_out(&config);
        let own = self.parameters.iter().enumerate();
        let own = own.map(|(index, info)| (info.name.clone(), ParameterId(index)));
        let present: HashMap<String, ParameterId> = own.chain(self.shared_names()).collect();
        let mut sources = Vec::with_capacity(parameters.len());
        let mut weights = Vec::with_capacity(parameters.len());
        for info in &mut parameters {
            let missing = || Error::NotFound(format!("no layer has the parameter `{}`", info.name));
            let source = *present.get(&info.name).ok_or_else(missing)?;
            let held = &self.parameters[source.0];
            (info.dtype, info.trainable) = (held.dtype, held.trainable);
            weights.push(self.weights[source.0].deep_copy()?);
            sources.push(source);
        }
        let decoder = Self {
            config,
            device: self.device.clone(),
            parameters,
            weights,
            layout,
            inverse_frequencies: self.inverse_frequencies.clone(),
            attention_layouts: self.attention_layouts.clone(),
            adapted: None,
            remote: None,
            expert_digests: ExpertDigests::default(),
        };
        Ok((decoder, sources))
    }
}
