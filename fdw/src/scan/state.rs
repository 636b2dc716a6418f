//! A running scan: the calls that are under way, and their rows: as calls give them, or in the order of the inputs.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker, ready};

use pgrx::PgSqlErrorCode;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::answers::{Answer, Answers};
use crate::client::{Client, dropped_work, flush, spawn, wait};
use crate::error::{Error, Result};
use crate::relation::{Call, Inputs, Item, Relation, Row, Rows, Usage};
use crate::transaction;

/// Calls begun, for each that may be under way: rows of those that have ended wait here for the executor, and for those of
/// the calls before them where they come in order.
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

/// In which order rows come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// In that of the inputs.
    Inputs,
    /// As calls give them: those of one call in their order, and one that is slow holds no other up.
    Arrival,
}

/// How the calls of a scan are made.
pub(super) struct Manner {
    pub(super) order: Order,
    /// Rows that the query can use at most, if that is known and small.
    pub(super) limit: Option<usize>,
    /// Whether equal inputs share a call.
    pub(super) share: bool,
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
    /// Rows of a call before this one, and how many of them have been read.
    Shared(Answer, usize),
    /// No rows are left.
    Done,
}

impl Work {
    /// What comes next, None at the end. Where rows are shared nobody is woken: the call that gives them is looked at, too.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Item>>> {
        match self {
            Self::Call(items, task, _) => {
                if let Some(item) = ready!(items.poll_recv(context)) {
                    return Poll::Ready(Ok(Some(item)));
                }
                let outcome = ready!(Pin::new(&mut task.0).poll(context)).unwrap_or_else(|_| {
                    let code = PgSqlErrorCode::ERRCODE_INTERNAL_ERROR;
                    Err(Error::new(code, "a call to the compute server ended unexpectedly"))
                });
                Poll::Ready(outcome.map(|()| None))
            }
            Self::Shared(answer, read) => match answer.row(*read) {
                Some(row) => {
                    *read += 1;
                    Poll::Ready(Ok(Some(Item::Row(row))))
                }
                None if answer.is_complete() => Poll::Ready(Ok(None)),
                None => Poll::Pending,
            },
            Self::Done => Poll::Ready(Ok(None)),
        }
    }
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
    order: Order,
    /// The call whose rows are being read: the oldest where they come in order.
    current: usize,
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
    pub(super) fn new(client: Client, relation: &'static dyn Relation, needed: Arc<[bool]>, manner: &Manner) -> Self {
        let limit = manner.limit.unwrap_or(usize::MAX).max(1);
        Self {
            width: limit.min(client.fetch_size),
            most: limit.min(AHEAD * client.fetch_size),
            client,
            relation,
            running: VecDeque::new(),
            order: manner.order,
            current: 0,
            ended: Arc::default(),
            needed,
            more: true,
            answers: manner.share.then(Answers::default),
        }
    }

    /// What a call gives next. None at the end.
    pub(super) fn next(&mut self, source: &mut impl Source<Tag = T>, totals: &mut Totals) -> Result<Option<Event<T>>> {
        loop {
            while self.has_room() {
                self.start(source, totals)?;
            }
            if self.running.is_empty() {
                return Ok(None);
            }
            let Some(item) = self.wait()? else { continue };
            let call = &self.running[self.current];
            match item {
                Some(Item::Row(row)) => {
                    if let (Work::Call(.., Some(answer)), Some(answers)) = (&call.work, &mut self.answers) {
                        answers.add(answer, &row);
                    }
                    return Ok(Some(Event::Row(row, call.tag.clone())));
                }
                Some(Item::Usage(usage)) => totals.add(usage),
                None => {
                    if let Work::Call(.., Some(answer)) = &call.work {
                        answer.complete();
                    }
                    self.ended.count.fetch_sub(1, Ordering::Relaxed);
                    return Ok(self.running.remove(self.current).map(|ended| Event::End(ended.tag)));
                }
            }
        }
    }

    /// Waits for what the current call gives next, which becomes another one where the order allows it; Some(None) is its
    /// end. None when another call may have room to begin.
    fn wait(&mut self) -> Result<Option<Option<Item>>> {
        if let Poll::Ready(item) = self.poll(&mut Context::from_waker(Waker::noop())) {
            return item.map(Some);
        }
        let waits_for_room = self.more && self.running.len() < self.most;
        let ended = Arc::clone(&self.ended);
        wait(async {
            tokio::select! {
                biased;
                item = poll_fn(|context| self.poll(context)) => item.map(Some),
                () = ended.changed.notified(), if waits_for_room => Ok(None),
            }
        })
    }

    /// Looks at the current call, and where rows come as they arrive at all others behind and before it.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Item>>> {
        let count = self.running.len();
        let looked_at = match self.order {
            Order::Inputs => 1,
            Order::Arrival => count,
        };
        for at in (0..looked_at).map(|step| (self.current + step) % count) {
            if let Poll::Ready(item) = self.running[at].work.poll(context) {
                self.current = at;
                return Poll::Ready(item);
            }
        }
        Poll::Pending
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
