//! The run itself: batch, step, commit, and what happens between steps.

use candle_compute_proto::v1::{CreateCheckpointRequest, OptimizerStep, Sequence};
use pgrx::PgSqlErrorCode;
use pgrx::prelude::*;

use super::arguments::{Arguments, Plan};
use super::documents::{Reader, Tokenizing};
use super::packing::Position;
use super::progress::Progress;
use super::run::{Found, Run};
use super::source::Source;
use super::workers::{self, Worker};
use super::{evaluation, step};
use crate::client::write;
use crate::error::{Error, Result};
use crate::procedure::Procedure;
use crate::transaction;

/// Notices of progress that a whole run gives, besides those of evaluations.
const NOTICES: i64 = 10;

/// Steps in a row without a finite loss, in f16 with a scaled loss, after which a run ends.
const OVERFLOWS: usize = 10;

/// A run under way.
struct Driver<'a> {
    procedure: &'a Procedure,
    workers: &'a [Worker],
    progress: &'a Progress,
    plan: &'a Plan,
    source: &'a Source,
    evaluated: Option<Source>,
    run: Run,
    reader: Option<Reader<'a>>,
    /// Steps in a row whose loss was not finite.
    without_loss: usize,
}

/// Takes the steps that are left of the run of these arguments.
///
/// # Errors
/// Those of the arguments, the query, the servers; 25001 for more than one step where it may not commit.
pub(crate) fn train(procedure: &Procedure, arguments: Arguments) -> Result<()> {
    let (trained, schemas) = arguments.targets()?;
    let workers = workers::find(&schemas)?;
    let model = workers::same_model(&workers, &trained)?;
    let plan = arguments.plan(trained, &model)?;
    let source = Source::new("query", &plan.query)?;
    let evaluated = match &plan.evaluation {
        Some((query, _)) => Some(Source::new("eval_query", query)?),
        None => None,
    };
    let (run, found) = Run::open(&plan, &workers[0].server, &model)?;
    let done = match found {
        Found::Back(steps) => steps,
        _ => run.done,
    };
    if done >= plan.steps {
        notice!(
            "all {} steps of this run have been taken already; ask for more steps to go on with it, or for restart => true",
            plan.steps
        );
        return Ok(());
    }
    if !procedure.commits() && plan.steps - done > 1 {
        let code = PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION;
        return Err(Error::new(
            code,
            format!(
                "candle.train takes one step inside a transaction block, but {} are to be taken",
                plan.steps - done
            ),
        )
        .hint(format!(
            "CALL it outside of BEGIN … COMMIT, where it commits every step, or with steps => {}.",
            done + 1
        )));
    }
    let progress = Progress::begin(
        &workers[0].client,
        "train",
        &plan.trained.model,
        done as u64,
        plan.steps as u64,
    )?;
    let mut driver = Driver {
        procedure,
        workers: &workers,
        progress: &progress,
        plan: &plan,
        source: &source,
        evaluated,
        run,
        reader: None,
        without_loss: 0,
    };
    driver.resume(found)?;
    driver.go()
}

impl Driver<'_> {
    /// Goes to where the run was left.
    fn resume(&mut self, found: Found) -> Result<()> {
        let (trained, steps) = (&self.plan.trained, self.plan.steps);
        match found {
            Found::New => return Ok(()),
            Found::Same => {}
            Found::Ahead(count) => {
                notice!("{trained} was trained by {count} other steps since this run stopped; it goes on with it");
            }
            Found::Back(done) => {
                notice!("{trained} was put back to the state after step {done} of this run, which goes on from there");
                return self.replay(done);
            }
        }
        if self.run.done > 0 {
            notice!("going on after step {} of {steps}", self.run.done);
        }
        if let Some(every) = self.plan.evaluation.as_ref().map(|(_, every)| *every)
            && self.run.done > 0
            && self.run.done % every == 0
            && !self.run.is_evaluated()?
        {
            self.evaluate()?;
        }
        Ok(())
    }

    /// Goes to where the run was after `done` steps by making its batches again.
    fn replay(&mut self, done: i64) -> Result<()> {
        self.run.rewind();
        for _ in 0..done {
            self.next_batch()?;
        }
        self.run.put_back(self.plan, done)
    }

    fn go(&mut self) -> Result<()> {
        let procedure = self.procedure;
        while self.run.done < self.plan.steps {
            procedure.round(|| self.step())?;
        }
        Ok(())
    }

    /// One step, and what is due after it.
    fn step(&mut self) -> Result<()> {
        let before = self.run.done;
        let batch = self.next_batch()?;
        let number = before + 1;
        let rate = self.plan.schedule.map(|schedule| schedule.learning_rate(number));
        let taken = step::take(self.workers, self.progress, &self.plan.trained, batch, rate)?;
        self.run.done = number;
        self.run.save(self.plan, &taken, before)?;
        self.check_converging(&taken)?;
        if self.plan.checkpoint_every.is_some_and(|every| number % every == 0) {
            self.save_checkpoint()?;
        }
        self.procedure.commit();
        self.progress.tell("running", number as u64);
        self.tell(&taken);
        if self
            .plan
            .evaluation
            .as_ref()
            .is_some_and(|(_, every)| number % every == 0)
        {
            self.evaluate()?;
        }
        Ok(())
    }

    /// The batch that comes next. The run's position moves behind it.
    fn next_batch(&mut self) -> Result<Vec<Sequence>> {
        loop {
            if self.reader.is_none() {
                self.open_epoch()?;
            }
            let Some(reader) = &mut self.reader else { continue };
            let batch = self.plan.packing.batch(reader, &mut self.run.position)?;
            if !batch.is_empty() {
                self.run.used = true;
                return Ok(batch);
            }
            if !self.run.used {
                let code = PgSqlErrorCode::ERRCODE_NO_DATA_FOUND;
                return Err(Error::new(code, "the query gives no texts to train on").hint(
                    "A document needs at least two tokens, and a target that its loss mask does not leave out.",
                ));
            }
            self.reader = None;
            self.run.next_epoch();
        }
    }

    /// Opens the query in the order of this pass, at the run's position.
    fn open_epoch(&mut self) -> Result<()> {
        let digest = self.source.digest()?;
        if self.run.position != Position::default() && !self.run.digest.is_empty() && self.run.digest != digest {
            warning!(
                "the query gives other rows than when this run stopped; it goes on at the same place, but not with the \
                 batches that it would have had"
            );
        }
        self.run.digest = digest;
        let seed = mix(self.plan.seed, self.run.epoch);
        let mut cursor = self.source.open_shuffled(self.procedure, seed)?;
        cursor.skip(self.run.position.document);
        self.reader = Some(Reader::new(self.tokenizing(), self.source, cursor));
        Ok(())
    }

    fn save_checkpoint(&self) -> Result<()> {
        self.progress.tell("saving", self.run.done as u64);
        let client = &self.workers[0].client;
        let request = CreateCheckpointRequest {
            transaction: Some(transaction::writing(client)?),
            model: self.plan.trained.model.clone(),
            tag: String::new(),
            adapter: self.plan.trained.adapter.clone(),
        };
        match self
            .progress
            .wait(write!(client, checkpoints.create_checkpoint(request)))
        {
            Err(error) if error.code == PgSqlErrorCode::ERRCODE_DUPLICATE_OBJECT => {
                notice!("{}; it is kept", error.message());
                Ok(())
            }
            made => made.map(drop),
        }
    }

    /// Measures the loss on the evaluation query and keeps it.
    fn evaluate(&mut self) -> Result<()> {
        let Some(source) = &self.evaluated else { return Ok(()) };
        let done = self.run.done as u64;
        self.progress.tell("evaluating", done);
        let (loss, tokens) = evaluation::measure(self.procedure, self.tokenizing(), source, self.plan)?;
        self.run.save_evaluation(self.plan, loss, tokens)?;
        self.procedure.commit();
        self.progress.tell("running", done);
        notice!(
            "evaluation after step {done}: loss {loss:.4}, perplexity {:.2}, {tokens} tokens",
            loss.exp()
        );
        Ok(())
    }

    /// Ends a run whose model is lost, before a checkpoint is made of it.
    ///
    /// # Errors
    /// 55000 where the loss itself is not finite; where it is scaled, f16 may overflow in a few batches.
    fn check_converging(&mut self, taken: &OptimizerStep) -> Result<()> {
        if !taken.skipped || taken.loss.is_finite() {
            self.without_loss = 0;
            return Ok(());
        }
        self.without_loss += 1;
        if taken.loss_scale != 1.0 && self.without_loss < OVERFLOWS {
            return Ok(());
        }
        let (model, loss, step) = (&self.plan.trained.model, taken.loss, taken.step);
        let message = format!("the loss of model \"{model}\" is {loss} in step {step}");
        let hint = "Restore a checkpoint (source 'checkpoint://model/step') and go on with a lower learning_rate, a warmup or max_grad_norm.";
        Err(Error::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, message).hint(hint))
    }

    /// A notice now and then.
    fn tell(&self, taken: &OptimizerStep) {
        let (done, steps) = (self.run.done, self.plan.steps);
        if done == 1 || done == steps || done % (steps / NOTICES).max(1) == 0 {
            let rate = taken
                .options
                .as_ref()
                .and_then(|options| options.learning_rate)
                .unwrap_or_default();
            let skipped = if taken.skipped {
                ", skipped: its gradient is not finite"
            } else {
                ""
            };
            notice!(
                "step {} ({done} of {steps}): loss {:.4}, learning rate {rate:.3e}, {} tokens, {:.0} ms{skipped}",
                taken.step,
                taken.loss,
                taken.tokens,
                taken.duration_ms
            );
        }
    }
}

impl<'a> Driver<'a> {
    fn tokenizing(&self) -> Tokenizing<'a> {
        Tokenizing {
            client: &self.workers[0].client,
            model: &self.plan.trained.model,
            progress: self.progress,
        }
    }
}

/// A seed for one pass: SplitMix64's finaliser (Steele et al. 2014) over both numbers.
fn mix(seed: i64, epoch: i64) -> i64 {
    let mut z = (seed as u64).wrapping_add((epoch as u64).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (z ^ (z >> 31)) as i64
}
