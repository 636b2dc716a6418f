//! `config.json` of a Hugging Face model directory.

use super::fields::Fields;
use super::known_fields::refuse_unknown;
use super::{
    Activation, Architecture, AttentionPattern, DecoderConfig, ExpertsConfig, Norm, Position, Residual, RotaryConfig,
    RotaryScaling,
};
use super::{gpt_neox, gptj};
use crate::error::{Error, Result};
use candle_kernels_cpu::RotaryLayout;
use serde_json::{Map, Value};

/// Reads transformers' `config.json`. Its dropout probabilities are ignored: what is dropped in training is told by the
/// training settings, by default nothing.
///
/// Fails with [`Error::Unsupported`] for an unknown `model_type`, a field that the family is not known to have, or a
/// feature that changes the computation, and with [`Error::InvalidConfig`] for missing, impossible or contradictory
/// fields.
pub fn from_hugging_face(config: &Map<String, Value>) -> Result<DecoderConfig> {
    let fields = Fields(config);
    let model_type = fields
        .text("model_type")?
        .ok_or_else(|| Error::invalid_config("model_type", "missing"))?;
    let architecture = Architecture::from_name(model_type)?;
    if fields.get("quantization_config").is_some() {
        return Err(Error::Unsupported(
            "configuration `quantization_config` is not supported; use GGUF".into(),
        ));
    }
    refuse_unknown(architecture, &fields)?;
    let mut config = match architecture {
        Architecture::Gpt2 => gpt2(&fields)?,
        Architecture::GptNeox => gpt_neox::from_hugging_face(&fields)?,
        Architecture::GptJ => gptj::from_hugging_face(&fields)?,
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => llama(architecture, &fields)?,
        Architecture::Mixtral | Architecture::Olmoe | Architecture::Qwen2Moe => {
            with_experts(llama(architecture, &fields)?, &fields)?
        }
    };
    config.attention_pattern = AttentionPattern::from_hugging_face(architecture, &fields, config.layers)?;
    config.validate()?;
    Ok(config)
}

fn gpt2(fields: &Fields<'_>) -> Result<DecoderConfig> {
    fields.expect_flag("scale_attn_weights", true)?;
    fields.expect_flag("scale_attn_by_inverse_layer_idx", false)?;
    fields.expect_flag("add_cross_attention", false)?;
    let width = fields.required_size("n_embd")?;
    let heads = fields.required_size("n_head")?;
    if heads == 0 || width % heads != 0 {
        return Err(Error::invalid_config(
            "n_head",
            format!("{heads} does not divide n_embd {width}"),
        ));
    }
    let context_length = match fields.size("n_positions")? {
        Some(positions) => positions,
        None => fields.required_size("n_ctx")?,
    };
    let layers = fields.required_size("n_layer")?;
    Ok(DecoderConfig {
        architecture: Architecture::Gpt2,
        layers,
        width,
        heads,
        key_value_heads: heads,
        head_dim: width / heads,
        feed_forward_width: fields.size("n_inner")?.unwrap_or(width.saturating_mul(4)),
        context_length,
        vocabulary: fields.required_size("vocab_size")?,
        norm: Norm::Layer,
        norm_epsilon: fields.number("layer_norm_epsilon")?.unwrap_or(1e-5),
        activation: Activation::from_name(
            "activation_function",
            fields.text("activation_function")?.unwrap_or("gelu_new"),
        )?,
        gated: false,
        residual: Residual::Sequential,
        position: Position::Learned,
        query_key_norm: false,
        experts: None,
        attention_pattern: AttentionPattern::default(),
        attention_bias: true,
        attention_output_bias: true,
        feed_forward_bias: true,
        tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(true),
        head_bias: false,
        groups: layers,
    })
}

fn llama(architecture: Architecture, fields: &Fields<'_>) -> Result<DecoderConfig> {
    if agreeing(fields, &["partial_rotary_factor"])?.is_some_and(|factor| factor != 1.0) {
        return Err(Error::Unsupported(
            "configuration `partial_rotary_factor` is not supported unless 1".into(),
        ));
    }
    let width = fields.required_size("hidden_size")?;
    let heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && width % heads == 0 => width / heads,
        None => {
            let reason = format!("{heads} does not divide hidden_size {width} and there is no head_dim");
            return Err(Error::invalid_config("num_attention_heads", reason));
        }
    };
    let biases = match architecture {
        // Qwen2-MoE's word; the others have none for it.
        Architecture::Qwen2 | Architecture::Qwen2Moe => (fields.flag("qkv_bias")?.unwrap_or(true), false),
        Architecture::Mistral | Architecture::Mixtral => (fields.flag("qkv_bias")?.unwrap_or(false), false),
        _ => {
            let bias = fields.flag("attention_bias")?.unwrap_or(false);
            (bias, bias)
        }
    };
    let layers = fields.required_size("num_hidden_layers")?;
    let context_length = fields.required_size("max_position_embeddings")?;
    Ok(DecoderConfig {
        architecture,
        layers,
        width,
        heads,
        key_value_heads: fields.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        feed_forward_width: fields.required_size("intermediate_size")?,
        context_length,
        vocabulary: fields.required_size("vocab_size")?,
        norm: Norm::Rms,
        norm_epsilon: fields
            .number("rms_norm_eps")?
            .unwrap_or(default_norm_epsilon(architecture)),
        activation: Activation::from_name("hidden_act", fields.text("hidden_act")?.unwrap_or("silu"))?,
        gated: true,
        residual: Residual::Sequential,
        position: Position::Rotary(rotary(architecture, fields, [head_dim, context_length])?),
        query_key_norm: fields
            .flag("query_key_norm")?
            .unwrap_or(architecture.has_query_key_norm()),
        experts: None,
        attention_pattern: AttentionPattern::default(),
        attention_bias: biases.0,
        attention_output_bias: fields.flag("attention_output_bias")?.unwrap_or(biases.1),
        feed_forward_bias: fields.flag("mlp_bias")?.unwrap_or(false),
        tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        head_bias: false,
        groups: layers,
    })
}

/// `config`, read of the dense part, with what the fields say of experts.
fn with_experts(config: DecoderConfig, fields: &Fields<'_>) -> Result<DecoderConfig> {
    if fields.get("clip_qkv").is_some() {
        return Err(Error::Unsupported(
            "configuration `clip_qkv` is not supported unless null".into(),
        ));
    }
    let dense_layers = fields
        .get("mlp_only_layers")
        .is_some_and(|layers| *layers != Value::Array(vec![]));
    if dense_layers || fields.size("decoder_sparse_step")?.is_some_and(|step| step != 1) {
        let message = "configuration `mlp_only_layers` and `decoder_sparse_step`: every layer must have experts";
        return Err(Error::Unsupported(message.into()));
    }
    let mut experts = ExpertsConfig::read(config.architecture, fields)?;
    let mut inner = config.feed_forward_width;
    if config.architecture == Architecture::Qwen2Moe {
        inner = fields.required_size("moe_intermediate_size")?;
        if let Some(experts) = &mut experts {
            experts.shared_width = fields.required_size("shared_expert_intermediate_size")?;
            let gate = fields.flag("shared_expert_gate")?;
            experts.shared_gate = gate.unwrap_or(experts.shared_width > 0);
        }
    }
    Ok(DecoderConfig {
        feed_forward_width: inner,
        experts,
        ..config
    })
}

/// transformers' `rms_norm_eps` of Llama's kin where a configuration says nothing.
pub(super) fn default_norm_epsilon(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::Mixtral | Architecture::Olmoe => 1e-5,
        _ => 1e-6,
    }
}

/// transformers' `rope_theta` of Llama's kin where a configuration says nothing.
pub(super) fn default_rope_theta(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::Mixtral => 1e6,
        _ => 1e4,
    }
}

/// `rope_theta` and `rope_scaling`, or `rope_parameters` which holds both since transformers 5.
fn rotary(architecture: Architecture, fields: &Fields<'_>, [dim, context_length]: [usize; 2]) -> Result<RotaryConfig> {
    let theta = agreeing(fields, &["rope_theta"])?;
    Ok(RotaryConfig {
        theta: theta.unwrap_or(default_rope_theta(architecture)),
        scaling: rotary_scaling_of(fields, context_length)?,
        dim,
        layout: RotaryLayout::HalfSplit,
    })
}

/// `rope_scaling`, or what `rope_parameters` says of it.
pub(super) fn rotary_scaling_of(fields: &Fields<'_>, context_length: usize) -> Result<RotaryScaling> {
    match fields.object("rope_scaling")?.or(fields.object("rope_parameters")?) {
        Some(scaling) => rotary_scaling(&scaling, context_length),
        None => Ok(RotaryScaling::None),
    }
}

/// A number of the rotary positions: the first of `names` also within `rope_parameters` or `rope_scaling`, the others are
/// older names of it. Fails with [`Error::InvalidConfig`], naming both, where two differ.
pub(super) fn agreeing(fields: &Fields<'_>, names: &[&str]) -> Result<Option<f64>> {
    let mut found: Option<(String, f64)> = None;
    let mut add = |name: String, value: Option<f64>| match (&found, value) {
        (_, None) => Ok(()),
        (None, Some(value)) => {
            found = Some((name, value));
            Ok(())
        }
        (Some((_, before)), Some(value)) if *before == value => Ok(()),
        (Some((first, before)), Some(value)) => {
            let reason = format!("{before} contradicts {name} {value}");
            Err(Error::invalid_config(first, reason))
        }
    };
    for object in ["rope_parameters", "rope_scaling"] {
        if let (Some(nested), Some(name)) = (fields.object(object)?, names.first()) {
            add(format!("{object}.{name}"), nested.number(name)?)?;
        }
    }
    for name in names {
        add((*name).to_owned(), fields.number(name)?)?;
    }
    Ok(found.map(|(_, value)| value))
}

/// Fields of `rope_scaling` and `rope_parameters`; the last two are read with those outside.
const ROTARY_FIELDS: &[&str] = &[
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "factors",
    "rope_theta",
    "partial_rotary_factor",
];

/// transformers' `rope_scaling` object, also the form of it in `models.config`.
pub(super) fn rotary_scaling(scaling: &Fields<'_>, context_length: usize) -> Result<RotaryScaling> {
    let kind = match (scaling.text("rope_type")?, scaling.text("type")?) {
        (Some(kind), Some(older)) if kind != older => {
            let reason = format!("{kind} contradicts type {older}");
            return Err(Error::invalid_config("rope_scaling.rope_type", reason));
        }
        (kind, older) => kind.or(older).unwrap_or("default"),
    };
    let factor = || {
        let missing = || Error::invalid_config("rope_scaling.factor", "missing");
        scaling.number("factor")?.ok_or_else(missing)
    };
    let known = ["default", "linear", "llama3", "factors"].contains(&kind);
    let unknown = |(field, value): &(&String, &Value)| !value.is_null() && !ROTARY_FIELDS.contains(&field.as_str());
    if let (true, Some((field, _))) = (known, scaling.0.iter().find(unknown)) {
        let field: String = field.chars().take(80).collect();
        return Err(Error::Unsupported(format!(
            "configuration `rope_scaling.{field}` is not known"
        )));
    }
    match kind {
        "default" => Ok(RotaryScaling::None),
        "linear" => Ok(RotaryScaling::Linear { factor: factor()? }),
        "llama3" => Ok(RotaryScaling::Llama3 {
            factor: factor()?,
            low_frequency_factor: scaling.number("low_freq_factor")?.unwrap_or(1.0),
            high_frequency_factor: scaling.number("high_freq_factor")?.unwrap_or(4.0),
            original_context_length: scaling
                .size("original_max_position_embeddings")?
                .unwrap_or(context_length),
        }),
        "factors" => {
            let factors = scaling
                .get("factors")
                .and_then(Value::as_array)
                .map(Vec::as_slice)
                .unwrap_or_default();
            let factors: Option<Vec<f32>> = factors.iter().map(|value| value.as_f64().map(|f| f as f32)).collect();
            let wrong = || Error::invalid_config("rope_scaling.factors", "not a list of numbers");
            Ok(RotaryScaling::Factors(factors.ok_or_else(wrong)?))
        }
        other => Err(Error::Unsupported(format!(
            "rope_scaling `{other}` is not supported; known are default, linear and llama3"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: Value) -> Result<DecoderConfig> {
        from_hugging_face(config.as_object().unwrap())
    }

    fn gpt2_json() -> Value {
        json!({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.1})
    }

    fn llama_json() -> Value {
        json!({"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
            "num_hidden_layers": 30, "intermediate_size": 1536, "max_position_embeddings": 8192,
            "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": true})
    }

    #[test]
    fn gpt2_has_its_published_size() {
        assert_eq!(read(gpt2_json()).unwrap().parameter_count(), 124_439_808);
    }

    #[test]
    fn smollm2_has_its_published_size() {
        let config = read(llama_json()).unwrap();
        assert_eq!(config.parameter_count(), 134_515_008);
        assert_eq!((config.head_dim, config.key_value_width()), (64, 192));
    }

    #[test]
    fn unknown_family_is_refused() {
        let mut config = llama_json();
        config["model_type"] = json!("mamba");
        assert!(matches!(read(config), Err(Error::Unsupported(message)) if message.contains("mamba")));
    }

    #[test]
    fn missing_and_impossible_fields_are_named() {
        for (field, value) in [
            ("vocab_size", json!(null)),
            ("num_hidden_layers", json!(-1)),
            ("head_dim", json!(7)),
            ("rms_norm_eps", json!("x")),
        ] {
            let mut config = llama_json();
            config[field] = value;
            let error = read(config).unwrap_err();
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
        let mut config = llama_json();
        config["hidden_size"] = json!(1u64 << 40);
        assert!(read(config).is_err());
    }

    #[test]
    fn what_is_left_out_is_as_in_transformers() {
        let experts = json!({"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8});
        for (family, theta, epsilon) in [
            ("llama", 1e4, 1e-6),
            ("mistral", 1e4, 1e-6),
            ("qwen2", 1e4, 1e-6),
            ("mixtral", 1e6, 1e-5),
            ("olmoe", 1e4, 1e-5),
            ("qwen2_moe", 1e4, 1e-6),
        ] {
            let mut config = llama_json();
            config["model_type"] = json!(family);
            let fields = config.as_object_mut().unwrap();
            fields.remove("rope_theta");
            fields.remove("rms_norm_eps");
            let own: &[&str] = match family {
                "mixtral" => &["num_local_experts", "num_experts_per_tok"],
                "olmoe" => &["num_experts", "num_experts_per_tok"],
                "qwen2_moe" => &[
                    "num_experts",
                    "num_experts_per_tok",
                    "moe_intermediate_size",
                    "shared_expert_intermediate_size",
                ],
                _ => &[],
            };
            for name in own {
                fields.insert((*name).to_owned(), experts[*name].clone());
            }
            let config = read(config).unwrap();
            let Position::Rotary(rotary) = config.position else {
                panic!()
            };
            assert_eq!((rotary.theta, config.norm_epsilon), (theta, epsilon), "{family}");
        }
    }

    #[test]
    fn transformers_5_rope_parameters_are_read() {
        let mut config = llama_json();
        config["rope_theta"] = Value::Null;
        config["rope_parameters"] = json!({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let Position::Rotary(rotary) = read(config).unwrap().position else {
            panic!()
        };
        assert_eq!(rotary.theta, 500_000.0);
        assert!(matches!(rotary.scaling, RotaryScaling::Llama3 { .. }));
    }
}
