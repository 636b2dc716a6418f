//! Training against PyTorch, against finite differences, and against itself (batched, resumed, damaged).
#![allow(clippy::unwrap_used)]

mod activations;
mod adapter_dropout;
mod adapters;
mod batching;
mod checkpoints;
mod dropout;
mod experts;

mod finite_differences;
mod golden;
mod precision;
mod sharing;
mod sparse;
mod support;
mod validation;
