//! Puts a decoder together from its parameters' values.

use super::expert_weights::ExpertDigests;
use super::layout::lay_out;
use super::{Decoder, ParameterInfo, Weight, WeightType};
use crate::attention_layouts::AttentionLayouts;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use candle_core::quantized::{QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

impl Decoder {
    /// Builds a decoder whose parameters come from `load`, one call for each in order.
    ///
    /// `load` returns the values in the orientation of [`ParameterInfo::held_shape`]. Matrices are converted to `kind`
    /// if one is given; vectors and positions always to f32. Fails with [`Error::InvalidArgument`] when a value's
    /// shape is not the configuration's.
    pub fn build(
        config: DecoderConfig,
        device: &Device,
        kind: Option<WeightType>,
        mut load: impl FnMut(&ParameterInfo) -> Result<Weight>,
    ) -> Result<Self> {
        config.validate()?;
        let (mut parameters, layout) = lay_out(&config);
        let mut weights = Vec::with_capacity(parameters.len());
        for info in &mut parameters {
            let weight = load(info)?;
            check_shape(info, weight.dims())?;
            let weight = match (info.role.is_matrix(), kind) {
                (false, _) => weight.convert(&info.name, WeightType::F32)?,
                (true, Some(kind)) => weight.convert(&info.name, kind)?,
                (true, None) => weight,
            };
            let weight = move_to(weight, device)?;
            info.dtype = weight.kind().name();
            weights.push(weight);
        }
        let inverse_frequencies = Self::inverse_frequencies_of(&config);
        Ok(Self {
            config,
            device: device.clone(),
            parameters,
            weights,
            layout,
            inverse_frequencies,
            attention_layouts: AttentionLayouts::default(),
            adapted: None,
            remote: None,
            expert_digests: ExpertDigests::default(),
        })
    }

    /// The parameters that a decoder of this configuration has, in transformers' order.
    pub fn parameters_of(config: &DecoderConfig) -> Vec<ParameterInfo> {
        lay_out(config).0
    }
}

fn check_shape(info: &ParameterInfo, found: &[usize]) -> Result<()> {
    let expected = info.held_shape();
    match expected == found {
        true => Ok(()),
        false => Err(Error::InvalidArgument(format!(
            "parameter `{}` has shape {found:?} (held [out, in]) where the configuration expects {expected:?}",
            info.name
        ))),
    }
}

fn move_to(weight: Weight, device: &Device) -> Result<Weight> {
    if weight.device().same_device(device) {
        return Ok(weight);
    }
    match weight {
        Weight::Dense(tensor) => Ok(Weight::Dense(tensor.to_device(device)?)),
        Weight::Quantized(tensor) => {
            let storage = QStorage::from_data(tensor.data()?, device, tensor.dtype())?;
            Ok(Weight::Quantized(Arc::new(QTensor::new(storage, tensor.shape())?)))
        }
    }
}

/// A weight of given f32 values, on the CPU.
pub(super) fn dense(values: Vec<f32>, shape: Vec<usize>) -> Result<Weight> {
    let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
    debug_assert_eq!(tensor.dtype(), DType::F32);
    Ok(Weight::Dense(tensor))
}
