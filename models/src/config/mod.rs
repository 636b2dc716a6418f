//! What a decoder looks like: one validated description, read from three kinds of source.

mod attention;
mod decoder_config;
mod expert_servers;
mod experts;
mod fields;
mod gguf;
mod gpt_neox;
mod gptj;
mod hugging_face;
mod known_fields;
mod presets;
mod rotary;
mod rotary_fields;
mod settings;
mod shape;

pub use attention::AttentionPattern;
pub use decoder_config::{Activation, Architecture, DecoderConfig, Norm, Position, Residual};
pub use expert_servers::{ExpertServer, expert_servers};
pub(crate) use experts::stored_balance_loss;
pub use experts::{ExpertsConfig, check_router_settings};
pub(crate) use fields::{Fields, shortened};
pub use gguf::{GgufTensorFacts, from_gguf};
pub use hugging_face::from_hugging_face;
pub use rotary::{RotaryConfig, RotaryScaling};
pub use settings::{TRAINING_FIELDS, from_settings, normalize_settings, share_groups, to_settings};
