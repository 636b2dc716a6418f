//! What a decoder looks like: one validated description, read from three kinds of source.

mod attention;
mod decoder_config;
mod fields;
mod gguf;
mod hugging_face;
mod rotary;
mod settings;

pub use attention::AttentionPattern;
pub use decoder_config::{Activation, Architecture, DecoderConfig, Norm, Position};
pub(crate) use fields::{Fields, shortened};
pub use gguf::{GgufTensorFacts, from_gguf};
pub use hugging_face::from_hugging_face;
pub use rotary::{RotaryConfig, RotaryScaling};
pub use settings::{TRAINING_FIELDS, from_settings, normalize_settings, share_groups, to_settings};
