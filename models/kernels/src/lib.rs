//! Fused CPU kernels for decoder inference and training: slices in, slices out.
//!
//! Matrices are row-major `f32` slices; shapes are given in brackets in each docstring, outermost dimension first.
//! Every kernel has one generic body over [`simd`]'s sixteen lanes, compiled for each level (portable, AVX2, AVX-512;
//! NEON compiles but was never run: no such machine was at hand) and chosen at run time.
//!
//! Contracts that hold for all kernels:
//! - Slice lengths are checked on entry and a mismatch panics with both lengths: lengths are the caller's code, never
//!   outside data. Values (infinities, NaN, denormals) never panic.
//! - Results do not depend on the number of threads.
//! - [`linear()`], the norms, the activations, [`rotary()`] and attention treat each row alone, with the same
//!   operations in the same order whatever the other rows are: a sequence's result is bit for bit the same alone or in a
//!   batch.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod activation;
mod adamw;
mod aligned;
mod attention;
pub mod benchmark;
mod blocks;
mod convert;
mod cross_entropy;
mod dropout;
mod elementwise;
mod embedding;
mod experts;
mod format;
mod frozen;
mod linear;
mod matmul;
mod next_token;
mod norm;
mod quantized;
mod reduce;
mod rotary;
mod rounding;
pub mod simd;
mod softmax;
pub mod threads;
mod tiles;

#[cfg(test)]
mod test_util;

pub use activation::{
    gelu_erf, gelu_erf_backward, gelu_tanh, gelu_tanh_backward, silu, silu_backward, silu_gate, silu_gate_backward,
};
pub use adamw::{AdamWStep, adamw};
pub use attention::{
    AttentionHeads, AttentionMask, AttentionSaved, BlockLayout, CacheType, CachedSequence, PageLayout,
    attention_backward, attention_decode, attention_forward,
};
pub use blocks::{BLOCK_SIZE, dequantize_blocks, quantize_blocks};
pub use convert::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub use cross_entropy::{HeadGradients, HeadMatrix, cross_entropy_head, log_probabilities};
pub use dropout::{Dropout, dropout};
pub use elementwise::{add, add_assign, axpy, scale};
pub use embedding::{embedding_gather, embedding_scatter_add};
pub use experts::{
    Choice, ExpertGroups, Router, RouterLosses, combine_experts, expert_gate_gradients, route, route_backward,
    scale_expert_rows,
};
pub use format::{WeightFormat, Weights};
pub use frozen::{cross_entropy_frozen_head, linear_input_gradient};
pub use linear::{LinearGroup, LinearLayer, linear, linear_each, linear_groups};
pub use matmul::{MatmulGroup, MatrixRef, matmul, matmul_groups, matmul_widened};
pub use next_token::score_logits;
pub use norm::{NormStatistics, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
pub use quantized::dequantize;
pub use reduce::{all_finite, sum_of_squares, sum_rows};
pub use rotary::{RotaryLayout, RotaryTable, rotary};
pub use rounding::{HalfType, OutOfRange, out_of_range};
pub use softmax::{log_softmax, softmax};
