//! The durable state of runs: rows of `candle.training_runs`, changed in the transaction of each step.

use candle_compute_proto::v1::{Model, OptimizerStep};
use pgrx::{JsonB, PgSqlErrorCode};
use serde_json::json;

use super::arguments::Plan;
use super::packing::Position;
use crate::error::{Error, Result};
use crate::procedure::{execute, run};

/// A run as its row has it.
pub(super) struct Run {
    /// Key of the row.
    id: String,
    /// Steps taken.
    pub(super) done: i64,
    /// The model's step before the first of them.
    base_step: i64,
    /// The model's step after the last of them.
    model_step: i64,
    /// Passes over the documents that are done with.
    pub(super) epoch: i64,
    /// Place in the pass under way.
    pub(super) position: Position,
    /// Digest of the rows of the pass under way; empty before the first.
    pub(super) digest: String,
    /// Whether the pass under way has given a batch.
    pub(super) used: bool,
}

/// How a run's row relates to the model.
pub(super) enum Found {
    /// There was none: one was made.
    New,
    /// The model is where the run left it.
    Same,
    /// The model was stepped by others since; it is this many steps on.
    Ahead(i64),
    /// The model was put back to the state after this many steps of the run.
    Back(i64),
}

impl Run {
    /// Finds the run of these arguments, or makes its row.
    ///
    /// # Errors
    /// 55000 where the model was put back to a state that is none of the run's.
    pub(super) fn open(plan: &Plan, server: &str, model: &Model) -> Result<(Self, Found)> {
        let identity = json!({"server": server, "model": plan.trained.model, "arguments": plan.identity}).to_string();
        let statement = "SELECT pg_catalog.md5($1)";
        let id = run(statement, &[identity.as_str().into()], |rows| {
            rows.first().get_one::<String>()
        })?;
        let id = id.ok_or_else(|| Error::protocol("key"))?;
        if plan.restart {
            execute("DELETE FROM candle.training_runs WHERE run = $1", &[id.as_str().into()])?;
        }
        let step = i64::try_from(model.step).unwrap_or(i64::MAX);
        match Self::load(&id)? {
            Some(run) => {
                let found = run.compare(plan, step)?;
                Ok((run, found))
            }
            None => Ok((Self::create(id, plan, server, step)?, Found::New)),
        }
    }

    fn load(id: &str) -> Result<Option<Self>> {
        let statement = "SELECT done, base_step, model_step, epoch, document, token_offset, data_digest
            FROM candle.training_runs WHERE run = $1";
        run(statement, &[id.into()], |rows| {
            let Some(row) = rows.into_iter().next() else {
                return Ok(None);
            };
            let number = |column| Ok::<i64, pgrx::spi::Error>(row.get::<i64>(column)?.unwrap_or_default());
            Ok(Some(Self {
                id: id.to_string(),
                done: number(1)?,
                base_step: number(2)?,
                model_step: number(3)?,
                epoch: number(4)?,
                position: Position {
                    document: number(5)?,
                    offset: number(6)? as usize,
                },
                digest: row.get::<String>(7)?.unwrap_or_default(),
                used: number(5)? > 0 || number(6)? > 0,
            }))
        })
    }

    fn create(id: String, plan: &Plan, server: &str, step: i64) -> Result<Self> {
        let statement = "INSERT INTO candle.training_runs (run, server, model, arguments, steps, base_step, model_step)
            VALUES ($1, $2, $3, $4, $5, $6, $6)";
        let arguments = [
            id.as_str().into(),
            server.into(),
            plan.trained.model.as_str().into(),
            JsonB(plan.identity.clone()).into(),
            plan.steps.into(),
            step.into(),
        ];
        execute(statement, &arguments)?;
        Ok(Self {
            id,
            done: 0,
            base_step: step,
            model_step: step,
            epoch: 0,
            position: Position::default(),
            digest: String::new(),
            used: false,
        })
    }

    fn compare(&self, plan: &Plan, step: i64) -> Result<Found> {
        if step == self.model_step {
            return Ok(Found::Same);
        }
        if step > self.model_step {
            return Ok(Found::Ahead(step - self.model_step));
        }
        let own = self.model_step - self.base_step == self.done;
        if own && step >= self.base_step {
            return Ok(Found::Back(step - self.base_step));
        }
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        Err(Error::new(
            code,
            format!(
                "{} is at step {step}, but this run left it at step {}",
                plan.trained, self.model_step
            ),
        )
        .detail("It was put back, or made anew, to a state from which the run cannot go on.")
        .hint("Restore it from a later checkpoint, or begin anew with restart => true."))
    }

    /// Goes to the beginning of the data, for a run whose model was put back: its batches are made again from there.
    pub(super) fn rewind(&mut self) {
        (self.epoch, self.position, self.used) = (0, Position::default(), false);
    }

    /// Goes to the beginning of the next pass.
    pub(super) fn next_epoch(&mut self) {
        (self.epoch, self.position, self.used) = (self.epoch + 1, Position::default(), false);
    }

    /// Notes in the row that the run was put back to the state after `done` steps.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub(super) fn put_back(&mut self, plan: &Plan, done: i64) -> Result<()> {
        let statement =
            "UPDATE candle.training_runs SET done = $3, model_step = base_step + $3 WHERE run = $1 AND done = $2";
        let arguments = [self.id.as_str().into(), self.done.into(), done.into()];
        if execute(statement, &arguments)? != 1 {
            return Err(overtaken(plan));
        }
        let statement = "DELETE FROM candle.training_evaluations WHERE run = $1 AND run_step > $2";
        execute(statement, &[self.id.as_str().into(), done.into()])?;
        (self.done, self.model_step) = (done, self.base_step + done);
        Ok(())
    }

    /// Notes a step in the row, and where the next begins. `done` is the number of steps that the row had.
    ///
    /// # Errors
    /// 40001 where another session took the step, or removed the row.
    pub(super) fn save(&mut self, plan: &Plan, step: &OptimizerStep, before: i64) -> Result<()> {
        let taken = i64::try_from(step.step).unwrap_or(i64::MAX) - i64::from(step.skipped);
        self.model_step = taken;
        let statement = "UPDATE candle.training_runs
            SET steps = $3, done = $4, model_step = $5, epoch = $6, document = $7, token_offset = $8, data_digest = $9,
                loss = $10, tokens = tokens + $11, updated_at = pg_catalog.clock_timestamp()
            WHERE run = $1 AND done = $2";
        let arguments = [
            self.id.as_str().into(),
            before.into(),
            plan.steps.into(),
            self.done.into(),
            self.model_step.into(),
            self.epoch.into(),
            self.position.document.into(),
            (self.position.offset as i64).into(),
            self.digest.as_str().into(),
            step.loss.into(),
            i64::try_from(step.tokens).unwrap_or(i64::MAX).into(),
        ];
        if execute(statement, &arguments)? == 1 {
            return Ok(());
        }
        Err(overtaken(plan))
    }

    /// Whether the loss was measured after this many steps.
    pub(super) fn is_evaluated(&self) -> Result<bool> {
        let statement = "SELECT FROM candle.training_evaluations WHERE run = $1 AND run_step = $2";
        Ok(execute(statement, &[self.id.as_str().into(), self.done.into()])? > 0)
    }

    /// Keeps a measured loss: the mean over `tokens` targets.
    pub(super) fn save_evaluation(&self, plan: &Plan, loss: f64, tokens: i64) -> Result<()> {
        let statement = "INSERT INTO candle.training_evaluations (run, run_step, model, step, loss, perplexity, tokens)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            ON CONFLICT (run, run_step) DO UPDATE
            SET step = excluded.step, loss = excluded.loss, perplexity = excluded.perplexity, tokens = excluded.tokens,
                created_at = excluded.created_at";
        let arguments = [
            self.id.as_str().into(),
            self.done.into(),
            plan.trained.model.as_str().into(),
            self.model_step.into(),
            loss.into(),
            loss.exp().into(),
            tokens.into(),
        ];
        execute(statement, &arguments).map(drop)
    }
}

fn overtaken(plan: &Plan) -> Error {
    let code = PgSqlErrorCode::ERRCODE_T_R_SERIALIZATION_FAILURE;
    let message = format!(
        "another session took a step of this run of {}, or removed it",
        plan.trained
    );
    Error::new(code, message).hint("Let one session train at a time.")
}
