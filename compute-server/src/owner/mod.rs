//! One OS thread per model owns everything about it that changes: weights, optimizer, accumulated gradient, training
//! log, what transactions staged, and the generations that run. Everybody else holds a [`ModelHandle`] and sends work.
//!
//! The thread goes round: take the work that arrived, serve readers of parameters, generate one token for every active
//! sequence, run one micro-batch of training. Nothing in it ever waits for a client.

mod accumulated;
mod adapter;
mod attention;
mod base;
mod embedding;
mod evaluating;
mod experts;
mod factors;
mod generation;
mod handle;
mod log_row;
mod merging;
mod output;
mod overlay;
mod paging;
mod passes;
mod places;
mod precision;
mod publishing;
mod reading;
mod recording;
mod replaying;
mod round;
mod routers;
mod run;
mod saving;
mod scoring;
mod sequence;
mod settings;
mod sharing;
mod staging;
mod state;
mod tape;
mod training;
mod turns;
mod writing;

pub(crate) use embedding::EmbeddingRequest;
pub(crate) use experts::{BackwardCall, Computed, ForwardCall, Loan};
pub(crate) use factors::AppliedAdapter;
pub(crate) use generation::GenerationRequest;
pub(crate) use handle::{ModelHandle, NewBase, NewModel};
pub(crate) use log_row::from_json as log_row_from_json;
pub(crate) use merging::{GradientChunk, SourceWeight};
pub(crate) use output::{OutputStream, Step, keep_place};
pub(crate) use overlay::{Ticket, TransactionId, View};
pub(crate) use reading::{ChunkReader, Selection};
pub(crate) use recording::Recorded;
pub(crate) use saving::Saving;
pub(crate) use settings::TrainingSettings;
pub(crate) use sharing::set_share;
pub(crate) use state::Owner;
pub(crate) use training::{Target, Trained, TrainingRequest};
pub(crate) use writing::unknown_parameter;
