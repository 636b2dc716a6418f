//! The library under the compute server: configuration, the one decoder, tokenizers, weight formats, sampling, training.
//!
//! No network and no Postgres. A [`Model`] is loaded from a Hugging Face directory or a GGUF file, or made from a
//! configuration; its [`Decoder`] runs forward over cached sequences and its weights can be trained.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod config;
pub mod decoder;
pub mod error;
pub mod ops;

pub use candle_core::{DType, Device, Tensor};
pub use config::DecoderConfig;
pub use decoder::{Decoder, KeyValueCache, ParameterId, ParameterInfo, SequenceStep, Weight};
pub use error::{Error, Result};
