//! Tests of the program `compute-server` over real sockets, with tiny models made from nothing.
#![allow(clippy::unwrap_used, unreachable_pub)]

mod adapter_dropout;
mod adapters;
mod bad_input;
mod benchmarks;
mod cache;
mod checkpoints;
mod choices;
mod client_driven;
mod crashes;
mod durability;
mod full_disk;
mod generation;
mod gradients;
mod http;
mod log_damage;
mod operations;
mod parameters;
mod precision;
mod scheduling;
mod support;
mod tensors;
mod training_settings;
mod transactions;
