//! GPT-NeoX (arXiv:2204.06745): what is its own in each kind of source.

use super::fields::Fields;
use super::gguf::{GgufTensorFacts, Keys, heads_and_width, rotary as gguf_rotary};
use super::hugging_face::{agreeing, rotary_scaling, rotary_scaling_of};
use super::rotary_fields::{rotary_dim, share_of};
use super::shape::Shape;
use super::{Activation, Architecture, DecoderConfig, Norm, Position, Residual, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use candle_kernels_cpu::RotaryLayout;

/// What llama.cpp calls the family.
pub(super) const GGUF_NAME: &str = "gptneox";
/// transformers' share of a head that is rotated where its configuration says nothing.
const ROTARY_SHARE: f64 = 0.25;

/// A decoder of the family in that shape.
struct Family {
    activation: Activation,
    feed_forward_width: usize,
    norm_epsilon: f64,
    parallel: bool,
    rotary: RotaryConfig,
    bias: bool,
    tied_head: bool,
}

impl Family {
    fn config(self, shape: &Shape) -> DecoderConfig {
        DecoderConfig {
            feed_forward_width: self.feed_forward_width,
            norm: Norm::Layer,
            norm_epsilon: self.norm_epsilon,
            activation: self.activation,
            residual: match self.parallel {
                true => Residual::Parallel,
                false => Residual::Sequential,
            },
            position: Position::Rotary(self.rotary),
            attention_bias: self.bias,
            attention_output_bias: self.bias,
            tied_head: self.tied_head,
            ..shape.config(Architecture::GptNeox)
        }
    }
}

/// From `models.config`, in its own names. Defaults: `feed_forward_width` = 4 `width`, `parallel_residual` true, a quarter
/// of a head rotated, `attention_bias` true, activation gelu.
pub(super) fn from_settings(fields: &Fields<'_>, tokenizer_size: Option<usize>) -> Result<DecoderConfig> {
    let shape = Shape::read(fields, tokenizer_size)?;
    shape.expect_plain_heads(Architecture::GptNeox)?;
    fields.expect_flag("feed_forward_bias", true)?;
    fields.expect_flag("head_bias", false)?;
    let bias = fields.flag("attention_bias")?.unwrap_or(true);
    if fields
        .flag("attention_output_bias")?
        .is_some_and(|output| output != bias)
    {
        let reason = format!("{} contradicts attention_bias {bias}; gpt_neox has both or none", !bias);
        return Err(Error::invalid_config("attention_output_bias", reason));
    }
    let default = share_of("rotary_pct", ROTARY_SHARE, shape.head_dim)?;
    let rotary = RotaryConfig {
        theta: agreeing(fields, &["rope_theta"])?.unwrap_or(10_000.0),
        scaling: match fields.object("rope_scaling")? {
            Some(scaling) => rotary_scaling(&scaling, shape.context_length)?,
            None => RotaryScaling::None,
        },
        dim: rotary_dim(fields, shape.head_dim)?.unwrap_or(default),
        layout: RotaryLayout::HalfSplit,
    };
    let family = Family {
        activation: Activation::from_name("activation", fields.text("activation")?.unwrap_or("gelu"))?,
        feed_forward_width: fields
            .size("feed_forward_width")?
            .unwrap_or(shape.width.saturating_mul(4)),
        norm_epsilon: fields.number("norm_epsilon")?.unwrap_or(1e-5),
        parallel: fields.flag("parallel_residual")?.unwrap_or(true),
        rotary,
        bias,
        tied_head: fields.flag("tied_head")?.unwrap_or(true),
    };
    Ok(family.config(&shape))
}

/// From transformers' `config.json`, with its defaults.
pub(super) fn from_hugging_face(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let shape = Shape {
        layers: fields.required_size("num_hidden_layers")?,
        width: fields.required_size("hidden_size")?,
        heads: fields.required_size("num_attention_heads")?,
        key_value_heads: fields.required_size("num_attention_heads")?,
        head_dim: 0,
        context_length: fields.required_size("max_position_embeddings")?,
        vocabulary: fields.required_size("vocab_size")?,
    };
    let shape = shape.divided("num_attention_heads", "hidden_size")?;
    if let Some(head_dim) = fields.size("head_dim")?.filter(|given| *given != shape.head_dim) {
        let reason = format!(
            "{head_dim} contradicts hidden_size {} over num_attention_heads {}, which is {}",
            shape.width, shape.heads, shape.head_dim
        );
        return Err(Error::invalid_config("head_dim", reason));
    }
    let theta = agreeing(fields, &["rope_theta", "rotary_emb_base"])?;
    let share = agreeing(fields, &["partial_rotary_factor", "rotary_pct"])?;
    let family = Family {
        activation: Activation::from_name("hidden_act", fields.text("hidden_act")?.unwrap_or("gelu"))?,
        feed_forward_width: fields.required_size("intermediate_size")?,
        norm_epsilon: fields.number("layer_norm_eps")?.unwrap_or(1e-5),
        parallel: fields.flag("use_parallel_residual")?.unwrap_or(true),
        rotary: RotaryConfig {
            theta: theta.unwrap_or(10_000.0),
            scaling: rotary_scaling_of(fields, shape.context_length)?,
            dim: share_of("rotary_pct", share.unwrap_or(ROTARY_SHARE), shape.head_dim)?,
            layout: RotaryLayout::HalfSplit,
        },
        bias: fields.flag("attention_bias")?.unwrap_or(true),
        tied_head: fields.flag("tie_word_embeddings")?.unwrap_or(false),
    };
    Ok(family.config(&shape))
}

/// From GGUF metadata. It does not tell the activation, which is taken for transformers' default.
pub(super) fn from_gguf(keys: &Keys<'_>, facts: &GgufTensorFacts) -> Result<DecoderConfig> {
    let (heads, width, head_dim) = heads_and_width(keys)?;
    let shape = Shape {
        layers: keys.required_size("block_count")?,
        width,
        heads,
        key_value_heads: heads,
        head_dim,
        context_length: keys.required_size("context_length")?,
        vocabulary: facts.vocabulary,
    };
    shape.expect_plain_heads(Architecture::GptNeox)?;
    if facts.attention_bias != facts.attention_output_bias {
        let message = format!("{}: biases on some projections of attention only", keys.architecture);
        return Err(Error::Unsupported(message));
    }
    let dim = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
    let family = Family {
        activation: Activation::GeluErf,
        feed_forward_width: keys.required_size("feed_forward_length")?,
        norm_epsilon: keys.required_number("attention.layer_norm_epsilon")?,
        parallel: keys.flag("use_parallel_residual")?.unwrap_or(true),
        rotary: gguf_rotary(keys, facts, dim)?,
        bias: facts.attention_bias,
        tied_head: !facts.untied_head,
    };
    Ok(family.config(&shape))
}
