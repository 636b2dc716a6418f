//! GPT-J (Wang and Komatsuzaki 2021): what is its own in each kind of source.

use super::fields::Fields;
use super::rotary_fields::rotary_dim;
use super::shape::Shape;
use super::{Activation, Architecture, DecoderConfig, Norm, Position, Residual, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use candle_kernels_cpu::RotaryLayout;

/// transformers' `rotary_dim` where its configuration says nothing.
const ROTARY_DIM: usize = 64;
/// The only base that the family knows.
const THETA: f64 = 10_000.0;

/// From `models.config`, in its own names. Defaults: `feed_forward_width` = 4 `width`, `rotary_dim` 64 or `head_dim` where
/// that is less, activation gelu_new.
pub(super) fn from_settings(fields: &Fields<'_>, tokenizer_size: Option<usize>) -> Result<DecoderConfig> {
    let shape = Shape::read(fields, tokenizer_size)?;
    shape.expect_plain_heads(Architecture::GptJ)?;
    for (field, value) in [
        ("attention_bias", false),
        ("attention_output_bias", false),
        ("feed_forward_bias", true),
        ("head_bias", true),
    ] {
        fields.expect_flag(field, value)?;
    }
    if fields.flag("parallel_residual")? == Some(false) {
        let reason = "false contradicts `architecture` gptj, whose layers have one norm; gpt_neox has a choice";
        return Err(Error::invalid_config("parallel_residual", reason));
    }
    if let Some(theta) = fields.number("rope_theta")?.filter(|theta| *theta != THETA) {
        let reason = format!("{theta} contradicts `architecture` gptj, which knows only {THETA}");
        return Err(Error::invalid_config("rope_theta", reason));
    }
    if fields.get("rope_scaling").is_some() {
        let reason = "it contradicts `architecture` gptj, which has no scaling";
        return Err(Error::invalid_config("rope_scaling", reason));
    }
    let dim = rotary_dim(fields, shape.head_dim)?;
    let mut config = family(&shape, dim.unwrap_or(ROTARY_DIM.min(shape.head_dim)));
    config.feed_forward_width = fields
        .size("feed_forward_width")?
        .unwrap_or(shape.width.saturating_mul(4));
    config.norm_epsilon = fields.number("norm_epsilon")?.unwrap_or(1e-5);
    config.activation = Activation::from_name("activation", fields.text("activation")?.unwrap_or("gelu_new"))?;
    config.tied_head = fields.flag("tied_head")?.unwrap_or(true);
    Ok(config)
}

/// From transformers' `config.json`, with its defaults.
pub(super) fn from_hugging_face(fields: &Fields<'_>) -> Result<DecoderConfig> {
    // `rotary` stands in the original GPT-J's file, and no version of transformers reads it.
    for (field, value) in [("rotary", true), ("scale_attn_weights", true)] {
        fields.expect_flag(field, value)?;
    }
    if fields.0.get("rotary_dim").is_some_and(serde_json::Value::is_null) {
        return Err(Error::invalid_config("rotary_dim", "null; give the number of elements"));
    }
    let shape = Shape {
        layers: fields.required_size("n_layer")?,
        width: fields.required_size("n_embd")?,
        heads: fields.required_size("n_head")?,
        key_value_heads: fields.required_size("n_head")?,
        head_dim: 0,
        context_length: fields.required_size("n_positions")?,
        vocabulary: fields.required_size("vocab_size")?,
    };
    let shape = shape.divided("n_head", "n_embd")?;
    let mut config = family(&shape, fields.size("rotary_dim")?.unwrap_or(ROTARY_DIM));
    config.feed_forward_width = fields.size("n_inner")?.unwrap_or(shape.width.saturating_mul(4));
    config.norm_epsilon = fields.number("layer_norm_epsilon")?.unwrap_or(1e-5);
    let activation = fields.text("activation_function")?.unwrap_or("gelu_new");
    config.activation = Activation::from_name("activation_function", activation)?;
    config.tied_head = fields.flag("tie_word_embeddings")?.unwrap_or(false);
    Ok(config)
}

/// A decoder of the family in that shape; the caller sets what differs.
fn family(shape: &Shape, rotary_dim: usize) -> DecoderConfig {
    DecoderConfig {
        norm: Norm::Layer,
        residual: Residual::ParallelSharedNorm,
        position: Position::Rotary(RotaryConfig {
            theta: THETA,
            scaling: RotaryScaling::None,
            dim: rotary_dim,
            layout: RotaryLayout::Interleaved,
        }),
        attention_bias: false,
        attention_output_bias: false,
        head_bias: true,
        ..shape.config(Architecture::GptJ)
    }
}
