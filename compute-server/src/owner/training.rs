//! Forward and backward over the sequences of a request, one micro-batch a round, so that generations go on meanwhile
//! and a cancel takes effect soon.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_compute_proto::v1;
use candle_models::training::{Gradient, SequenceLoss, TrainingSequence};

use super::accumulated::Part;
use super::handle::Reply;
use super::merging::Sources;
use super::overlay::{Operation, Overlay, Staged};
use super::passes::PassInputs;
use super::state::Owner;
use super::{Ticket, View};
use crate::commit_log::{Pass, Recipe, recipe_step};
use crate::error::{Error, Result};
use crate::requests::{Phase, RequestGuard};

/// Sequences whose gradient is wanted.
pub(crate) struct TrainingRequest {
    /// What is done with the gradient.
    pub(crate) target: Target,
    /// The sequences, checked.
    pub(crate) sequences: Vec<TrainingSequence>,
    /// The sequences as they were given, as many.
    pub(crate) rows: Vec<v1::Sequence>,
    /// Keeps it listed.
    pub(crate) request: RequestGuard,
}

/// What is done with a gradient.
pub(crate) enum Target {
    /// It is staged.
    Stage(Ticket),
    /// It is returned.
    Return(View),
}

impl Target {
    /// Whose weights and settings are used.
    fn view(&self) -> View {
        match self {
            Self::Stage(ticket) => View::Transaction(Arc::clone(&ticket.transaction)),
            Self::Return(view) => view.clone(),
        }
    }
}

/// What a [`TrainingRequest`] gives.
pub(crate) struct Trained {
    /// One entry a sequence.
    pub(crate) losses: Vec<SequenceLoss>,
    /// The gradient, when it was to be returned.
    pub(crate) part: Option<Part>,
}

/// Queue of training work.
#[derive(Default)]
pub(super) struct Training {
    jobs: VecDeque<Job>,
    /// Time that generations are owed before the next micro-batch.
    debt: Duration,
}

struct Job {
    request: TrainingRequest,
    reply: Reply<Trained>,
    part: Part,
    /// Whether `part` held something when the job began; a failure then spoils it.
    continued: bool,
    weights_version: u64,
    /// Of all its micro-batches.
    inputs: PassInputs,
    losses: Vec<SequenceLoss>,
    /// Whether a micro-batch has begun to add to `part`.
    begun: bool,
}

impl Training {
    /// Counts time that generations had. Without any, nothing is owed.
    pub(super) fn repay(&mut self, time: Duration, generated: bool) {
        self.debt = if generated {
            self.debt.saturating_sub(time)
        } else {
            Duration::ZERO
        };
    }

    /// Ends all with an error.
    pub(super) fn end_all(&mut self, error: &impl Fn() -> Error) {
        self.jobs.drain(..).for_each(|job| job.reply.send(Err(error())));
    }

    /// Ends the jobs that stage something under `ticket`'s transaction, in its subtransaction or a later one.
    pub(super) fn end_staging(&mut self, transaction: &str, subtransaction: u32) {
        let affected = |job: &Job| match &job.request.target {
            Target::Stage(ticket) => *ticket.transaction == *transaction && ticket.subtransaction >= subtransaction,
            Target::Return(_) => false,
        };
        let (ended, kept): (VecDeque<_>, VecDeque<_>) = self.jobs.drain(..).partition(affected);
        self.jobs = kept;
        ended.into_iter().for_each(|job| job.reply.send(Err(Error::Cancelled)));
    }

    /// Whether something is being staged under `transaction`.
    pub(super) fn is_staging(&self, transaction: &str) -> bool {
        self.jobs
            .iter()
            .any(|job| matches!(&job.request.target, Target::Stage(t) if *t.transaction == *transaction))
    }

    /// Whether a gradient is being computed.
    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }
}

impl Owner {
    /// Queues a request.
    pub(crate) fn submit_training(&mut self, request: TrainingRequest, reply: Reply<Trained>) {
        if self.training.jobs.len() >= self.limits.queue {
            return reply.send(Err(Error::Limit {
                what: format!("a further batch in the queue of model \"{}\"", self.shared.name),
                limit: self.limits.queue as u64,
                flag: "max-queue",
            }));
        }
        match self.begin_training(&request) {
            Ok((part, continued)) => {
                request.request.set_progress(0, request.sequences.len() as u64);
                let weights_version = self.versions.weights;
                let inputs = self.pass_inputs(&request.target.view(), &part.gradient);
                let losses = Vec::with_capacity(request.sequences.len());
                self.training.jobs.push_back(Job {
                    request,
                    reply,
                    part,
                    continued,
                    weights_version,
                    inputs,
                    losses,
                    begun: false,
                });
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// Checks a request and gives the gradient that it adds to.
    fn begin_training(&mut self, request: &TrainingRequest) -> Result<(Part, bool)> {
        let view = match &request.target {
            Target::Return(view) => view.clone(),
            Target::Stage(ticket) => View::Transaction(Arc::clone(&ticket.transaction)),
        };
        self.check_not_merged(&view)?;
        self.make_trainable()?;
        let ticket = match &request.target {
            Target::Stage(ticket) => ticket,
            Target::Return(view) => return Ok((self.new_part(view)?, false)),
        };
        self.check_usable(ticket)?;
        self.check_accumulated(ticket, &request.sequences)?;
        self.take_part(ticket)
    }

    /// Gives the gradient that a transaction adds to next: that of its last batch, taken out of what is staged, else a new
    /// one; with whether it is the former. It has to be staged again.
    ///
    /// # Errors
    /// `Precondition` after a staged step, `Memory`.
    pub(super) fn take_part(&mut self, ticket: &Ticket) -> Result<(Part, bool)> {
        let weights_version = self.versions.weights;
        let overlay = self.overlays.entry(Arc::clone(&ticket.transaction)).or_default();
        if overlay.step().is_some() {
            return Err(Error::Precondition {
                message: format!(
                    "model \"{}\" was stepped in this transaction; a further batch needs the committed step",
                    self.shared.name
                ),
                hint: "Commit first, then insert the next batch.",
            });
        }
        if !overlay.relies_on_weights() {
            overlay.weights_version = weights_version;
        }
        // Rows of one subtransaction share a gradient: the last one is continued.
        let continues = overlay.operations.last().is_some_and(|last| {
            last.subtransaction == ticket.subtransaction && matches!(last.operation, Operation::Batch(_))
        });
        if continues
            && let Some(Staged {
                operation: Operation::Batch(part),
                ..
            }) = overlay.operations.pop()
        {
            return Ok((part, true));
        }
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        Ok((self.new_part(&view)?, false))
    }

    /// Refuses more tokens than one model keeps between two steps.
    fn check_accumulated(&self, ticket: &Ticket, sequences: &[TrainingSequence]) -> Result<()> {
        let new: u64 = sequences.iter().map(|sequence| sequence.tokens().len() as u64).sum();
        let staged = self.overlays.get(&ticket.transaction).map_or(0, Overlay::tokens);
        let total = self.accumulated.token_count() + staged + new;
        if total > self.limits.accumulated_tokens {
            return Err(Error::Limit {
                what: format!(
                    "a total of {total} tokens accumulated since the last step of model \"{}\"",
                    self.shared.name
                ),
                limit: self.limits.accumulated_tokens,
                flag: "max-accumulated-tokens",
            });
        }
        Ok(())
    }

    /// An empty gradient of what `view` trains, with memory reserved for it.
    pub(super) fn new_part(&self, view: &View) -> Result<Part> {
        let decoder = self.training_decoder();
        let memory = self.budget.reserve("a gradient", 4 * decoder.parameter_count())?;
        Ok(Part {
            gradient: Gradient::of_parameters(decoder, &self.trainable(view)),
            sequences: Vec::new(),
            duration_ms: 0.0,
            memory,
            sources: Sources::default(),
            recipe: Some(Recipe::default()),
        })
    }

    /// The committed weights as f32.
    pub(super) fn training_decoder(&self) -> &candle_models::Decoder {
        self.trainable
            .as_ref()
            .map_or(&self.model.decoder, |(decoder, _)| decoder)
    }

    /// Expands weights that are not f32, beside those that generations use: a rolled back batch leaves no trace.
    pub(super) fn make_trainable(&mut self) -> Result<()> {
        if self.trainable.is_some()
            || self.model.decoder.is_adapted()
            || self
                .model
                .decoder
                .parameters()
                .iter()
                .all(|parameter| parameter.dtype == "f32")
        {
            return Ok(());
        }
        let bytes = 4 * self.model.decoder.parameter_count();
        let memory = self
            .budget
            .reserve("expanding the weights to f32 for training", bytes)?;
        let mut decoder = self.model.decoder.deep_copy()?;
        decoder.make_trainable()?;
        self.trainable = Some((decoder, memory));
        // Staged states that were copied from the weights as they are held are of no use to a gradient.
        self.overlays.values_mut().for_each(|overlay| overlay.result = None);
        Ok(())
    }

    /// Runs one micro-batch; false when there was none, or generations come first.
    pub(super) fn train(&mut self) -> bool {
        if self.training.jobs.is_empty() {
            return false;
        }
        if self.training.debt > Duration::ZERO {
            return true;
        }
        let Some(mut job) = self.training.jobs.pop_front() else {
            return false;
        };
        let start = Instant::now();
        let ran = self.run_micro_batch(&mut job);
        self.training.debt = start.elapsed();
        match ran {
            Ok(()) if job.losses.len() < job.request.sequences.len() => self.training.jobs.push_front(job),
            Ok(()) => self.finish_training(job),
            Err(error) => self.fail_training(job, error),
        }
        true
    }

    fn run_micro_batch(&mut self, job: &mut Job) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (request, reply) = (&job.request.request, &job.reply);
        let cancelled = || reply.is_closed() || request.is_cancelled() || shared.is_unloaded();
        if cancelled() {
            return Err(Error::Cancelled);
        }
        if job.weights_version != self.versions.weights {
            return Err(Error::Stale(format!(
                "model \"{}\" was stepped while a batch ran",
                self.shared.name
            )));
        }
        let view = job.request.target.view();
        request.set_phase(Phase::Running);
        job.begun = true;
        let start = Instant::now();
        let sequences = (job.request.sequences.as_slice(), job.losses.len());
        let passed = self.accumulate_next(&view, &job.inputs, sequences, &mut job.part.gradient, &cancelled)?;
        job.losses.extend(passed.losses);
        // Without targets nothing was run.
        if !passed.tape.is_empty() {
            self.tape = passed.tape;
        }
        job.part.duration_ms += start.elapsed().as_secs_f64() * 1e3;
        request.set_progress(job.losses.len() as u64, job.request.sequences.len() as u64);
        Ok(())
    }

    fn finish_training(&mut self, job: Job) {
        let Job {
            request,
            reply,
            mut part,
            losses,
            inputs,
            ..
        } = job;
        let ticket = match request.target {
            Target::Stage(ticket) => ticket,
            Target::Return(_) => {
                self.release_trainable();
                return reply.send(Ok(Trained {
                    losses,
                    part: Some(part),
                }));
            }
        };
        let rows = request
            .rows
            .into_iter()
            .zip(&losses)
            .map(|(sequence, loss)| v1::AccumulatedSequence {
                model: self.shared.name.clone(),
                sequence: Some(sequence),
                loss: Some(v1::SequenceLoss {
                    loss: loss.loss,
                    token_count: loss.token_count,
                }),
            });
        part.sequences.extend(rows);
        if let Some(recipe) = &mut part.recipe {
            recipe.push(recipe_step::Kind::Pass(Pass {
                sequences: losses.len() as u64,
                settings: Some(inputs.settings.to_json()),
                first_sequence: inputs.first_sequence,
                loss_factor: inputs.loss_factor,
            }));
        }
        let overlay = self.overlays.entry(Arc::clone(&ticket.transaction)).or_default();
        overlay.operations.push(Staged {
            subtransaction: ticket.subtransaction,
            operation: Operation::Batch(part),
        });
        self.describe_staged(&ticket.transaction);
        reply.send(Ok(Trained { losses, part: None }));
    }

    /// A job that began a gradient leaves nothing. One that continued a gradient has spoilt it, unless it was still waiting.
    fn fail_training(&mut self, job: Job, error: Error) {
        if let Target::Stage(ticket) = &job.request.target
            && job.continued
        {
            let subtransaction = ticket.subtransaction;
            let overlay = self.overlays.entry(Arc::clone(&ticket.transaction)).or_default();
            match !job.begun {
                true => overlay.operations.push(Staged {
                    subtransaction,
                    operation: Operation::Batch(job.part),
                }),
                false => overlay.operations.push(Staged {
                    subtransaction,
                    operation: Operation::Spoilt,
                }),
            }
        }
        self.release_trainable();
        let error = if self.shared.is_unloaded() {
            self.shared.gone()
        } else {
            error
        };
        job.reply.send(Err(error));
    }
}
