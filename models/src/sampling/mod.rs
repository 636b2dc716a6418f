//! Chooses the next token from the logits: greedy, or a seeded draw after temperature, top-k, top-p and min-p.

mod candidates;
mod exponential;
mod options;
mod sampler;

pub use options::SamplingOptions;
pub use sampler::{Sampled, Sampler};
