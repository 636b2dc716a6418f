//! A decoder from the tensors of a file. Names and shapes are checked before any tensor is read.

use super::build::dense;
use super::fused_experts::{ExpertTensors, FusedExperts};
use super::initialize::default_switches;
use super::layout::shared_names;
use super::names::ignored_tensor;
use super::{Decoder, ParameterInfo, Weight, WeightType, check_memory};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::formats::{Orientation, StoredTensor, TensorData, TensorSource};
use candle_core::{DType, Device};
use std::collections::HashSet;

/// Tensors that may be there although no parameter is called so: a copy of the tied head, and the rotary factors of a
/// GGUF file, which belong to the configuration.
const TIED_HEAD: &str = "lm_head.weight";
const ROTARY_FACTORS: &str = "rope_freqs.weight";

/// Loads a decoder of that configuration. Matrices are converted to `kind` if one is given.
///
/// Fails with [`Error::InvalidFile`], naming the tensor, when one is missing, has another shape than the configuration
/// says, or is not part of the configuration; with [`Error::ResourceExhausted`] when the memory is too small.
pub fn load_decoder(
    config: DecoderConfig,
    source: &dyn TensorSource,
    device: &Device,
    kind: Option<WeightType>,
) -> Result<Decoder> {
    let experts = config.experts.as_ref();
    let tensors = experts.map(|experts| ExpertTensors::new(source, experts.experts));
    let tensors = tensors.transpose()?;
    let source: &dyn TensorSource = &FusedExperts::new(source, tensors.as_ref());
    let per_token = config.experts.as_ref().map_or(0, |experts| experts.per_token);
    let parameters = check_source(&config, source)?;
    check_memory(
        "the model",
        parameters.iter().map(|info| held_bytes(info, source, kind)).sum(),
    )?;
    Decoder::build(config, device, kind, |info| {
        if is_optional(info, source) {
            return dense(default_switches(info), info.held_shape());
        }
        let stored = source.load(&info.name)?;
        if !info.is_listed() {
            check_switches(info, per_token, &stored, source)?;
        }
        as_held(info, stored)
    })
}

/// Refuses switches of a router that leave fewer experts enabled than a token goes to.
fn check_switches(
    info: &ParameterInfo,
    per_token: usize,
    stored: &StoredTensor,
    source: &dyn TensorSource,
) -> Result<()> {
    let TensorData::Dense(values) = &stored.data else {
        return Err(Error::invalid_file(
            source.path(),
            format!("tensor `{}` is quantised", info.name),
        ));
    };
    let values: Vec<f32> = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let enabled = values[values.len() / 2..].iter().filter(|enabled| **enabled != 0.0);
    match enabled.count() {
        enabled if enabled >= per_token => Ok(()),
        enabled => {
            let reason = format!(
                "tensor `{}` enables {enabled} experts where a token goes to {per_token}",
                info.name
            );
            Err(Error::invalid_file(source.path(), reason))
        }
    }
}

/// The parameters of a configuration, once `source` is known to have each in its shape, and no others.
///
/// Fails with [`Error::InvalidFile`], naming the tensor.
pub(crate) fn check_source(config: &DecoderConfig, source: &dyn TensorSource) -> Result<Vec<ParameterInfo>> {
    config.validate()?;
    let parameters = Decoder::parameters_of(config);
    for info in parameters.iter().filter(|info| !is_optional(info, source)) {
        check_stored(info, source)?;
    }
    refuse_unknown(config, &parameters, source)?;
    Ok(parameters)
}

/// Whether a parameter is the switches of a router, which only our own files have.
fn is_optional(info: &ParameterInfo, source: &dyn TensorSource) -> bool {
    !info.is_listed() && source.shape(&info.name).is_none()
}

fn check_stored(info: &ParameterInfo, source: &dyn TensorSource) -> Result<()> {
    let expected = match source.orientation() {
        Orientation::AsTransformers => info.shape.clone(),
        Orientation::OutIn => info.held_shape(),
    };
    let reason = match source.shape(&info.name) {
        Some(found) if found == expected => return Ok(()),
        Some(found) => {
            format!(
                "tensor `{}` has shape {found:?} where the configuration expects {expected:?}",
                info.name
            )
        }
        None => format!("tensor `{}` of shape {expected:?} is missing", info.name),
    };
    Err(Error::invalid_file(source.path(), reason))
}

fn refuse_unknown(config: &DecoderConfig, parameters: &[ParameterInfo], source: &dyn TensorSource) -> Result<()> {
    let known: HashSet<&str> = parameters.iter().map(|info| info.name.as_str()).collect();
    let shared: HashSet<String> = shared_names(config, parameters)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let allowed = |name: &str| {
        known.contains(name)
            || shared.contains(name)
            || ignored_tensor(name)
            || (name == TIED_HEAD && config.tied_head)
            || name == ROTARY_FACTORS
    };
    match source.names().into_iter().find(|name| !allowed(name)) {
        None => Ok(()),
        Some(name) => Err(Error::invalid_file(
            source.path(),
            format!(
                "tensor `{name}` is not a parameter of a `{}` of this configuration",
                config.architecture.name()
            ),
        )),
    }
}

/// Bytes that a parameter will take, with room for the widest form it passes through.
fn held_bytes(info: &ParameterInfo, source: &dyn TensorSource, kind: Option<WeightType>) -> u64 {
    let elements = info.elements() as u64;
    match kind {
        _ if !info.role.is_matrix() => 4 * elements,
        None => source.bytes(&info.name),
        Some(WeightType::F32) => 4 * elements,
        Some(WeightType::F16 | WeightType::Bf16) => 2 * elements,
        Some(WeightType::Quantized(quantized)) => {
            elements.div_ceil(quantized.block_size() as u64) * quantized.type_size() as u64
        }
    }
}

fn as_held(info: &ParameterInfo, stored: StoredTensor) -> Result<Weight> {
    match (stored.data, stored.orientation, info.transposed) {
        (TensorData::Dense(tensor), Orientation::AsTransformers, true) => Weight::dense(&tensor.t()?),
        (TensorData::Dense(tensor), _, _) => Weight::dense(&tensor.reshape(info.held_shape())?),
        (TensorData::Quantized(tensor), Orientation::OutIn, _) => Weight::quantized(tensor),
        (TensorData::Quantized(tensor), Orientation::AsTransformers, false) => Weight::quantized(tensor),
        (TensorData::Quantized(_), Orientation::AsTransformers, true) => Err(Error::Unsupported(format!(
            "`{}`: quantised [in, out] matrices are not supported",
            info.name
        ))),
    }
}
