//! A run from its first message to its last.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use candle_compute_proto::v1;
use candle_compute_proto::v1::evaluate_request::Message;
use candle_models::evaluation::{Answers, DatasetDigest, Sample, Scores, Stretch, TextTotals};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::latency::{self, Latencies};
use super::prepare::{Batch, Content, Prepared, prepare};
use super::settings::Settings;
use crate::access::{Caller, Tenant};
use crate::app::App;
use crate::error::{Error, Result};
use crate::owner::{ModelHandle, View};
use crate::requests::{Phase, RequestGuard};
use crate::transactions::{Reader, Scope, WriteKind};

/// Tokens that are scored before the model's thread does something else.
const TOKENS_PER_TURN: usize = 512;

/// A run.
pub(in crate::services) struct Run {
    app: Arc<App>,
    caller: Caller,
    start: v1::EvaluationStart,
    settings: Settings,
    model: ModelHandle,
    view: View,
    /// Optimizer step that the model is at.
    step: u64,
    /// Absent where nothing is kept.
    scope: Option<Scope>,
    _reader: Option<Reader>,
    listed: RequestGuard,
    cancelled: Arc<Notify>,
    begun: Instant,
    found: Found,
}

/// What was found so far.
#[derive(Default)]
struct Found {
    rows: u64,
    digest: DatasetDigest,
    texts: TextTotals,
    answers: Answers,
    /// Tokens predicted, and tokens read for that.
    predicted: u64,
    read: u64,
    bytes: u64,
    /// Time in which they were scored.
    scoring: Duration,
    prompts: Option<Sample<Vec<u32>>>,
}

impl Run {
    /// Begins a run.
    ///
    /// # Errors
    /// `NotFound` for an unknown model; `InvalidArgument` for a bad setting.
    pub(in crate::services) fn begin(app: &Arc<App>, caller: Caller, start: v1::EvaluationStart) -> Result<Self> {
        let context = start.transaction.as_ref();
        let (scope, reader) = match start.discard {
            true => (None, Some(Reader::open(app, context)?)),
            false => (Some(Scope::open(app, context, &caller)?), None),
        };
        let seen = scope.as_ref().and_then(Scope::reader).or(reader.as_ref());
        let seen = seen.ok_or_else(|| Error::Internal("a run without a reader".to_owned()))?;
        let model = seen.find(&start.model, &start.adapter)?;
        let view = seen.view();
        let settings = Settings::new(&start, &model)?;
        let listed = app.requests.begin_tracking(&caller, "evaluate", model.name());
        let cancelled = Arc::new(Notify::new());
        listed.wake_on_cancel(Arc::clone(&cancelled));
        let found = Found {
            prompts: Some(Sample::new(settings.generations)),
            ..Found::default()
        };
        Ok(Self {
            app: Arc::clone(app),
            caller,
            settings,
            step: model.describe(&view).step,
            model,
            view,
            scope,
            _reader: reader,
            listed,
            cancelled,
            begun: Instant::now(),
            found,
            start,
        })
    }

    /// Takes the client's messages and answers them, until the run ends or the client is gone.
    pub(in crate::services) fn follow(
        self,
        messages: Streaming<v1::EvaluateRequest>,
    ) -> ReceiverStream<Result<v1::EvaluateResponse, Status>> {
        let (sender, receiver) = mpsc::channel(1);
        let cancelled = Arc::clone(&self.cancelled);
        tokio::spawn(async move {
            let outcome = tokio::select! {
                outcome = self.take(messages, &sender) => outcome,
                () = sender.closed() => return,
                () = cancelled.notified() => Err(Error::Cancelled.into()),
            };
            if let Err(status) = outcome {
                let _ = sender.send(Err(status)).await;
            }
        });
        ReceiverStream::new(receiver)
    }

    async fn take(
        mut self,
        mut messages: Streaming<v1::EvaluateRequest>,
        answers: &mpsc::Sender<Result<v1::EvaluateResponse, Status>>,
    ) -> Result<(), Status> {
        self.listed.set_phase(Phase::Running);
        while let Some(message) = messages.message().await? {
            let answer = match message.message {
                Some(Message::Rows(rows)) => v1::EvaluateResponse {
                    rows: self.rows(rows.rows).await?,
                    evaluation: None,
                },
                Some(Message::Finish(_)) => {
                    let evaluation = Some(self.finish().await?);
                    let rows = Vec::new();
                    let _ = answers.send(Ok(v1::EvaluateResponse { rows, evaluation })).await;
                    return Ok(());
                }
                Some(Message::Start(_)) | None => {
                    return Err(Error::invalid("a message of Evaluate must be rows or finish").into());
                }
            };
            if answers.send(Ok(answer)).await.is_err() {
                break;
            }
        }
        // The client went away: nothing is kept.
        Err(Error::Cancelled.into())
    }

    /// Evaluates the rows of one message.
    async fn rows(&mut self, rows: Vec<v1::EvaluationRow>) -> Result<Vec<v1::EvaluatedRow>> {
        let first = self.found.rows + 1;
        let Batch { rows, stretches } = prepare(&self.model, &self.settings, rows, first).await?;
        let read: usize = stretches.iter().map(|stretch| stretch.inputs.len()).sum();
        if let Some(longest) = stretches.iter().map(|stretch| stretch.inputs.len()).max() {
            self.app.check_request_tokens(longest as u64)?;
        }
        self.caller.tenant.admit_tokens(read)?;
        let begun = Instant::now();
        let scores = self.score(stretches).await?;
        self.found.scoring += begun.elapsed();
        self.found.read += read as u64;
        let mut scores = scores.as_slice();
        let mut answers = Vec::with_capacity(rows.len());
        for row in rows {
            let (own, rest) = scores.split_at(row.stretches);
            scores = rest;
            if let Some(prompts) = &mut self.found.prompts
                && !row.prompt.is_empty()
            {
                prompts.show(|| latency::prompt(&row.prompt, &self.model, &self.settings));
            }
            let answer = self.found.add(row, own);
            answers.extend(self.start.with_rows.then_some(answer));
        }
        self.listed.set_progress(self.found.rows, 0);
        Ok(answers)
    }

    /// Scores stretches, a few in each turn of the model's thread, so that generations go on meanwhile.
    async fn score(&self, stretches: Vec<Stretch>) -> Result<Vec<Scores>> {
        let _working = Working::begin(&self.caller.tenant)?;
        let mut scores = Vec::with_capacity(stretches.len());
        let mut stretches = stretches.into_iter().peekable();
        while let Some(first) = stretches.next() {
            let mut tokens = first.inputs.len();
            let mut turn = vec![first];
            while let Some(next) = stretches.next_if(|next| tokens + next.inputs.len() <= TOKENS_PER_TURN) {
                tokens += next.inputs.len();
                turn.push(next);
            }
            let view = self.view.clone();
            let scored = self.model.start_work(move |owner, reply| {
                let found = owner.score_stretches(&view, &turn, &|| reply.is_closed());
                reply.send(found);
            });
            scores.extend(scored.await?);
        }
        Ok(scores)
    }

    /// Times the generations and keeps the evaluation.
    async fn finish(self) -> Result<v1::Evaluation, Status> {
        let Self { settings, found, .. } = &self;
        if found.rows == 0 {
            return Err(Error::Precondition {
                message: "there are no rows to evaluate on".to_owned(),
                hint: "Give a query that returns rows.",
            }
            .into());
        }
        if found.predicted == 0 {
            return Err(Error::Precondition {
                message: format!("the {} rows have no token that could be predicted", found.rows),
                hint: "A text needs at least two tokens, or one with start_token.",
            }
            .into());
        }
        let prompts = found.prompts.as_ref().map_or(&[][..], Sample::kept);
        let (app, caller) = (&self.app, &self.caller);
        let latencies = latency::measure(app, caller, &self.start, settings, prompts, &self.listed).await?;
        let evaluation = self.report(&latencies);
        let Some(scope) = self.scope else { return Ok(evaluation) };
        let app = self.app;
        let staged = tokio::task::spawn_blocking(move || app.evaluations.stage(evaluation));
        let staged = staged.await.map_err(|error| Error::Internal(error.to_string()))??;
        let evaluation = staged.row().clone();
        scope.push(WriteKind::CreateEvaluation(staged))?;
        scope.close().await?;
        Ok(evaluation)
    }

    fn report(&self, latencies: &Latencies) -> v1::Evaluation {
        let Found {
            texts,
            answers,
            scoring,
            ..
        } = &self.found;
        let seconds = scoring.as_secs_f64();
        let mut evaluation = v1::Evaluation {
            model: self.start.model.clone(),
            adapter: self.start.adapter.clone(),
            step: self.step,
            kind: if self.settings.choices { "choices" } else { "texts" }.to_owned(),
            tag: self.start.tag.clone(),
            dataset_digest: self.found.digest.clone().finish(),
            rows: self.found.rows,
            tokens: self.found.predicted,
            bytes: self.found.bytes,
            loss: texts.loss(),
            perplexity: texts.perplexity(),
            bits_per_byte: texts.bits_per_byte(),
            next_token_accuracy: texts.next_token_accuracy(),
            accuracy: answers.accuracy(),
            accuracy_norm: answers.accuracy_norm(),
            tokens_per_second: if seconds > 0.0 {
                self.found.read as f64 / seconds
            } else {
                0.0
            },
            duration_ms: self.begun.elapsed().as_secs_f64() * 1000.0,
            settings_json: self.settings.to_json(),
            created_at: Some(SystemTime::now().into()),
            tenant: self.caller.name().to_string(),
            ..Default::default()
        };
        latencies.report(&mut evaluation);
        evaluation
    }
}

impl Found {
    /// Adds a row and what its stretches came to.
    fn add(&mut self, row: Prepared, scores: &[Scores]) -> v1::EvaluatedRow {
        let sum = scores.iter().fold(Scores::default(), |mut sum, one| {
            sum += *one;
            sum
        });
        self.rows += 1;
        self.predicted += sum.targets;
        self.bytes += row.bytes;
        let mut answer = v1::EvaluatedRow {
            tokens: sum.targets,
            bytes: row.bytes,
            ..Default::default()
        };
        match &row.content {
            Content::Question(question) => {
                self.digest.add_question(question);
                let verdict = question.judge(scores);
                self.answers.add(question, &verdict);
                answer.choice = u32::try_from(verdict.choice).ok();
                answer.choice_norm = u32::try_from(verdict.choice_norm).ok();
                answer.log_likelihoods = verdict.log_likelihoods;
                return answer;
            }
            Content::Text(text) => self.digest.add_text(text),
            Content::Tokens(tokens) => self.digest.add_tokens(tokens),
        }
        let totals = TextTotals {
            scores: sum,
            bytes: row.bytes,
        };
        answer.loss = totals.loss();
        answer.correct_tokens = sum.likeliest;
        self.texts.scores += sum;
        self.texts.bytes += row.bytes;
        answer
    }
}

/// A piece of work that counts among those that its tenant may have at once.
struct Working(Arc<Tenant>);

impl Working {
    fn begin(tenant: &Arc<Tenant>) -> Result<Self> {
        tenant.begin_work()?;
        Ok(Self(Arc::clone(tenant)))
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.end_work();
    }
}
