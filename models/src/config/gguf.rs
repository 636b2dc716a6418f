//! The metadata of a GGUF file.

use super::gpt_neox;
use super::{
    Activation, Architecture, AttentionPattern, DecoderConfig, ExpertsConfig, Norm, Position, Residual, RotaryConfig,
    RotaryScaling,
};
use crate::error::{Error, Result};
use crate::formats::GgufMetadata;
use candle_kernels_cpu::RotaryLayout;

/// What of the configuration only the tensors of a GGUF file tell: which optional ones are there.
#[derive(Debug, Clone, Default)]
pub struct GgufTensorFacts {
    /// Rows of `token_embd.weight`.
    pub vocabulary: usize,
    /// Whether there is an `output.weight`, which is a head of its own.
    pub untied_head: bool,
    /// Whether there is a `blk.0.attn_q.bias`.
    pub attention_bias: bool,
    /// Whether there is a `blk.0.attn_output.bias`.
    pub attention_output_bias: bool,
    /// Whether there is a `blk.0.ffn_up.bias`.
    pub feed_forward_bias: bool,
    /// Contents of `rope_freqs.weight`, when there is one.
    pub rotary_factors: Option<Vec<f32>>,
}

/// Reads the keys of the file's architecture, `llama.KEY`.
pub(super) struct Keys<'a> {
    metadata: &'a GgufMetadata,
    pub(super) architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        let name = self.name(key);
        let too_large = |number| Error::invalid_config(&name, format!("{number} is too large"));
        let number = self.metadata.unsigned(&name)?;
        number
            .map(|number| usize::try_from(number).map_err(|_| too_large(number)))
            .transpose()
    }

    pub(super) fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| Error::invalid_config(self.name(key), "missing"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.float(&self.name(key))
    }

    pub(super) fn required_number(&self, key: &str) -> Result<f64> {
        self.number(key)?
            .ok_or_else(|| Error::invalid_config(self.name(key), "missing"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.metadata.string(&self.name(key))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.metadata.boolean(&self.name(key))
    }
}

/// Reads the configuration from GGUF metadata (`general.architecture` and that architecture's keys).
///
/// Fails with [`Error::Unsupported`] for an unknown architecture or feature, and with [`Error::InvalidConfig`] for
/// missing or impossible keys.
pub fn from_gguf(metadata: &GgufMetadata, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let architecture = metadata.architecture()?;
    let keys = Keys { metadata, architecture };
    let config = match architecture {
        // GGUF has names of its own.
        gpt_neox::GGUF_NAME => gpt_neox::from_gguf(&keys, facts)?,
        "qwen2moe" => llama(Architecture::Qwen2Moe, &keys, facts)?,
        // To llama.cpp a Mixtral is a Llama.
        "llama" if keys.size("expert_count")?.is_some_and(|experts| experts > 0) => {
            llama(Architecture::Mixtral, &keys, facts)?
        }
        name => match Architecture::from_name(name)? {
            Architecture::Gpt2 => gpt2(&keys, facts)?,
            Architecture::GptNeox | Architecture::GptJ | Architecture::Mixtral | Architecture::Qwen2Moe => {
                let message = format!("GGUF files of architecture `{name}` are not supported: llama.cpp writes none");
                return Err(Error::Unsupported(message));
            }
            architecture => llama(architecture, &keys, facts)?,
        },
    };
    config.validate()?;
    Ok(config)
}

pub(super) fn heads_and_width(keys: &Keys<'_>) -> Result<(usize, usize, usize)> {
    let heads = keys.required_size("attention.head_count")?;
    let width = keys.required_size("embedding_length")?;
    let head_dim = match keys.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && width % heads == 0 => width / heads,
        None => {
            let reason = format!("{heads} does not divide embedding_length {width}");
            return Err(Error::invalid_config(
                format!("{}.attention.head_count", keys.architecture),
                reason,
            ));
        }
    };
    let value_length = keys.size("attention.value_length")?;
    if value_length.is_some_and(|value_length| value_length != head_dim) {
        return Err(Error::Unsupported(
            "values of another width than keys are not supported".into(),
        ));
    }
    Ok((heads, width, head_dim))
}

fn gpt2(keys: &Keys<'_>, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let (heads, width, head_dim) = heads_and_width(keys)?;
    let layers = keys.required_size("block_count")?;
    Ok(DecoderConfig {
        architecture: Architecture::Gpt2,
        layers,
        width,
        heads,
        key_value_heads: heads,
        head_dim,
        feed_forward_width: keys.required_size("feed_forward_length")?,
        context_length: keys.required_size("context_length")?,
        vocabulary: facts.vocabulary,
        norm: Norm::Layer,
        norm_epsilon: keys.required_number("attention.layer_norm_epsilon")?,
        activation: Activation::GeluTanh,
        gated: false,
        residual: Residual::Sequential,
        query_key_norm: false,
        experts: None,
        position: Position::Learned,
        attention_pattern: AttentionPattern::default(),
        attention_bias: true,
        attention_output_bias: true,
        feed_forward_bias: true,
        tied_head: !facts.untied_head,
        head_bias: false,
        groups: layers,
    })
}

fn llama(architecture: Architecture, keys: &Keys<'_>, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let (heads, width, head_dim) = heads_and_width(keys)?;
    let (experts, feed_forward_width) = experts(architecture, keys)?;
    let rotated = keys.size("rope.dimension_count")?;
    if rotated.is_some_and(|rotated| rotated != head_dim) {
        return Err(Error::Unsupported(format!(
            "{}.rope.dimension_count other than the head width {head_dim} is not supported",
            keys.architecture
        )));
    }
    let window = keys.size("attention.sliding_window")?.filter(|window| *window > 0);
    let layers = keys.required_size("block_count")?;
    Ok(DecoderConfig {
        architecture,
        layers,
        width,
        heads,
        key_value_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        feed_forward_width,
        context_length: keys.required_size("context_length")?,
        vocabulary: facts.vocabulary,
        norm: Norm::Rms,
        norm_epsilon: keys.required_number("attention.layer_norm_rms_epsilon")?,
        activation: Activation::Silu,
        gated: true,
        residual: Residual::Sequential,
        query_key_norm: architecture.has_query_key_norm(),
        experts,
        position: Position::Rotary(rotary(keys, facts, head_dim)?),
        attention_pattern: AttentionPattern::of_window(window, layers)?,
        attention_bias: facts.attention_bias,
        attention_output_bias: facts.attention_output_bias,
        feed_forward_bias: facts.feed_forward_bias,
        tied_head: !facts.untied_head,
        head_bias: false,
        groups: layers,
    })
}

/// The experts that llama.cpp computes by the metadata, and the width of the inner layer of each, or of the one network.
fn experts(architecture: Architecture, keys: &Keys<'_>) -> Result<(Option<ExpertsConfig>, usize)> {
    let number = keys.size("expert_count")?.filter(|experts| *experts > 0);
    let normalize = match architecture {
        Architecture::Mixtral => true,
        Architecture::Olmoe | Architecture::Qwen2Moe => false,
        other => {
            return match number {
                None => Ok((None, keys.required_size("feed_forward_length")?)),
                Some(_) => {
                    let message = format!("GGUF files of `{}` with experts are not supported", other.name());
                    Err(Error::Unsupported(message))
                }
            };
        }
    };
    let refuse = |key: &str| {
        let message = format!(
            "{}.{key} of another value than llama.cpp's own is not supported",
            keys.architecture
        );
        Err(Error::Unsupported(message))
    };
    if keys
        .number("expert_weights_scale")?
        .is_some_and(|scale| scale != 0.0 && scale != 1.0)
    {
        return refuse("expert_weights_scale");
    }
    // 1 is the softmax, which these architectures have where the key is missing or 0.
    if keys.size("expert_gating_func")?.is_some_and(|function| function > 1) {
        return refuse("expert_gating_func");
    }
    if keys
        .flag("expert_weights_norm")?
        .is_some_and(|given| given != normalize)
    {
        return refuse("expert_weights_norm");
    }
    let own_width = keys.size("expert_feed_forward_length")?.filter(|width| *width > 0);
    let (inner, shared_width) = match architecture {
        Architecture::Qwen2Moe => {
            let shared = keys
                .size("expert_shared_feed_forward_length")?
                .filter(|width| *width > 0);
            let shared = match shared {
                Some(shared) => shared,
                None => keys.required_size("feed_forward_length")?,
            };
            let inner = own_width.ok_or_else(|| {
                Error::invalid_config(format!("{}.expert_feed_forward_length", keys.architecture), "missing")
            })?;
            (inner, shared)
        }
        _ => match own_width {
            Some(inner) => (inner, 0),
            None => (keys.required_size("feed_forward_length")?, 0),
        },
    };
    let config = ExpertsConfig {
        experts: match number {
            Some(number) => number,
            None => keys.required_size("expert_count")?,
        },
        per_token: keys.required_size("expert_used_count")?,
        normalize,
        shared_width,
        shared_gate: shared_width > 0,
    };
    Ok((Some(config), inner))
}

pub(super) fn rotary(keys: &Keys<'_>, facts: &GgufTensorFacts, dim: usize) -> Result<RotaryConfig> {
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let kind = keys.text("rope.scaling.type")?.unwrap_or("none");
    let scaling = match (&facts.rotary_factors, kind) {
        (Some(factors), _) => RotaryScaling::Factors(factors.clone()),
        (None, "none") => RotaryScaling::None,
        (None, "linear") => RotaryScaling::Linear {
            factor: keys.required_number("rope.scaling.factor")?,
        },
        (None, other) => {
            return Err(Error::Unsupported(format!(
                "{}.rope.scaling.type `{other}`",
                keys.architecture
            )));
        }
    };
    Ok(RotaryConfig {
        theta,
        scaling,
        dim,
        layout: RotaryLayout::HalfSplit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::gguf::MetadataValue;
    use std::collections::BTreeMap;
    use std::path::Path;

    fn smollm2() -> BTreeMap<String, MetadataValue> {
        let sizes = [
            ("block_count", 30),
            ("context_length", 8192),
            ("embedding_length", 576),
            ("feed_forward_length", 1536),
            ("attention.head_count", 9),
            ("attention.head_count_kv", 3),
        ];
        let sizes = sizes
            .iter()
            .map(|(key, size)| (format!("llama.{key}"), MetadataValue::Integer(*size)));
        let mut values: BTreeMap<_, _> = sizes.collect();
        values.insert("general.architecture".into(), MetadataValue::String("llama".into()));
        values.insert(
            "llama.attention.layer_norm_rms_epsilon".into(),
            MetadataValue::Float(1e-5),
        );
        values.insert("llama.rope.freq_base".into(), MetadataValue::Float(1e5));
        values
    }

    fn read(values: BTreeMap<String, MetadataValue>) -> Result<DecoderConfig> {
        let facts = GgufTensorFacts {
            vocabulary: 49_152,
            ..Default::default()
        };
        from_gguf(&GgufMetadata::new(Path::new("a.gguf"), values), &facts)
    }

    #[test]
    fn smollm2_is_read() {
        assert_eq!(read(smollm2()).unwrap().parameter_count(), 134_515_008);
    }

    #[test]
    fn missing_and_foreign_keys_are_named() {
        let mut values = smollm2();
        values.remove("llama.block_count");
        assert!(read(values).unwrap_err().to_string().contains("llama.block_count"));
        let mut values = smollm2();
        values.insert("llama.rope.scaling.type".into(), MetadataValue::String("yarn".into()));
        assert!(matches!(read(values), Err(Error::Unsupported(_))));
    }
}
