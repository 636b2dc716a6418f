//! The loop of a model's thread.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::handle::{Description, Work};
use super::overlay::Overlay;
use super::state::Owner;
use super::{TransactionId, View};
use crate::error::Error;

/// Longest time spent on short work before generations get their next token.
const WORK_SLICE: Duration = Duration::from_millis(5);

/// How often a generation that waits for memory is tried again, and deadlines are looked at.
const POLL: Duration = Duration::from_millis(100);

impl Owner {
    /// Runs until the model is unloaded or no handle is left.
    pub(super) fn run(mut self, mut inbox: mpsc::Receiver<Work>, runtime: &Handle) {
        let shared = Arc::clone(&self.shared);
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| {
            while !shared.is_unloaded() {
                match self.on_base(|owner| owner.take_work(&mut inbox)) {
                    Inbox::Closed => return,
                    Inbox::Open => {}
                }
                if shared.is_unloaded() {
                    break;
                }
                if !self.on_base(Self::turn) && inbox.is_empty() {
                    // Nothing tells when another model gives memory back that a queued generation waits for, or that a
                    // deadline has passed.
                    let watches_time = self.generations.watches_time() || self.embeddings.is_waiting();
                    let next = runtime.block_on(async {
                        tokio::select! {
                            work = inbox.recv() => work.map(Some),
                            () = shared.wake.notified() => Some(None),
                            () = tokio::time::sleep(POLL), if watches_time => Some(None),
                        }
                    });
                    match next {
                        Some(Some(work)) => self.on_base(work),
                        Some(None) => {}
                        None => return,
                    }
                }
            }
            self.end_all(|| shared.gone());
            shared.factors.clear();
        }));
        shared.pages.clear();
        if ended.is_err() {
            shared.set_failed();
            tracing::error!(model = %shared.name, "the thread of a model panicked; the model is of no use any more");
            // Queues are plain data: they can still be told.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| self.end_all(|| shared.gone())));
        }
    }

    /// Does the work that has arrived, for a short while.
    fn take_work(&mut self, inbox: &mut mpsc::Receiver<Work>) -> Inbox {
        self.do_deferred();
        let start = Instant::now();
        loop {
            match inbox.try_recv() {
                Ok(work) => work(self),
                Err(TryRecvError::Empty) => return Inbox::Open,
                Err(TryRecvError::Disconnected) => return Inbox::Closed,
            }
            if start.elapsed() > WORK_SLICE {
                return Inbox::Open;
            }
        }
    }

    /// One round; false when there was nothing to do.
    fn turn(&mut self) -> bool {
        let read = self.serve_readers();
        let start = Instant::now();
        let generated = self.generate();
        self.training.repay(start.elapsed(), generated);
        let embedded = self.embed();
        let trained = self.train();
        read || generated || embedded || trained
    }

    /// Ends everything that runs with an error.
    fn end_all(&mut self, error: impl Fn() -> Error) {
        self.generations.end_all(&error);
        self.embeddings.end_all(&error);
        self.training.end_all(&error);
        self.readers.drain(..).for_each(|reader| reader.end(error()));
    }

    /// Makes the present state known as what everybody sees.
    pub(super) fn describe_committed(&self) {
        self.shared.metrics.trained(self.log.last());
        self.shared
            .describe(View::Committed, self.description(&View::Committed));
    }

    /// Makes the present state known as what `transaction` sees.
    pub(super) fn describe_staged(&self, transaction: &TransactionId) {
        let view = View::Transaction(Arc::clone(transaction));
        match self.overlays.contains_key(transaction) {
            true => self.shared.describe(view.clone(), self.description(&view)),
            false => self.shared.forget(transaction),
        }
    }

    fn description(&self, view: &View) -> Description {
        let gradients: u64 = self.visible_parts(view).iter().map(|part| part.memory.bytes()).sum();
        let trainable = self.trainable.as_ref().map_or(0, |(_, memory)| memory.bytes());
        Description {
            settings: self.settings(view).values().clone(),
            dtype: self.model.decoder.dtype().to_owned(),
            memory_bytes: self.memory.bytes() + gradients + trainable + self.half_bytes(),
            step: self.step_number(view),
            retention: self.settings(view).retention(),
            merged: self.is_merged(view),
            changes_weights: self.overlay(view).is_some_and(Overlay::changes_weights),
        }
    }
}

enum Inbox {
    Open,
    Closed,
}
