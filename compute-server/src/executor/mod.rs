//! The executor: named tensors of sessions, and operations on them that run beside the calls.
//!
//! - `sessions`: what the service calls: sessions, and what they see
//! - `state`: sessions and persistent tensors by name
//! - `writing`: a call that writes, undone unless it ends well
//! - `steps`: what a write did, to be undone or settled
//! - `ending`: publish, rollback, release, and the end of a session
//! - `tensor`, `operation`: a tensor, an operation
//! - `queue`: the worker threads, one a device
//!
//! The names are behind one lock that is never held while anything is computed or waited for.

mod ending;
mod operation;
mod queue;
mod sessions;
mod state;
mod steps;
mod tensor;
mod writing;

pub(crate) use operation::{Facts, StoredOperation};
pub(crate) use sessions::{Executor, HeldSession, unknown_operation};
pub(crate) use tensor::StoredTensor;
pub(crate) use writing::{Put, Write};
