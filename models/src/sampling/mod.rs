//! Chooses the next token from the logits: penalties and bias first, then greedily, or by a seeded draw after temperature,
//! top-k, top-p and min-p.

mod adjustments;
mod candidates;
mod exponential;
mod options;
mod sampler;
mod top;

pub use options::{MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingOptions};
pub use sampler::{Sampled, Sampler};
