//! Tokenizers away from the threads that serve calls: a text of some megabytes takes seconds.

use std::sync::{Arc, LazyLock};

use candle_models::Tokenizer;
use tokio::sync::Semaphore;

use crate::error::{Error, Result};

/// Longest text, in bytes, that is not worth a thread: it takes milliseconds at worst.
const SHORT: usize = 1 << 12;

/// Turns of longer texts: others have the rest of the machine.
static TURNS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Arc::new(Semaphore::new(cores.div_ceil(2)))
});

/// The token ids of a text.
///
/// # Errors
/// Those of the tokenizer.
pub(super) async fn encode(tokenizer: &Arc<Tokenizer>, text: String) -> Result<Vec<u32>> {
    let tokenizer = Arc::clone(tokenizer);
    tokenizing(text.len(), move || Ok(tokenizer.encode(&text)?)).await
}

/// What `work` makes of so many bytes of text; of many on a thread of its own. A caller that goes away gives up its turn,
/// unless the work has begun.
///
/// # Errors
/// Those of `work`; `Internal` if it panics.
pub(super) async fn tokenizing<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if bytes <= SHORT {
        return work();
    }
    let turn = Arc::clone(&TURNS).acquire_owned().await;
    let done = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        work()
    });
    done.await.map_err(|error| Error::Internal(error.to_string()))?
}
