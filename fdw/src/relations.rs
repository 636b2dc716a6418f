//! The foreign tables, one file each.

pub(crate) mod adapters;
mod batches;
mod checkpoints;
mod devices;
pub(crate) mod embeddings;
mod generation_tokens;
mod generations;
mod gradients;
mod kernel_benchmarks;
pub(crate) mod metrics;
mod models;
mod optimizer_steps;
mod parameters;
mod requests;
pub(crate) mod sampling;
mod tape;
mod tensors;
mod token_scores;
mod tokens;

pub(crate) use adapters::Adapters;
pub(crate) use batches::Batches;
pub(crate) use checkpoints::Checkpoints;
pub(crate) use devices::Devices;
pub(crate) use embeddings::Embeddings;
pub(crate) use generation_tokens::GenerationTokens;
pub(crate) use generations::Generations;
pub(crate) use gradients::Gradients;
pub(crate) use kernel_benchmarks::KernelBenchmarks;
pub(crate) use metrics::Metrics;
pub(crate) use models::Models;
pub(crate) use optimizer_steps::OptimizerSteps;
pub(crate) use parameters::Parameters;
pub(crate) use requests::Requests;
pub(crate) use tape::Tape;
pub(crate) use token_scores::TokenScores;
pub(crate) use tokens::Tokens;
