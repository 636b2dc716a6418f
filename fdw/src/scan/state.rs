//! A running scan: the calls that are under way, their rows in the order of the inputs.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pgrx::PgSqlErrorCode;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::answers::{Answer, Answers};
use crate::client::{Client, dropped_work, flush, spawn, wait};
use crate::error::{Error, Result};
use crate::relation::{Call, Inputs, Item, Relation, Row, Rows, Usage};
use crate::transaction;

/// Calls begun, for each that may be under way: rows of those that have ended wait here for those of the calls before them.
const AHEAD: usize = 4;

/// Where the inputs of calls come from.
pub(super) trait Source {
    /// What comes back with what a call gives.
    type Tag: Clone;

    /// The next call; none when all have begun.
    fn next(&mut self) -> Result<Option<Begin<Self::Tag>>>;
}

/// A call to be made.
pub(super) struct Begin<T> {
    /// Without inputs there is nothing to ask for, and no rows.
    pub(super) inputs: Option<Arc<Inputs>>,
    pub(super) tag: T,
}

/// What a call gives.
pub(super) enum Event<T> {
    Row(Row, T),
    /// All rows have been read.
    End(T),
}

/// A call under way, or ended with rows that have not been read.
struct Running<T> {
    tag: T,
    work: Work,
}

enum Work {
    /// Rows come from the server, and are kept where equal inputs share them.
    Call(mpsc::Receiver<Item>, Task, Option<Answer>),
    /// Rows of a call before this one, which has ended by the time that they are read, and how many have been.
    Shared(Answer, usize),
    /// No rows are left.
    Done,
}

struct Task(JoinHandle<Result<()>>);

impl Drop for Task {
    fn drop(&mut self) {
        if !self.0.is_finished() {
            self.0.abort();
            dropped_work();
        }
    }
}

/// What EXPLAIN ANALYZE shows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) calls: u64,
    pub(super) usage: Usage,
}

/// The calls of a scan.
pub(super) struct Calls<T> {
    client: Client,
    relation: &'static dyn Relation,
    /// In the order of the inputs.
    running: VecDeque<Running<T>>,
    ended: Arc<Ended>,
    needed: Arc<[bool]>,
    /// Calls under way at a time.
    width: usize,
    /// Calls under way and calls with unread rows together.
    most: usize,
    /// Whether calls are left to begin.
    more: bool,
    /// Where equal inputs share one call: the last ones.
    answers: Option<Answers>,
}

/// Calls that have ended and whose rows have not all been read: they make room for others.
#[derive(Default)]
struct Ended {
    count: AtomicUsize,
    changed: Notify,
}

impl<T: Clone> Calls<T> {
    pub(super) fn new(
        client: Client,
        relation: &'static dyn Relation,
        needed: Arc<[bool]>,
        limit: Option<usize>,
        share: bool,
    ) -> Self {
        let limit = limit.unwrap_or(usize::MAX).max(1);
        Self {
            width: limit.min(client.fetch_size),
            most: limit.min(AHEAD * client.fetch_size),
            client,
            relation,
            running: VecDeque::new(),
            ended: Arc::default(),
            needed,
            more: true,
            answers: share.then(Answers::default),
        }
    }

    /// What the oldest call gives next. None at the end.
    pub(super) fn next(&mut self, source: &mut impl Source<Tag = T>, totals: &mut Totals) -> Result<Option<Event<T>>> {
        loop {
            while self.has_room() {
                self.start(source, totals)?;
            }
            let waits_for_room = self.more && self.running.len() < self.most;
            let Some(first) = self.running.front_mut() else {
                return Ok(None);
            };
            let (items, task, kept) = match &mut first.work {
                Work::Call(items, task, kept) => (items, task, kept),
                Work::Shared(answer, read) => {
                    let row = answer.row(*read);
                    *read += 1;
                    match row {
                        Some(row) => return Ok(Some(Event::Row(row, first.tag.clone()))),
                        None => first.work = Work::Done,
                    }
                    continue;
                }
                Work::Done => {
                    self.ended.count.fetch_sub(1, Ordering::Relaxed);
                    return Ok(self.running.pop_front().map(|ended| Event::End(ended.tag)));
                }
            };
            let item = match items.try_recv() {
                Ok(item) => Some(item),
                Err(_) => {
                    let received = wait(async {
                        tokio::select! {
                            biased;
                            item = items.recv() => Ok(Some(item)),
                            () = self.ended.changed.notified(), if waits_for_room => Ok(None),
                        }
                    })?;
                    let Some(item) = received else { continue };
                    item
                }
            };
            match item {
                Some(Item::Row(row)) => {
                    if let (Some(answer), Some(answers)) = (kept, &mut self.answers) {
                        answers.add(answer, &row);
                    }
                    return Ok(Some(Event::Row(row, first.tag.clone())));
                }
                Some(Item::Usage(usage)) => totals.add(usage),
                None => {
                    let outcome = wait(async { Ok((&mut task.0).await) })?;
                    outcome.map_err(|_| {
                        let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
                        Error::new(code, "a call to the compute server ended unexpectedly")
                    })??;
                    first.work = Work::Done;
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        let under_way = self.running.len() - self.ended.count.load(Ordering::Relaxed);
        self.more && under_way < self.width && self.running.len() < self.most
    }

    fn start(&mut self, source: &mut impl Source<Tag = T>, totals: &mut Totals) -> Result<()> {
        let Some(Begin { inputs, tag }) = source.next()? else {
            self.more = false;
            return Ok(());
        };
        let known = inputs.as_ref().and_then(|inputs| self.answers.as_ref()?.find(inputs));
        let work = match (inputs, known) {
            (Some(inputs), None) => {
                totals.calls += 1;
                self.call(inputs)?
            }
            (Some(_), Some(answer)) => Work::Shared(answer, 0),
            (None, _) => Work::Done,
        };
        if !matches!(work, Work::Call(..)) {
            self.ended.count.fetch_add(1, Ordering::Relaxed);
        }
        self.running.push_back(Running { tag, work });
        Ok(())
    }

    fn call(&mut self, inputs: Arc<Inputs>) -> Result<Work> {
        let kept = self.answers.as_mut().map(|answers| answers.begin(&inputs));
        let call = Call {
            client: self.client.clone(),
            transaction: transaction::reading_of(self.relation.participant(), &self.client)?,
            inputs,
            needed: Arc::clone(&self.needed),
        };
        let (sender, items) = mpsc::channel(self.relation.buffered_rows());
        let (work, ended) = (self.relation.select(call, Rows(sender)), Arc::clone(&self.ended));
        let task = spawn(async move {
            let outcome = work.await;
            ended.count.fetch_add(1, Ordering::Relaxed);
            ended.changed.notify_one();
            outcome
        })?;
        Ok(Work::Call(items, Task(task), kept))
    }
}

impl<T> Drop for Calls<T> {
    fn drop(&mut self) {
        self.running.clear();
        flush();
    }
}

impl Totals {
    fn add(&mut self, usage: Usage) {
        self.usage.generations += usage.generations;
        self.usage.prompt_tokens += usage.prompt_tokens;
        self.usage.cached_tokens += usage.cached_tokens;
        self.usage.completion_tokens += usage.completion_tokens;
        self.usage.batch_sizes += usage.batch_sizes;
        self.usage.queue_ms += usage.queue_ms;
        self.usage.prefill_ms += usage.prefill_ms;
        self.usage.decode_ms += usage.decode_ms;
    }
}
