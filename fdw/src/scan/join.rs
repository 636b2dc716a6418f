//! Joins in which the rows of one side give the inputs of a relation: a plan node of our own, which reads rows of the
//! other side ahead, so that the server works on the calls of many of them at a time. A nested loop would wait for the rows
//! of one call before it makes the next.

mod execute;
mod outer;
mod paths;
mod plan;

/// Makes the planner consider it.
pub(crate) fn register() {
    plan::register();
    paths::register();
}
