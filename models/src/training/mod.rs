//! Training: a forward pass that keeps what backward needs, backward, the accumulated gradient, AdamW, checkpoints.
//!
//! ```text
//! TrainingSequence ─▶ Packed ─▶ forward ─▶ Tape ─▶ backward ─▶ Gradient ─▶ AdamW ─▶ Decoder
//! ```

mod accumulate;
mod activations;
mod adamw;
mod backward;
pub mod checkpoint;
mod digest;
mod dropout;
mod expert_load;
mod experts;
mod forward;
mod gradient;
mod gradient_data;
mod half_weights;
mod layout;
mod listing;
mod options;
mod packed;
mod precision;
mod remote;
mod retention;
mod router;
mod schedule;
mod sequence;
mod settings;
mod stored;
mod tape;

use accumulate::{Pass, check_cancelled};

pub(crate) use layout::change_range;

pub use accumulate::{PassOptions, PassReport, SequenceLoss, accumulate, accumulate_in_place};
pub use activations::{ActivationSettings, Compression, Recompute};
pub use adamw::{AdamW, StepReport};
pub use digest::digest;
pub use dropout::{DropoutKey, DropoutSettings};
pub use expert_load::ExpertLoad;
pub use gradient::Gradient;
pub use gradient_data::GradientData;
pub use half_weights::HalfWeights;
pub use listing::{ActivationStorage, TapeEntry};
pub use options::AdamWOptions;
pub use packed::leading_sequences;
pub use precision::{LossScale, LossScaling, Precision, PrecisionSettings};
pub use retention::Retention;
pub use router::RouterSettings;
pub use schedule::{Schedule, ScheduleKind};
pub use sequence::{IGNORED_TARGET, TrainingSequence};
pub use settings::TrainingSettings;
