//! The metadata of a model's shape.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;

use super::{architecture_name, tokenizer};
use crate::config::{Architecture, DecoderConfig, Position, RotaryScaling};
use crate::convert::plan::Conversion;
use crate::decoder::WeightType;
use crate::error::Result;
use crate::formats::gguf::MetadataValue;

/// Keys and values of a file's metadata.
pub(super) type Metadata = BTreeMap<String, MetadataValue>;

/// An integer, whatever it was.
pub(super) fn integer(value: usize) -> MetadataValue {
    MetadataValue::Integer(value as i128)
}

/// All metadata of a conversion.
pub(super) fn of(conversion: &Conversion) -> Result<Metadata> {
    let config = &conversion.model.config;
    let name = architecture_name(config)?;
    let text = |value: &str| MetadataValue::String(value.to_owned());
    let mut metadata = Metadata::from([
        ("general.architecture".to_owned(), text(name)),
        ("general.type".to_owned(), text("model")),
        ("general.name".to_owned(), text(&model_name(conversion))),
        ("general.file_type".to_owned(), integer(file_type(conversion))),
        ("general.quantization_version".to_owned(), integer(2)),
    ]);
    for (key, value) in shape(config) {
        metadata.insert(format!("{name}.{key}"), value);
    }
    metadata.extend(tokenizer::metadata(conversion)?);
    Ok(metadata)
}

fn model_name(conversion: &Conversion) -> String {
    let name = conversion
        .source
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    if name.is_empty() { "model".to_owned() } else { name }
}

/// llama.cpp's number of what most matrices are stored as.
fn file_type(conversion: &Conversion) -> usize {
    match conversion.options.dtype.unwrap_or(WeightType::F16) {
        WeightType::F32 => 0,
        WeightType::F16 => 1,
        WeightType::Bf16 => 32,
        WeightType::Quantized(GgmlDType::Q8_0) => 7,
        // Refused when the conversion is planned.
        WeightType::Quantized(_) => 1024,
    }
}

fn shape(config: &DecoderConfig) -> Vec<(&'static str, MetadataValue)> {
    let mut keys = vec![
        ("context_length", integer(config.context_length)),
        ("embedding_length", integer(config.width)),
        ("block_count", integer(config.layers)),
        ("feed_forward_length", integer(config.feed_forward_width)),
        ("attention.head_count", integer(config.heads)),
        ("vocab_size", integer(config.vocabulary)),
    ];
    let epsilon = MetadataValue::Float(config.norm_epsilon);
    if config.architecture == Architecture::Gpt2 {
        keys.push(("attention.layer_norm_epsilon", epsilon));
        return keys;
    }
    keys.extend([
        ("attention.layer_norm_rms_epsilon", epsilon),
        ("attention.head_count_kv", integer(config.key_value_heads)),
        ("attention.key_length", integer(config.head_dim)),
        ("attention.value_length", integer(config.head_dim)),
        ("rope.dimension_count", integer(config.head_dim)),
    ]);
    if let Some(experts) = &config.experts {
        keys.push(("expert_count", integer(experts.experts)));
        keys.push(("expert_used_count", integer(experts.per_token)));
        if experts.shared_width > 0 {
            keys.push(("expert_feed_forward_length", integer(config.feed_forward_width)));
            keys.push(("expert_shared_feed_forward_length", integer(experts.shared_width)));
        }
    }
    if let Position::Rotary(rotary) = &config.position {
        keys.push(("rope.freq_base", MetadataValue::Float(rotary.theta)));
        if let RotaryScaling::Linear { factor } = rotary.scaling {
            keys.push(("rope.scaling.type", MetadataValue::String("linear".to_owned())));
            keys.push(("rope.scaling.factor", MetadataValue::Float(factor)));
        }
    }
    keys
}
