//! End-to-end tests: SQL through the extension to a real compute server, and the server on its own.
#![allow(clippy::unwrap_used)]

mod faults;
mod files;
mod gradients;
mod grpc;
mod interruption;
mod pretrained;
mod sessions;
mod sql;
mod transactions;
mod writes;
