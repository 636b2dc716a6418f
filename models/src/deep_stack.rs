//! Work of libraries that recurse as deeply as their input is nested.

use crate::error::{Error, Result};

/// Stack of the thread. Pages of it that are not touched take no memory.
const STACK_BYTES: usize = 256 << 20;

/// Runs `work` on a thread with much stack, for which the caller waits; `None` if it panics.
///
/// # Errors
/// `ResourceExhausted` without a thread for `what`.
pub(crate) fn run<T: Send>(what: &str, work: impl FnOnce() -> T + Send) -> Result<Option<T>> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name(what.replace(' ', "-"))
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work);
        let thread = thread.map_err(|error| Error::ResourceExhausted(format!("no thread for the {what}: {error}")))?;
        Ok(thread.join().ok())
    })
}
