//! One run of an evaluation: rows come in, are scored between the model's other work, and come to a row of `evaluations`.
//!
//! ```text
//! rows ─▶ prepare (tokens, stretches) ─▶ score on the model's thread ─▶ totals ─▶ generations, timed ─▶ evaluation
//! ```

mod latency;
mod prepare;
mod run;
mod settings;

pub(super) use run::Run;
