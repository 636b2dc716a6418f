//! The way back through each operation of the decoder: explicit, one operation to a file. Gradients of parameters are
//! added in place, f32. On the CPU the kernels of `candle-kernels-cpu` do the work; on other devices, and as the oracle in
//! the tests, the compositions in [`composed`].

mod accumulate;
mod activation;
mod attention;
pub(crate) mod composed;
mod dropout;
mod embedding;
mod experts;
mod frozen;
mod head;
mod linear;
mod low_rank;
mod norm;

pub(crate) use accumulate::{add_in_place, scale_in_place, with_optional_mut_slice};
pub(crate) use activation::activate_backward;
pub(crate) use attention::{AttentionTape, attention_backward, attention_forward};
pub(crate) use dropout::drop_in_place;
pub(crate) use embedding::{embedding_backward, gather_rows};
pub(crate) use experts::{ExpertMatrix, experts_backward, experts_forward};
pub(crate) use frozen::{frozen_head, frozen_linear_backward};
pub(crate) use head::cross_entropy_head;
pub(crate) use linear::{Matrix, OutputGradient, linear_backward, linear_forward};
pub(crate) use low_rank::{InputDropout, LowRankFactors, low_rank_backward, low_rank_forward};
pub(crate) use norm::NormWeights;

#[cfg(test)]
mod tests;
