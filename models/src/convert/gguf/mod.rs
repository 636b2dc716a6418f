//! A GGUF file as llama.cpp's own converter makes it: names, metadata, tokenizer, and its order of query and key rows.

mod file;
mod metadata;
mod tokenizer;
mod vocabulary;

use candle_core::{Device, Tensor};

pub(super) use file::write;

use super::plan::{Conversion, PlannedTensor};
use crate::attention_layouts;
use crate::config::{Activation, Architecture, DecoderConfig, Position, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use crate::formats::gguf::gguf_name;
use crate::opened::OpenedModel;

/// llama.cpp's name of an architecture.
fn architecture_name(config: &DecoderConfig) -> Result<&'static str> {
    match config.architecture {
        Architecture::Gpt2 => Ok("gpt2"),
        // To llama.cpp a Mistral is a Llama.
        Architecture::Llama | Architecture::Mistral => Ok("llama"),
        Architecture::Qwen2 => Ok("qwen2"),
        Architecture::Mixtral => Ok("llama"),
        Architecture::Olmoe => Ok("olmoe"),
        Architecture::Qwen2Moe => Ok("qwen2moe"),
        other => Err(Error::Unsupported(format!(
            "gguf is written for gpt2, llama, mistral, qwen2, mixtral, olmoe and qwen2_moe, not for {}",
            other.name()
        ))),
    }
}

/// Refuses what GGUF's metadata has no key for: llama.cpp would compute something else.
pub(super) fn check(model: &OpenedModel) -> Result<()> {
    let config = &model.config;
    let name = architecture_name(config)?;
    let window = config.attention_pattern.window;
    if let Some(window) = window.filter(|window| *window < config.context_length) {
        return Err(Error::Unsupported(format!(
            "every layer of a {name} in a gguf file sees all tokens, this model has an attention window of {window}; convert \
             it to safetensors"
        )));
    }
    if model.files.document(attention_layouts::FILE_NAME)?.is_some() {
        return Err(Error::Unsupported(format!(
            "a {name} in a gguf file has no attention layouts, this model has; convert it to safetensors"
        )));
    }
    let expected = match config.architecture {
        Architecture::Gpt2 => Activation::GeluTanh,
        _ => Activation::Silu,
    };
    if config.activation != expected {
        return Err(Error::Unsupported(format!(
            "a {name} in a gguf file has the activation {}, this model has {}",
            expected.name(),
            config.activation.name()
        )));
    }
    let rotated = match &config.position {
        Position::Learned => config.head_dim,
        Position::Rotary(rotary) => rotary.dim,
    };
    if config.residual.is_parallel() || config.head_bias || rotated != config.head_dim {
        return Err(Error::Unsupported(format!(
            "a {name} in a gguf file has no parallel residual, no bias of its head, and rotates whole heads"
        )));
    }
    check_experts(config)
}

/// Refuses experts that llama.cpp would compute in another way.
fn check_experts(config: &DecoderConfig) -> Result<()> {
    let Some(experts) = &config.experts else { return Ok(()) };
    let shared = config.architecture == Architecture::Qwen2Moe;
    let normalize = config.architecture == Architecture::Mixtral;
    let name = config.architecture.name();
    if experts.normalize != normalize {
        let (gates, own) = match normalize {
            true => ("sum to 1", "do not"),
            false => ("do not sum to 1", "do"),
        };
        return Err(Error::Unsupported(format!(
            "the gates of a {name} in a gguf file {gates}, those of this model {own} (norm_topk_prob)"
        )));
    }
    if (experts.shared_width > 0, experts.shared_gate) != (shared, shared) {
        return Err(Error::Unsupported(format!(
            "a {name} in a gguf file has {}",
            if shared {
                "a shared expert with a gate"
            } else {
                "no shared expert"
            }
        )));
    }
    Ok(())
}

/// llama.cpp's name of a parameter.
pub(super) fn tensor_name(config: &DecoderConfig, name: &str) -> Result<String> {
    gguf_name(architecture_name(config)?, name).ok_or_else(|| {
        Error::Unsupported(format!(
            "gguf has no name for the parameter {name} of a {}",
            config.architecture.name()
        ))
    })
}

/// The divisors of rotary frequencies that llama.cpp reads from a tensor; `None` where metadata tells all.
fn rotary_factors(config: &DecoderConfig) -> Option<Vec<f32>> {
    let Position::Rotary(rotary) = &config.position else {
        return None;
    };
    match &rotary.scaling {
        RotaryScaling::None | RotaryScaling::Linear { .. } => None,
        RotaryScaling::Factors(factors) => Some(factors.clone()),
        RotaryScaling::Llama3 { .. } => {
            let plain = RotaryConfig {
                scaling: RotaryScaling::None,
                ..rotary.clone()
            };
            let (plain, scaled) = (plain.inverse_frequencies(), rotary.inverse_frequencies());
            Some(plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())
        }
    }
}

impl Conversion {
    /// A tensor held `[out, in]`, query and key rows of a `llama` interleaved for llama.cpp's rotary embedding: row
    /// `2 * i + half` of a head holds row `half * (head_dim / 2) + i`.
    fn read_for_gguf(&self, planned: &PlannedTensor) -> Result<Tensor> {
        let tensor = self.read(planned, true)?;
        let config = &self.model.config;
        let heads = match architecture_name(config)? {
            "llama" if planned.info.name.contains(".self_attn.q_proj.") => config.heads,
            "llama" if planned.info.name.contains(".self_attn.k_proj.") => config.key_value_heads,
            _ => return Ok(tensor),
        };
        let shape = tensor.dims().to_vec();
        let rest = tensor.elem_count() / (heads * config.head_dim);
        let ordered = tensor
            .to_device(&Device::Cpu)?
            .reshape((heads, 2, config.head_dim / 2, rest))?
            .transpose(1, 2)?
            .contiguous()?;
        Ok(ordered.reshape(shape)?)
    }
}
