//! End-to-end tests: SQL through the extension to a real compute server, and the server on its own.
#![allow(clippy::unwrap_used)]

mod datasets;
mod evaluation;
mod faults;
mod files;
mod gradients;
mod grpc;
mod http;
mod interruption;
mod many_prompts;
mod pretrained;
mod security;
mod sessions;
mod soak;
mod sql;
mod train;
mod transactions;
mod workers;
mod writes;
