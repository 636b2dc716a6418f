//! The library under the compute server: configuration, the one decoder, tokenizers, weight formats, sampling, training.
//!
//! No network and no Postgres. A [`Model`] is loaded from files of any of the [`formats`], or made from a
//! configuration; its [`Decoder`] runs forward over cached sequences and its weights can be trained.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod adapters;
pub mod attention_layouts;
pub mod chat_template;
pub mod completion;
pub mod config;
pub mod constraint;
pub mod convert;
pub mod decoder;
mod deep_stack;
pub mod error;
pub mod evaluation;
pub mod executor;
pub mod experts;
pub mod formats;
pub mod gpu;
pub mod model;
mod opened;
pub mod ops;
pub mod pooling;
pub mod sampling;
pub mod tokenizer;
pub mod training;

pub use attention_layouts::{AttentionBlock, AttentionLayouts, HeadLayout};
pub use candle_core::{DType, Device, Tensor};
pub use candle_kernels_cpu::CacheType;
pub use chat_template::{ChatMessage, ChatTemplate};
pub use completion::{CompletionText, Progress};
pub use config::DecoderConfig;
pub use constraint::{Constraint, ResponseFormat};
pub use decoder::{
    CacheUsage, Decoder, ExpertDigest, ExpertGradient, ExpertLayer, ExpertRows, ExpertWeights, ExpertsCall, GatedRows,
    KeyValueCache, PAGE_POSITIONS, PageMemory, PagePool, ParameterId, ParameterInfo, Pending, Place, RemoteExperts,
    Scope, SequenceStep, Weight, WeightType,
};
pub use error::{Error, Result};
pub use model::{LoadOptions, Model};
pub use pooling::{Pooled, Pooling};
pub use sampling::{Sampled, Sampler, SamplingOptions};
pub use tokenizer::Tokenizer;
