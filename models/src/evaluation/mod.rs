//! Evaluation: how well a model predicts texts, which of several choices it thinks the likeliest, and what a run of either
//! comes to.
//!
//! Everything is computed from [`Stretch`]es: tokens that are read at once, of which the last ones have targets. A text is
//! cut into stretches by [`windows()`], a choice of a question is one stretch ([`Question`]); [`Decoder::score_stretches`]
//! scores many of them in one pass.
//!
//! [`Decoder::score_stretches`]: crate::Decoder::score_stretches

mod digest;
mod percentile;
mod question;
mod sample;
mod stretches;
mod summary;
mod windows;

pub use digest::DatasetDigest;
pub use percentile::percentile;
pub use question::{Continuation, Question, Verdict};
pub use sample::Sample;
pub use stretches::{Scores, Stretch};
pub use summary::{Answers, TextTotals};
pub use windows::windows;
