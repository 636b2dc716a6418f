//! The metadata of a GGUF file.

use super::{Activation, Architecture, DecoderConfig, Norm, Position, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;

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

struct Metadata<'a> {
    values: &'a HashMap<String, Value>,
    architecture: &'a str,
}

impl Metadata<'_> {
    /// `KEY` of the architecture, `llama.KEY`.
    fn get(&self, key: &str) -> Option<(String, &Value)> {
        let name = format!("{}.{key}", self.architecture);
        self.values.get(&name).map(|value| (name, value))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some((name, value)) = self.get(key) else {
            return Ok(None);
        };
        let number = match value {
            Value::U8(value) => Some(u64::from(*value)),
            Value::U16(value) => Some(u64::from(*value)),
            Value::U32(value) => Some(u64::from(*value)),
            Value::U64(value) => Some(*value),
            Value::I8(value) => u64::try_from(*value).ok(),
            Value::I16(value) => u64::try_from(*value).ok(),
            Value::I32(value) => u64::try_from(*value).ok(),
            Value::I64(value) => u64::try_from(*value).ok(),
            _ => None,
        };
        match number.and_then(|number| usize::try_from(number).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(Error::invalid_config(name, "not a whole number of at least 0")),
        }
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?
            .ok_or_else(|| Error::invalid_config(format!("{}.{key}", self.architecture), "missing"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some((_, Value::F32(value))) if value.is_finite() => Ok(Some(f64::from(*value))),
            Some((_, Value::F64(value))) if value.is_finite() => Ok(Some(*value)),
            Some((name, _)) => Err(Error::invalid_config(name, "not a finite number")),
        }
    }

    fn required_number(&self, key: &str) -> Result<f64> {
        self.number(key)?
            .ok_or_else(|| Error::invalid_config(format!("{}.{key}", self.architecture), "missing"))
    }
}

/// Reads the configuration from GGUF metadata (`general.architecture` and that architecture's keys).
///
/// Fails with [`Error::Unsupported`] for an unknown architecture or feature, and with [`Error::InvalidConfig`] for
/// missing or impossible keys.
pub fn from_gguf(metadata: &HashMap<String, Value>, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let architecture = match metadata.get("general.architecture") {
        Some(Value::String(name)) => name.as_str(),
        _ => return Err(Error::invalid_config("general.architecture", "missing or not a string")),
    };
    let metadata = Metadata {
        values: metadata,
        architecture,
    };
    let config = match Architecture::from_name(architecture)? {
        Architecture::Gpt2 => gpt2(&metadata, facts)?,
        architecture => llama(architecture, &metadata, facts)?,
    };
    config.validate()?;
    Ok(config)
}

fn heads_and_width(metadata: &Metadata<'_>) -> Result<(usize, usize, usize)> {
    let heads = metadata.required_size("attention.head_count")?;
    let width = metadata.required_size("embedding_length")?;
    let head_dim = match metadata.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && width % heads == 0 => width / heads,
        None => {
            let reason = format!("{heads} does not divide embedding_length {width}");
            return Err(Error::invalid_config(
                format!("{}.attention.head_count", metadata.architecture),
                reason,
            ));
        }
    };
    if metadata
        .size("attention.value_length")?
        .is_some_and(|value_length| value_length != head_dim)
    {
        return Err(Error::Unsupported(
            "values of another width than keys are not supported".into(),
        ));
    }
    Ok((heads, width, head_dim))
}

fn gpt2(metadata: &Metadata<'_>, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let (heads, width, head_dim) = heads_and_width(metadata)?;
    Ok(DecoderConfig {
        architecture: Architecture::Gpt2,
        layers: metadata.required_size("block_count")?,
        width,
        heads,
        key_value_heads: heads,
        head_dim,
        feed_forward_width: metadata.required_size("feed_forward_length")?,
        context_length: metadata.required_size("context_length")?,
        vocabulary: facts.vocabulary,
        norm: Norm::Layer,
        norm_epsilon: metadata.required_number("attention.layer_norm_epsilon")?,
        activation: Activation::GeluTanh,
        gated: false,
        position: Position::Learned,
        attention_bias: true,
        attention_output_bias: true,
        feed_forward_bias: true,
        tied_head: !facts.untied_head,
    })
}

fn llama(architecture: Architecture, metadata: &Metadata<'_>, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let (heads, width, head_dim) = heads_and_width(metadata)?;
    if metadata.size("expert_count")?.is_some_and(|experts| experts > 0) {
        return Err(Error::Unsupported("GGUF files with experts are not supported".into()));
    }
    if metadata
        .size("rope.dimension_count")?
        .is_some_and(|rotated| rotated != head_dim)
    {
        return Err(Error::Unsupported(format!(
            "{}.rope.dimension_count other than the head width {head_dim} is not supported",
            metadata.architecture
        )));
    }
    let context_length = metadata.required_size("context_length")?;
    let window = metadata.size("attention.sliding_window")?.filter(|window| *window > 0);
    Ok(DecoderConfig {
        architecture,
        layers: metadata.required_size("block_count")?,
        width,
        heads,
        key_value_heads: metadata.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        feed_forward_width: metadata.required_size("feed_forward_length")?,
        context_length: window.map_or(context_length, |window| context_length.min(window)),
        vocabulary: facts.vocabulary,
        norm: Norm::Rms,
        norm_epsilon: metadata.required_number("attention.layer_norm_rms_epsilon")?,
        activation: Activation::Silu,
        gated: true,
        position: Position::Rotary(rotary(metadata, facts)?),
        attention_bias: facts.attention_bias,
        attention_output_bias: facts.attention_output_bias,
        feed_forward_bias: facts.feed_forward_bias,
        tied_head: !facts.untied_head,
    })
}

fn rotary(metadata: &Metadata<'_>, facts: &GgufTensorFacts) -> Result<RotaryConfig> {
    let theta = metadata.number("rope.freq_base")?.unwrap_or(10_000.0);
    let kind = match metadata.get("rope.scaling.type") {
        Some((_, Value::String(kind))) => kind.as_str(),
        _ => "none",
    };
    let scaling = match (&facts.rotary_factors, kind) {
        (Some(factors), _) => RotaryScaling::Factors(factors.clone()),
        (None, "none") => RotaryScaling::None,
        (None, "linear") => RotaryScaling::Linear {
            factor: metadata.required_number("rope.scaling.factor")?,
        },
        (None, other) => {
            return Err(Error::Unsupported(format!(
                "{}.rope.scaling.type `{other}`",
                metadata.architecture
            )));
        }
    };
    Ok(RotaryConfig { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2() -> HashMap<String, Value> {
        let sizes = [
            ("block_count", 30),
            ("context_length", 8192),
            ("embedding_length", 576),
            ("feed_forward_length", 1536),
            ("attention.head_count", 9),
            ("attention.head_count_kv", 3),
        ];
        let mut metadata: HashMap<_, _> = sizes
            .iter()
            .map(|(key, size)| (format!("llama.{key}"), Value::U32(*size)))
            .collect();
        metadata.insert("general.architecture".into(), Value::String("llama".into()));
        metadata.insert("llama.attention.layer_norm_rms_epsilon".into(), Value::F32(1e-5));
        metadata.insert("llama.rope.freq_base".into(), Value::F32(1e5));
        metadata
    }

    #[test]
    fn smollm2_is_read() {
        let facts = GgufTensorFacts {
            vocabulary: 49_152,
            ..Default::default()
        };
        let config = from_gguf(&smollm2(), &facts).unwrap();
        assert_eq!(config.parameter_count(), 134_515_008);
    }

    #[test]
    fn missing_key_is_named() {
        let mut metadata = smollm2();
        metadata.remove("llama.block_count");
        let facts = GgufTensorFacts {
            vocabulary: 8,
            ..Default::default()
        };
        assert!(
            from_gguf(&metadata, &facts)
                .unwrap_err()
                .to_string()
                .contains("llama.block_count")
        );
    }
}
