//! The log of committed inputs: what a server needs to make the committed state of its models again after a crash.
//!
//! ```text
//! DATA_DIR/commits/log            frames, one a published transaction, in the order of publishing
//! DATA_DIR/commits/bases/ID.N/    states that the log builds on, in the form of checkpoints
//! ```
//! A frame is written and flushed to the disk before its transaction is answered. It holds inputs (token ids, options of
//! steps, settings), not results: computing them again gives the same bits. For each model the log begins at its base: how
//! it was created or loaded, or a state that was saved since. See `docs/adr/0004-commit-log.md`.

mod file;
mod frame;
mod log;
mod messages;
mod reading;
mod rewriting;
mod tracking;

pub(crate) use log::{CommitLog, Item, set_aside};
pub(crate) use messages::{
    Batch, Changes, FileChange, GradientData, GradientSum, HeadLayout, Layouts, LogBase, Merge, Operation, Origin,
    Pass, Product, Recipe, Step, Train, Write, operation, origin, recipe_step,
};
pub(crate) use reading::{LoggedChanges, LoggedModel, Recovered};
