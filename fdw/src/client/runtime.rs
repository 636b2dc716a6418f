//! The backend's runtime. The connection makes progress only inside these functions.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::pin;
use std::time::Duration;

use pgrx::PgSqlErrorCode;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};

/// Longest time that passes before a cancel, a timeout or a termination is noticed.
const SLICE: Duration = Duration::from_millis(20);

/// Longest time that telling the server of dropped work may take.
const FLUSH: Duration = Duration::from_millis(5);

thread_local! {
    // Never dropped: at the backend's exit there is nobody left to wait for its tasks.
    static RUNTIME: Cell<Option<&'static Runtime>> = const { Cell::new(None) };
    static UNSENT: Cell<bool> = const { Cell::new(false) };
}

fn runtime() -> Result<&'static Runtime> {
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        // Names are looked up on a thread of their own, which must not run PostgreSQL's signal handlers.
        .on_thread_start(block_signals)
        .build()
        .map_err(|error| {
            let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION;
            Error::new(code, "cannot start the gRPC client").detail(error.to_string())
        })?;
    let runtime: &'static Runtime = Box::leak(Box::new(ManuallyDrop::new(runtime)));
    RUNTIME.set(Some(runtime));
    Ok(runtime)
}

fn block_signals() {
    // SAFETY: fills a set on the stack and blocks its signals for this thread only.
    unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigfillset(&mut signals);
        libc::pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
    }
}

/// Waits for a future whose outcome must be known, as that of a publish: interrupts wait for `limit`, and only then does
/// a cancel drop it. A server that hangs cannot hold the backend for longer.
pub(crate) fn wait_settled<T>(limit: Duration, future: impl Future<Output = Result<T>>) -> Result<T> {
    let mut future = pin!(future);
    match pump(limit, &mut future) {
        Some(output) => output,
        None => wait(future),
    }
}

/// Waits for a future, and lets PostgreSQL interrupt the wait: a cancel unwinds from here and drops the future.
pub(crate) fn wait<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = runtime()?;
    let mut future = pin!(future);
    loop {
        let slice = async {
            tokio::select! {
                biased;
                output = &mut future => Some(output),
                () = tokio::time::sleep(SLICE) => None,
            }
        };
        if let Some(output) = runtime.block_on(slice) {
            return output;
        }
        UNSENT.set(true);
        pgrx::check_for_interrupts!();
        UNSENT.set(false);
    }
}

/// Notes that work was dropped before it ended, of which the server has not heard.
pub(crate) fn dropped_work() {
    UNSENT.set(true);
}

/// Tells the server of dropped work, so that it stops.
pub(crate) fn flush() {
    if UNSENT.replace(false) {
        pump(FLUSH, async {
            for _ in 0..16 {
                tokio::task::yield_now().await;
            }
            // Sleeping once makes the runtime look at its sockets and send what is due.
            tokio::time::sleep(Duration::from_millis(1)).await;
        });
    }
}

/// Starts work that goes on whenever somebody waits.
pub(crate) fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> Result<JoinHandle<T>> {
    Ok(runtime()?.spawn(future))
}

/// Gives the connection up to `limit` for `future`, without interrupts: for the ends of transactions, where nothing may
/// be raised. None when it was not enough.
pub(crate) fn pump<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let runtime = RUNTIME.get()?;
    runtime.block_on(async { tokio::time::timeout(limit, future).await.ok() })
}
