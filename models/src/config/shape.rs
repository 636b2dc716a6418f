//! The sizes that `models.config` gives for every family.

use super::fields::Fields;
use super::{Activation, Architecture, AttentionPattern, DecoderConfig, Norm, Position, Residual, presets};
use crate::error::{Error, Result};

/// The sizes that all families share.
pub(super) struct Shape {
    pub(super) layers: usize,
    pub(super) width: usize,
    pub(super) heads: usize,
    pub(super) key_value_heads: usize,
    pub(super) head_dim: usize,
    pub(super) context_length: usize,
    pub(super) vocabulary: usize,
}

impl Shape {
    /// With the width divided among the heads; the fields' names are for the error.
    pub(super) fn divided(self, heads: &str, width: &str) -> Result<Self> {
        match self.width.checked_div(self.heads) {
            Some(head_dim) if head_dim * self.heads == self.width => Ok(Self { head_dim, ..self }),
            _ => Err(Error::invalid_config(
                heads,
                format!("{} does not divide {width} {}", self.heads, self.width),
            )),
        }
    }

    /// Refuses what families without grouped queries or heads of their own width do not have.
    pub(super) fn expect_plain_heads(&self, architecture: Architecture) -> Result<()> {
        let (name, heads, head_dim) = (architecture.name(), self.heads, self.head_dim);
        if self.key_value_heads != heads {
            let reason = format!("{name} has as many key-value heads as heads, which are {heads}");
            return Err(Error::invalid_config("key_value_heads", reason));
        }
        let whole = heads.checked_mul(head_dim) == Some(self.width);
        let printed = architecture == Architecture::Gpt2 && presets::is_printed(self.width, heads, head_dim);
        if !whole && !printed {
            let reason = format!(
                "{head_dim} times heads {heads} contradicts width {}; in {name} they are equal",
                self.width
            );
            return Err(Error::invalid_config("head_dim", reason));
        }
        Ok(())
    }

    pub(super) fn read(fields: &Fields<'_>, tokenizer_size: Option<usize>) -> Result<Self> {
        let width = fields.required_size("width")?;
        let heads = fields.required_size("heads")?;
        let head_dim = match fields.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && width % heads == 0 => width / heads,
            None => {
                return Err(Error::invalid_config(
                    "heads",
                    format!("{heads} does not divide width {width}"),
                ));
            }
        };
        let missing = || Error::invalid_config("vocabulary", "missing, and there is no tokenizer to take it from");
        Ok(Self {
            layers: fields.required_size("layers")?,
            width,
            heads,
            key_value_heads: fields.size("key_value_heads")?.unwrap_or(heads),
            head_dim,
            context_length: fields.required_size("context_length")?,
            vocabulary: fields.size("vocabulary")?.or(tokenizer_size).ok_or_else(missing)?,
        })
    }

    /// GPT-2's kind of decoder in this shape; the caller sets what differs.
    pub(super) fn config(&self, architecture: Architecture) -> DecoderConfig {
        DecoderConfig {
            architecture,
            layers: self.layers,
            width: self.width,
            heads: self.heads,
            key_value_heads: self.key_value_heads,
            head_dim: self.head_dim,
            feed_forward_width: 0,
            context_length: self.context_length,
            vocabulary: self.vocabulary,
            norm: Norm::Layer,
            norm_epsilon: 1e-5,
            activation: Activation::GeluTanh,
            gated: false,
            residual: Residual::Sequential,
            position: Position::Learned,
            attention_pattern: AttentionPattern::default(),
            attention_bias: true,
            attention_output_bias: true,
            feed_forward_bias: true,
            tied_head: true,
            head_bias: false,
            query_key_norm: false,
            experts: None,
            groups: self.layers,
        }
    }
}
