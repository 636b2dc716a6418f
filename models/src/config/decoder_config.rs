//! The validated description of a decoder.

use super::{AttentionPattern, ExpertsConfig, RotaryConfig, RotaryScaling};
use crate::error::{Error, Result};
use candle_kernels_cpu::RotaryLayout;

/// A family as transformers' `model_type` names it. It decides parameter names and defaults; everything that the
/// computation depends on is a field of [`DecoderConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, tied head, fused query-key-value projection.
    Gpt2,
    /// Llama (arXiv:2302.13971): rotary positions, RMSNorm, SwiGLU, grouped-query attention.
    Llama,
    /// Mistral (arXiv:2310.06825): Llama's layout, with a sliding window.
    Mistral,
    /// Qwen 2 (arXiv:2407.10671): Llama's layout with biases on query, key and value.
    Qwen2,
    /// GPT-NeoX (arXiv:2204.06745) and Pythia: partly rotated heads, attention and feed-forward network side by side.
    GptNeox,
    /// GPT-J (Wang and Komatsuzaki 2021): as GPT-NeoX with one norm for both, pairs of neighbouring elements, biases only
    /// in the feed-forward network and the head.
    GptJ,
    /// Mixtral (arXiv:2401.04088): Mistral's layout with a mixture of experts in each layer.
    Mixtral,
    /// OLMoE (arXiv:2409.02060): a mixture of many small experts, and norms on queries and keys.
    Olmoe,
    /// Qwen 2 MoE (arXiv:2407.10671): Qwen 2's layout with a mixture of experts, one of which every token goes to.
    Qwen2Moe,
}

impl Architecture {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::Gpt2,
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::GptNeox,
        Self::GptJ,
        Self::Mixtral,
        Self::Olmoe,
        Self::Qwen2Moe,
    ];

    /// Whether models of this family normalise queries and keys, where nothing else is said.
    pub(crate) fn has_query_key_norm(self) -> bool {
        self == Self::Olmoe
    }

    /// transformers' `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt2 => "gpt2",
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::GptNeox => "gpt_neox",
            Self::GptJ => "gptj",
            Self::Mixtral => "mixtral",
            Self::Olmoe => "olmoe",
            Self::Qwen2Moe => "qwen2_moe",
        }
    }

    /// The architecture of that name. Fails with [`Error::Unsupported`], listing those known.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|architecture| architecture.name() == name)
            .ok_or_else(|| {
                let known: Vec<_> = Self::ALL.iter().map(|architecture| architecture.name()).collect();
                Error::Unsupported(format!("unknown architecture `{name}`; known are {}", known.join(", ")))
            })
    }
}

/// Normalisation before attention, before the feed-forward network, and at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// LayerNorm with weight and bias (arXiv:1607.06450).
    Layer,
    /// RMSNorm with weight (arXiv:1910.07467).
    Rms,
}

/// What a layer's feed-forward network reads, and so how many norms the layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// The stream after attention, by a norm of its own.
    Sequential,
    /// The layer's input, as attention does, by a norm of its own; the layer adds the outputs of both to its input.
    Parallel,
    /// As `Parallel`, by the norm of attention.
    ParallelSharedNorm,
}

impl Residual {
    /// Whether attention and the feed-forward network read the same.
    #[must_use]
    pub fn is_parallel(self) -> bool {
        self != Self::Sequential
    }
}

/// Nonlinearity of the feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU by its tanh approximation (arXiv:1606.08415), transformers' `gelu_new`.
    GeluTanh,
    /// GELU by the error function, transformers' `gelu`.
    GeluErf,
    /// SiLU, x * sigmoid(x) (arXiv:1702.03118).
    Silu,
}

impl Activation {
    /// transformers' name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::GeluTanh => "gelu_new",
            Self::GeluErf => "gelu",
            Self::Silu => "silu",
        }
    }

    /// The activation of that name, transformers' synonyms included. Fails with [`Error::InvalidConfig`] on `field`.
    pub fn from_name(field: &str, name: &str) -> Result<Self> {
        match name {
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_tanh" => Ok(Self::GeluTanh),
            "gelu" | "gelu_erf" => Ok(Self::GeluErf),
            "silu" | "swish" => Ok(Self::Silu),
            _ => Err(Error::invalid_config(
                field,
                format!("unknown activation `{name}`; known are gelu_new, gelu and silu"),
            )),
        }
    }
}

/// How a token's position enters.
#[derive(Debug, Clone, PartialEq)]
pub enum Position {
    /// A learned vector per position, added to the token's embedding.
    Learned,
    /// Queries and keys are rotated.
    Rotary(RotaryConfig),
}

/// The shape and the kind of a decoder. Built by [`from_hugging_face`](super::from_hugging_face),
/// [`from_gguf`](super::from_gguf) or [`from_settings`](super::from_settings), all of which validate it.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Family.
    pub architecture: Architecture,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Width of the inner layer of the feed-forward network, or of each expert.
    pub feed_forward_width: usize,
    /// Longest sequence, in tokens.
    pub context_length: usize,
    /// Number of rows of the embedding; at least the number of the tokenizer's tokens.
    pub vocabulary: usize,
    /// Kind of normalisation.
    pub norm: Norm,
    /// Added to the variance before the root is taken.
    pub norm_epsilon: f64,
    /// Nonlinearity of the feed-forward network.
    pub activation: Activation,
    /// Whether the activation's output multiplies a second projection (GLU variants, arXiv:2002.05202).
    pub gated: bool,
    /// What the feed-forward network reads.
    pub residual: Residual,
    /// Kind of positions.
    pub position: Position,
    /// Whether queries and keys are normalised, each over the width of all heads, before they are rotated.
    pub query_key_norm: bool,
    /// The mixture of experts in the place of each layer's feed-forward network; none where that is dense.
    pub experts: Option<ExpertsConfig>,
    /// Which tokens a layer's attention sees.
    pub attention_pattern: AttentionPattern,
    /// Whether the query, key and value projections have biases.
    pub attention_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub attention_output_bias: bool,
    /// Whether the feed-forward network's projections have biases.
    pub feed_forward_bias: bool,
    /// Whether the output head is the token embedding.
    pub tied_head: bool,
    /// Whether the output head has a bias.
    pub head_bias: bool,
    /// Number of groups of consecutive layers that have their parameters in common (ALBERT, arXiv:1909.11942); as many
    /// as layers where none are shared.
    pub groups: usize,
}

/// Above any model this code can serve; keeps every product of two sizes far from overflow.
const MAX_SIZE: usize = 1 << 28;
/// Most layers.
const MAX_LAYERS: usize = 1 << 12;
/// Above this many parameters nothing is tried: it is a mistyped configuration.
const MAX_PARAMETERS: u64 = 1 << 40;

/// Refuses a number of layers before anything of that length is made.
pub(super) fn check_layers(layers: usize) -> Result<()> {
    check_size("layers", layers, MAX_LAYERS)
}

/// Whether a number is still above 0 and finite in f32, in which it is computed with.
fn is_single(value: f64) -> bool {
    let value = value as f32;
    value.is_finite() && value > 0.0
}

fn check_size(field: &str, size: usize, max: usize) -> Result<()> {
    match (1..=max).contains(&size) {
        true => Ok(()),
        false => Err(Error::invalid_config(
            field,
            format!("{size} is not between 1 and {max}"),
        )),
    }
}

impl DecoderConfig {
    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn key_value_width(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    /// The first layer of the group that a layer belongs to. Groups differ by at most one layer in size.
    pub fn first_of_group(&self, layer: usize) -> usize {
        let group = layer * self.groups / self.layers;
        (group * self.layers).div_ceil(self.groups)
    }

    /// Factor on the attention scores, 1 / sqrt(head_dim).
    pub fn attention_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Number of parameters, tied and shared ones counted once.
    pub fn parameter_count(&self) -> u64 {
        let (width, inner) = (self.width as u64, self.feed_forward_width as u64);
        let (query, key_value) = (self.query_width() as u64, self.key_value_width() as u64);
        let bias = |present: bool, size: u64| if present { size } else { 0 };
        let norm = if self.norm == Norm::Layer { 2 * width } else { width };
        let attention = width * (query + 2 * key_value)
            + bias(self.attention_bias, query + 2 * key_value)
            + query * width
            + bias(self.attention_output_bias, width);
        let projections_in = if self.gated { 2 } else { 1 };
        let feed_forward = match &self.experts {
            Some(experts) => experts.parameter_count(width, inner),
            None => width * inner * (projections_in + 1) + bias(self.feed_forward_bias, inner * projections_in + width),
        };
        let attention = attention + bias(self.query_key_norm, query + key_value);
        let embedding = self.vocabulary as u64 * width;
        let positions = bias(self.position == Position::Learned, self.context_length as u64 * width);
        let head = bias(!self.tied_head, embedding) + bias(self.head_bias, self.vocabulary as u64);
        let norms = if self.residual == Residual::ParallelSharedNorm {
            norm
        } else {
            2 * norm
        };
        embedding + positions + head + norm + self.groups as u64 * (norms + attention + feed_forward)
    }

    /// Checks sizes and the relations between them. Fails with [`Error::InvalidConfig`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("layers", self.layers, MAX_LAYERS),
            ("width", self.width, 1 << 20),
            ("heads", self.heads, 1 << 14),
            ("key_value_heads", self.key_value_heads, 1 << 14),
            ("head_dim", self.head_dim, 1 << 14),
            ("feed_forward_width", self.feed_forward_width, 1 << 24),
            ("context_length", self.context_length, MAX_SIZE),
            ("vocabulary", self.vocabulary, MAX_SIZE),
        ];
        for (field, size, max) in sizes {
            check_size(field, size, max)?;
        }
        if self.groups == 0 || self.groups > self.layers {
            let reason = format!("{} groups of {} layers", self.groups, self.layers);
            return Err(Error::invalid_config("share", reason));
        }
        if !self.heads.is_multiple_of(self.key_value_heads) {
            return Err(Error::invalid_config(
                "key_value_heads",
                format!(
                    "{} does not divide the {} query heads",
                    self.key_value_heads, self.heads
                ),
            ));
        }
        if !(is_single(self.norm_epsilon) && self.norm_epsilon < 1.0) {
            return Err(Error::invalid_config(
                "norm_epsilon",
                format!("{} is not between 0 and 1", self.norm_epsilon),
            ));
        }
        self.validate_position()?;
        self.experts.as_ref().map_or(Ok(()), ExpertsConfig::validate)?;
        if self.experts.is_some() && self.feed_forward_bias {
            return Err(Error::invalid_config("feed_forward_bias", "experts have no biases"));
        }
        if self.parameter_count() > MAX_PARAMETERS {
            return Err(Error::invalid_config(
                "layers",
                format!(
                    "the sizes ask for {} parameters, more than {MAX_PARAMETERS}",
                    self.parameter_count()
                ),
            ));
        }
        Ok(())
    }

    fn validate_position(&self) -> Result<()> {
        let Position::Rotary(rotary) = &self.position else {
            return Ok(());
        };
        let (dim, head_dim) = (rotary.dim, self.head_dim);
        if dim == head_dim && !dim.is_multiple_of(2) {
            let reason = format!("{dim} is odd; rotary positions need pairs");
            return Err(Error::invalid_config("head_dim", reason));
        }
        if 2 * rotary.pairs() > head_dim {
            let reason = format!("{dim} is more than head_dim {head_dim}");
            return Err(Error::invalid_config("rotary_dim", reason));
        }
        if rotary.layout == RotaryLayout::Interleaved && (dim == 0 || !dim.is_multiple_of(2)) {
            let reason = format!("{dim} is not even and above 0; neighbouring elements are rotated in pairs");
            return Err(Error::invalid_config("rotary_dim", reason));
        }
        if !(is_single(rotary.theta) && rotary.theta >= 1.0) {
            return Err(Error::invalid_config(
                "rope_theta",
                format!("{} is not at least 1", rotary.theta),
            ));
        }
        let positive = |field: &str, value: f64| match is_single(value) {
            true => Ok(()),
            false => Err(Error::invalid_config(
                format!("rope_scaling.{field}"),
                format!("{value} is not above 0 and within f32"),
            )),
        };
        match &rotary.scaling {
            RotaryScaling::None => Ok(()),
            RotaryScaling::Linear { factor } => positive("factor", *factor),
            RotaryScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_context_length,
            } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_frequency_factor)?;
                positive("high_freq_factor", *high_frequency_factor)?;
                positive("original_max_position_embeddings", *original_context_length as f64)?;
                match high_frequency_factor > low_frequency_factor {
                    true => Ok(()),
                    false => Err(Error::invalid_config(
                        "rope_scaling.high_freq_factor",
                        format!("{high_frequency_factor} is not above low_freq_factor {low_frequency_factor}"),
                    )),
                }
            }
            RotaryScaling::Factors(factors) if factors.len() != rotary.pairs() => Err(Error::invalid_config(
                "rope_scaling",
                format!("{} factors where there are {} pairs", factors.len(), rotary.pairs()),
            )),
            RotaryScaling::Factors(factors) => factors
                .iter()
                .try_for_each(|factor| positive("factors", f64::from(*factor))),
        }
    }
}
