//! `models.config`: the JSON object that describes a model made from nothing, and that shows any model's shape.

use super::fields::{Fields, shortened};
use super::hugging_face::{agreeing, default_norm_epsilon, default_rope_theta, rotary_scaling};
use super::rotary_fields::expect_whole;
use super::shape::Shape;
use super::{
    Activation, Architecture, AttentionPattern, DecoderConfig, ExpertsConfig, Norm, Position, RotaryConfig,
    RotaryScaling,
};
use super::{gpt_neox, gptj, presets};
use crate::error::{Error, Result};
use crate::training::TrainingSettings;
use candle_kernels_cpu::RotaryLayout;
use serde_json::{Map, Value, json};

/// Fields that describe the decoder, each with the names that transformers and the GPT-3 paper give it.
const SHAPE_FIELDS: &[(&str, &[&str])] = &[
    ("preset", &[]),
    ("architecture", &["model_type"]),
    ("layers", &["n_layer", "num_hidden_layers", "n_layers"]),
    ("width", &["n_embd", "hidden_size", "d_model"]),
    ("heads", &["n_head", "num_attention_heads", "n_heads"]),
    ("key_value_heads", &["num_key_value_heads"]),
    ("head_dim", &["d_head"]),
    (
        "feed_forward_width",
        &["n_inner", "intermediate_size", "moe_intermediate_size", "d_ff"],
    ),
    ("context_length", &["n_positions", "n_ctx", "max_position_embeddings"]),
    ("vocabulary", &["vocab_size", "n_vocab"]),
    (
        "norm_epsilon",
        &["layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"],
    ),
    ("activation", &["activation_function", "hidden_act"]),
    ("parallel_residual", &["use_parallel_residual"]),
    ("rotary_dim", &[]),
    ("rotary_pct", &["partial_rotary_factor"]),
    ("rope_theta", &["rotary_emb_base"]),
    ("rope_scaling", &[]),
    ("attention_window", &["sliding_window", "window_size"]),
    ("attention_pattern", &["layer_types", "attention_types"]),
    ("attention_block_size", &[]),
    ("attention_bias", &[]),
    ("attention_output_bias", &[]),
    ("feed_forward_bias", &["mlp_bias"]),
    ("query_key_norm", &[]),
    ("num_experts", &["num_local_experts"]),
    ("num_experts_per_tok", &[]),
    ("norm_topk_prob", &[]),
    ("shared_expert_intermediate_size", &[]),
    ("shared_expert_gate", &[]),
    ("expert_servers", &[]),
    ("tied_head", &["tie_word_embeddings"]),
    ("head_bias", &[]),
    ("share", &[]),
    ("tokenizer", &[]),
];

/// Fields that say how the model is trained ([`TrainingSettings`]), not what the decoder is. They may change between
/// steps.
pub const TRAINING_FIELDS: &[&str] = &[
    "learning_rate",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "max_grad_norm",
    "decay_norms_and_biases",
    "schedule",
    "warmup_steps",
    "schedule_steps",
    "min_learning_rate",
    "recompute",
    "compress_activations",
    "reuse_activations",
    "keep_last",
    "keep_every",
    "keep_tagged",
    "precision",
    "loss_scale",
    "loss_scale_growth_interval",
    "dropout",
    "embd_pdrop",
    "resid_pdrop",
    "attn_pdrop",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "expert_capacity_factor",
];

/// Gives every field its own name in place of transformers', and drops nulls.
///
/// Fails with [`Error::InvalidConfig`] for an unknown field (the known ones are listed), for a field given under two
/// names, and for a bad training setting.
pub fn normalize_settings(settings: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut normalized = Map::new();
    for (given, value) in settings {
        let name = canonical_name(given)?;
        if value.is_null() {
            continue;
        }
        if normalized.insert(name.to_owned(), value.clone()).is_some() {
            return Err(Error::invalid_config(
                given,
                format!("`{name}` is given twice, under different names"),
            ));
        }
    }
    TrainingSettings::read(&normalized)?;
    Ok(normalized)
}

fn canonical_name(given: &str) -> Result<&'static str> {
    let shape = SHAPE_FIELDS
        .iter()
        .find(|(name, aliases)| *name == given || aliases.contains(&given));
    let training = || TRAINING_FIELDS.iter().copied().find(|name| *name == given);
    shape.map(|(name, _)| *name).or_else(training).ok_or_else(|| {
        let known: Vec<_> = SHAPE_FIELDS
            .iter()
            .map(|(name, _)| *name)
            .chain(TRAINING_FIELDS.iter().copied())
            .collect();
        let shown: String = given.chars().take(80).collect();
        Error::invalid_config(shown, format!("unknown field; known are {}", known.join(", ")))
    })
}

/// Reads a decoder's shape from `models.config`. `tokenizer_size` is the default of `vocabulary`.
///
/// `preset` gives the shape of a model of GPT-3's paper where other fields do not. Required without it: `architecture`,
/// `layers`, `width`, `heads`, `context_length`, and `vocabulary` without a tokenizer. Defaults: `key_value_heads` =
/// `heads`; `head_dim` = `width / heads`; `feed_forward_width` = 4 `width` (gpt2, gpt_neox, gptj), or 8/3 `width` rounded up to a multiple of 32 (llama's kin); the rest as transformers' configuration of the architecture,
/// but for `tied_head`, true. Fails with [`Error::InvalidConfig`], naming the field.
pub fn from_settings(settings: &Map<String, Value>, tokenizer_size: Option<usize>) -> Result<DecoderConfig> {
    let mut normalized = normalize_settings(settings)?;
    presets::fill(&mut normalized, tokenizer_size.is_some())?;
    let fields = Fields(&normalized);
    let known = || {
        Architecture::ALL
            .iter()
            .map(|known| known.name())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let name = fields.text("architecture")?;
    let name = name.ok_or_else(|| Error::invalid_config("architecture", format!("missing; one of {}", known())))?;
    let architecture = Architecture::from_name(name)?;
    let mut config = match architecture {
        Architecture::Gpt2 => gpt2(&fields, tokenizer_size)?,
        Architecture::GptNeox => gpt_neox::from_settings(&fields, tokenizer_size)?,
        Architecture::GptJ => gptj::from_settings(&fields, tokenizer_size)?,
        architecture => llama(architecture, &fields, tokenizer_size)?,
    };
    config.groups = groups(&fields, config.layers)?;
    config.experts = ExpertsConfig::read(architecture, &fields)?;
    super::expert_servers(&normalized, &config)?;
    let norm = fields.flag("query_key_norm")?;
    config.query_key_norm = norm.unwrap_or(architecture.has_query_key_norm());
    if config.query_key_norm && config.norm == Norm::Layer {
        let reason = format!("{} has no norms on queries and keys", architecture.name());
        return Err(Error::invalid_config("query_key_norm", reason));
    }
    config.attention_pattern = AttentionPattern::read(&fields, config.layers)?;
    config.validate()?;
    if let Some(size) = tokenizer_size.filter(|size| *size > config.vocabulary) {
        let reason = format!("{} is less than the tokenizer's {size} tokens", config.vocabulary);
        return Err(Error::invalid_config("vocabulary", reason));
    }
    Ok(config)
}

fn gpt2(fields: &Fields<'_>, tokenizer_size: Option<usize>) -> Result<DecoderConfig> {
    for foreign in ["rope_theta", "rope_scaling", "rotary_dim", "rotary_pct"] {
        if fields.get(foreign).is_some() {
            let reason = "it contradicts `architecture` gpt2, which has learned positions";
            return Err(Error::invalid_config(foreign, reason));
        }
    }
    expect_sequential(fields, Architecture::Gpt2)?;
    for bias in ["attention_bias", "attention_output_bias", "feed_forward_bias"] {
        fields.expect_flag(bias, true)?;
    }
    let shape = Shape::read(fields, tokenizer_size)?;
    shape.expect_plain_heads(Architecture::Gpt2)?;
    let mut config = shape.config(Architecture::Gpt2);
    config.feed_forward_width = fields
        .size("feed_forward_width")?
        .unwrap_or(shape.width.saturating_mul(4));
    config.norm_epsilon = fields.number("norm_epsilon")?.unwrap_or(1e-5);
    config.activation = Activation::from_name("activation", fields.text("activation")?.unwrap_or("gelu_new"))?;
    config.tied_head = fields.flag("tied_head")?.unwrap_or(true);
    Ok(config)
}

fn llama(architecture: Architecture, fields: &Fields<'_>, tokenizer_size: Option<usize>) -> Result<DecoderConfig> {
    let shape = Shape::read(fields, tokenizer_size)?;
    let scaling = match fields.object("rope_scaling")? {
        Some(scaling) => rotary_scaling(&scaling, shape.context_length)?,
        None => RotaryScaling::None,
    };
    expect_sequential(fields, architecture)?;
    expect_whole(fields, shape.head_dim, architecture.name())?;
    let theta = agreeing(fields, &["rope_theta"])?.unwrap_or(default_rope_theta(architecture));
    let qwen = matches!(architecture, Architecture::Qwen2 | Architecture::Qwen2Moe);
    let mut config = shape.config(architecture);
    let inner = shape.width.saturating_mul(8).div_ceil(3).next_multiple_of(32);
    config.feed_forward_width = fields.size("feed_forward_width")?.unwrap_or(inner);
    config.norm = Norm::Rms;
    config.norm_epsilon = fields
        .number("norm_epsilon")?
        .unwrap_or(default_norm_epsilon(architecture));
    config.activation = Activation::from_name("activation", fields.text("activation")?.unwrap_or("silu"))?;
    config.gated = true;
    config.position = Position::Rotary(RotaryConfig {
        theta,
        scaling,
        dim: shape.head_dim,
        layout: RotaryLayout::HalfSplit,
    });
    config.attention_bias = fields.flag("attention_bias")?.unwrap_or(qwen);
    config.attention_output_bias = fields
        .flag("attention_output_bias")?
        .unwrap_or(config.attention_bias && !qwen);
    if qwen && config.attention_output_bias {
        let reason = format!(
            "true contradicts `architecture` {}, which has none",
            architecture.name()
        );
        return Err(Error::invalid_config("attention_output_bias", reason));
    }
    config.feed_forward_bias = fields.flag("feed_forward_bias")?.unwrap_or(false);
    config.tied_head = fields.flag("tied_head")?.unwrap_or(true);
    Ok(config)
}

/// Refuses parallel layers and a head's bias, for families that have neither.
fn expect_sequential(fields: &Fields<'_>, architecture: Architecture) -> Result<()> {
    for (field, what) in [
        (
            "parallel_residual",
            "has sequential layers; gpt_neox and gptj have parallel ones",
        ),
        ("head_bias", "has no bias there; gptj has"),
    ] {
        if fields.flag(field)? == Some(true) {
            let reason = format!("true contradicts `architecture` {}, which {what}", architecture.name());
            return Err(Error::invalid_config(field, reason));
        }
    }
    Ok(())
}

/// How many groups of layers share their parameters: of `share`, "none" gives each layer its own, "all" gives all the
/// same, and a number is that of the groups.
fn groups(fields: &Fields<'_>, layers: usize) -> Result<usize> {
    let Some(value) = fields.get("share") else {
        return Ok(layers);
    };
    let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
    match (value.as_str(), number) {
        (Some("none"), _) => Ok(layers),
        (Some("all"), _) => Ok(1),
        (None, Some(number)) if (1..=layers).contains(&number) => Ok(number),
        _ => {
            let reason = format!(
                "`{}`; it must be \"none\", \"all\", or a number of groups from 1 to the {layers} layers",
                shortened(value)
            );
            Err(Error::invalid_config("share", reason))
        }
    }
}

/// The number of groups of layers that share their parameters as the field `share` of a configuration says; none where
/// there is no such field. Fails with [`Error::InvalidConfig`] for what is not `none`, `all`, or from 1 to `layers`.
pub fn share_groups(settings: &Map<String, Value>, layers: usize) -> Result<Option<usize>> {
    let fields = Fields(settings);
    fields.get("share").map(|_| groups(&fields, layers)).transpose()
}

/// The decoder's shape as `models.config` shows it: every field under its own name, readable by [`from_settings`].
pub fn to_settings(config: &DecoderConfig) -> Map<String, Value> {
    let mut settings = Map::new();
    let mut set = |name: &str, value: Value| settings.insert(name.to_owned(), value);
    set("architecture", json!(config.architecture.name()));
    set("layers", json!(config.layers));
    set("width", json!(config.width));
    set("heads", json!(config.heads));
    set("key_value_heads", json!(config.key_value_heads));
    set("head_dim", json!(config.head_dim));
    set("feed_forward_width", json!(config.feed_forward_width));
    set("context_length", json!(config.context_length));
    set("vocabulary", json!(config.vocabulary));
    set("norm_epsilon", json!(config.norm_epsilon));
    set("activation", json!(config.activation.name()));
    set("attention_bias", json!(config.attention_bias));
    set("attention_output_bias", json!(config.attention_output_bias));
    set("feed_forward_bias", json!(config.feed_forward_bias));
    if config.query_key_norm != config.architecture.has_query_key_norm() {
        set("query_key_norm", json!(config.query_key_norm));
    }
    if let Some(experts) = &config.experts {
        set("num_experts", json!(experts.experts));
        set("num_experts_per_tok", json!(experts.per_token));
        set("norm_topk_prob", json!(experts.normalize));
        if experts.shared_width > 0 {
            set("shared_expert_intermediate_size", json!(experts.shared_width));
            set("shared_expert_gate", json!(experts.shared_gate));
        }
    }
    set("tied_head", json!(config.tied_head));
    if config.groups < config.layers {
        set("share", json!(config.groups));
    }
    for (name, value) in config.attention_pattern.settings() {
        set(&name, value);
    }
    if let Position::Rotary(rotary) = &config.position {
        if matches!(config.architecture, Architecture::GptNeox | Architecture::GptJ) {
            set("parallel_residual", json!(config.residual.is_parallel()));
            set("rotary_dim", json!(rotary.dim));
        }
        set("rope_theta", json!(rotary.theta));
        if let Some(scaling) = rotary.scaling.settings() {
            set("rope_scaling", scaling);
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(settings: Value) -> Result<DecoderConfig> {
        from_settings(settings.as_object().unwrap(), None)
    }

    fn tiny(architecture: &str) -> Value {
        json!({"architecture": architecture, "layers": 2, "width": 32, "heads": 4, "context_length": 16, "vocabulary": 99})
    }

    #[test]
    fn settings_survive_a_round_trip() {
        for architecture in Architecture::ALL {
            let config = read(tiny(architecture.name())).unwrap();
            assert_eq!(from_settings(&to_settings(&config), None).unwrap(), config);
        }
        let mut settings = tiny("llama");
        settings["rope_scaling"] = json!({"rope_type": "factors", "factors": [1.0, 2.0, 3.5, 4.25]});
        let config = read(settings).unwrap();
        assert_eq!(from_settings(&to_settings(&config), None).unwrap(), config);
        let mut settings = tiny("qwen2");
        settings["sliding_window"] = json!(7);
        settings["layer_types"] = json!(["full_attention", "sliding_attention"]);
        settings["attention_block_size"] = json!(5);
        let config = read(settings).unwrap();
        assert_eq!(config.attention_pattern.window_of(1), Some(7));
        assert_eq!(from_settings(&to_settings(&config), None).unwrap(), config);
        let mut settings = tiny("gpt2");
        settings["share"] = json!("all");
        let config = read(settings).unwrap();
        assert_eq!(config.groups, 1);
        assert_eq!(from_settings(&to_settings(&config), None).unwrap(), config);
    }

    #[test]
    fn transformers_names_are_aliases() {
        let settings = json!({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16,
            "vocab_size": 99, "learning_rate": 1e-3});
        assert_eq!(read(settings).unwrap(), read(tiny("gpt2")).unwrap());
    }

    #[test]
    fn bad_fields_are_named() {
        for (field, value) in [
            ("layerz", json!(2)),
            ("layers", json!(0)),
            ("heads", json!(5)),
            ("width", json!("wide")),
            ("vocabulary", json!(1e18)),
            ("share", json!(3)),
            ("share", json!(0)),
            ("share", json!("some")),
            ("dropout", json!(1)),
            ("learning_rate", json!("fast")),
            ("rope_theta", json!(10000)),
            ("attention_window", json!(0)),
            ("attention_pattern", json!(["banded"])),
            ("attention_block_size", json!("large")),
            ("n_layer", json!(2)),
            ("norm_epsilon", json!(1e-300)),
        ] {
            let mut settings = tiny("gpt2");
            settings[field] = value;
            let error = read(settings).unwrap_err().to_string();
            assert!(error.contains(field), "{field}: {error}");
        }
    }

    #[test]
    fn contradictions_name_both_fields() {
        for (architecture, fields, named) in [
            (
                "gpt2",
                json!({"parallel_residual": true}),
                ["parallel_residual", "architecture"],
            ),
            (
                "llama",
                json!({"use_parallel_residual": true}),
                ["parallel_residual", "architecture"],
            ),
            ("llama", json!({"rotary_pct": 0.5}), ["rotary_pct", "architecture"]),
            (
                "llama",
                json!({"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}),
                ["rope_scaling.factor", "f32"],
            ),
            ("llama", json!({"rope_theta": 1e308}), ["rope_theta", "1"]),
            (
                "olmoe",
                json!({"num_experts": 2, "shared_expert_gate": true}),
                ["shared_expert_gate", "shared_expert_intermediate_size"],
            ),
            (
                "mixtral",
                json!({"router_z_loss_coef": 1e300}),
                ["router_z_loss_coef", "f32"],
            ),
            (
                "qwen2",
                json!({"attention_output_bias": true}),
                ["attention_output_bias", "architecture"],
            ),
            ("qwen2", json!({"rotary_dim": 4}), ["rotary_dim", "architecture"]),
            ("gpt2", json!({"rotary_dim": 8}), ["rotary_dim", "architecture"]),
            ("gpt2", json!({"head_dim": 6}), ["head_dim", "width"]),
            ("gpt2", json!({"head_bias": true}), ["head_bias", "architecture"]),
            ("gpt_neox", json!({"head_dim": 6}), ["head_dim", "width"]),
            ("gpt_neox", json!({"heads": 5}), ["heads", "width"]),
            ("gpt_neox", json!({"key_value_heads": 2}), ["key_value_heads", "heads"]),
            (
                "gpt_neox",
                json!({"rotary_dim": 4, "rotary_pct": 0.25}),
                ["rotary_dim", "rotary_pct"],
            ),
            ("gpt_neox", json!({"rotary_dim": 9}), ["rotary_dim", "head_dim"]),
            (
                "gpt_neox",
                json!({"attention_bias": true, "attention_output_bias": false}),
                ["attention_output_bias", "attention_bias"],
            ),
            (
                "gptj",
                json!({"parallel_residual": false}),
                ["parallel_residual", "architecture"],
            ),
            ("gptj", json!({"rotary_dim": 3}), ["rotary_dim", "pairs"]),
            ("gptj", json!({"rope_theta": 5000}), ["rope_theta", "architecture"]),
            ("gptj", json!({"attention_bias": true}), ["attention_bias", "false"]),
            ("gptj", json!({"rotary_pct": 1.5}), ["rotary_pct", "1"]),
            (
                "llama",
                json!({"rope_theta": 500, "rope_scaling": {"rope_type": "default", "rope_theta": 1000}}),
                ["rope_scaling.rope_theta", "rope_theta 500"],
            ),
            (
                "llama",
                json!({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
                ["rotary_pct", "architecture"],
            ),
            (
                "gpt_neox",
                json!({"rotary_pct": 0.5, "rope_scaling": {"partial_rotary_factor": 0.25}}),
                ["rotary_pct", "rope_scaling.partial_rotary_factor"],
            ),
            (
                "llama",
                json!({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2}}),
                ["rope_scaling.rope_type", "type linear"],
            ),
            (
                "gpt2",
                json!({"layers": 1_u64 << 40, "attention_window": 2}),
                ["layers", "4096"],
            ),
            ("llama", json!({"layers": 1_u64 << 63}), ["layers", "4096"]),
        ] {
            let mut settings = tiny(architecture);
            for (field, value) in fields.as_object().unwrap() {
                settings[field] = value.clone();
            }
            let error = read(settings).unwrap_err().to_string();
            assert!(named.iter().all(|name| error.contains(name)), "{fields}: {error}");
        }
    }

    #[test]
    fn a_share_of_the_head_is_rotated() {
        let rotated = |architecture: &str, field: &str, value: Value| {
            let mut settings = tiny(architecture);
            settings[field] = value;
            let config = read(settings).unwrap();
            let Position::Rotary(rotary) = &config.position else {
                panic!()
            };
            assert_eq!(from_settings(&to_settings(&config), None).unwrap(), config);
            (rotary.dim, rotary.pairs())
        };
        assert_eq!(rotated("gpt_neox", "layers", json!(2)), (2, 1));
        assert_eq!(rotated("gpt_neox", "partial_rotary_factor", json!(0.7)), (5, 3));
        assert_eq!(rotated("gpt_neox", "rotary_pct", json!(0)), (0, 0));
        assert_eq!(rotated("gptj", "layers", json!(2)), (8, 4));
        assert_eq!(rotated("gptj", "rotary_dim", json!(6)), (6, 3));
        assert_eq!(rotated("llama", "rotary_pct", json!(1)), (8, 4));
        let nested = json!({"rope_type": "default", "partial_rotary_factor": 0.5});
        assert_eq!(rotated("gpt_neox", "rope_scaling", nested), (4, 2));
    }

    #[test]
    fn vocabulary_defaults_to_the_tokenizers() {
        let mut settings = tiny("gpt2");
        settings["vocabulary"] = Value::Null;
        assert!(read(settings.clone()).is_err());
        assert_eq!(
            from_settings(settings.as_object().unwrap(), Some(300))
                .unwrap()
                .vocabulary,
            300
        );
        settings["vocabulary"] = json!(200);
        assert!(from_settings(settings.as_object().unwrap(), Some(300)).is_err());
    }
}
