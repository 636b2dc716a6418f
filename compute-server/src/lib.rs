//! The compute server: models behind gRPC (`candle.compute.v1`) and HTTP.
//!
//! ```text
//! connection ─▶ guard (token, drain) ─▶ services/ ─▶ transactions/ ─▶ owner/ (one thread a model) ─▶ candle-models
//! ```
//! A service translates messages. `transactions` decides what a call sees and when its writes become visible. The
//! owner thread of a model holds everything about it that changes.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod access;
mod app;
mod cache_memory;
mod checkpoints;
mod chunks;
mod commit_log;
mod config;
mod connections;
mod convert;
mod cuda_program;
mod data_folder;
mod devices;
mod error;
mod evaluations;
mod executor;
mod expert_servers;
mod guard;
mod http;
#[doc(hidden)]
pub mod in_process;
mod logging;
mod memory;
mod metrics;
mod names;
mod owner;
mod recovery;
mod registry;
mod requests;
mod response_end;
mod server;
mod services;
mod sources;
mod tokenizers;
mod transactions;
mod watched_file;

pub use config::{Arguments, Bytes, Command, Config, ConfigError, Limits, LogLimits, Options, Tls};
pub use convert::{ConvertOptions, convert};
pub use cuda_program::hand_over;
pub use error::{Error, Result};
pub use logging::start as start_logging;
pub use server::{Listening, serve};
