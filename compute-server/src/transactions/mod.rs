//! Transactions: what clients staged, seen by nobody else until it is published.
//!
//! What belongs to a model lies staged in its owner thread; this module knows which models a transaction touched, holds
//! the models and checkpoints it made or dropped, and ends it as a whole.

mod bases;
mod committing;
mod ending;
mod files;
mod pruning;
mod publish;
mod registry;
mod scope;
mod transaction;

pub(crate) use registry::Transactions;
pub(crate) use scope::{Reader, Scope};
pub(crate) use transaction::{Connection, WriteKind};
