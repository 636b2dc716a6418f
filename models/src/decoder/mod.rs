//! The one decoder: every family is this code with another [`DecoderConfig`](crate::DecoderConfig).

mod adapted;
mod build;
mod cache;
mod expert_weights;
mod experts;
mod forward;
mod fused_experts;
mod initialize;
mod layout;
mod load;
mod memory;
mod names;
mod parameters;
mod regroup;
mod remote;
mod score;
mod structure;
mod weight;

use adapted::Adapted;
pub(crate) use adapted::Factors;
pub use cache::{CacheUsage, KeyValueCache, PAGE_POSITIONS, PageMemory, PagePool, Place, Scope};
pub use expert_weights::{ExpertDigest, ExpertGradient, ExpertWeights};
pub use forward::SequenceStep;
pub(crate) use fused_experts::{ExpertTensors, FusedExperts};
pub use layout::{
    ExpertLayer, FeedForward, Layer, Layout, LowRank, NormParameters, ParameterId, ParameterInfo, ParameterRole,
    Projection, QueryKeyValue,
};
pub(crate) use load::check_source;
pub use load::load_decoder;
pub use memory::check_memory;
pub use names::ignored_tensor;
pub(crate) use names::{name_of_stored, stored_name};
pub use parameters::ParameterData;
pub use remote::{ExpertRows, ExpertsCall, GatedRows, Pending, RemoteExperts};
pub use score::{LossPass, as_scores, next_tokens};
pub use structure::Decoder;
pub use weight::{Weight, WeightType};
