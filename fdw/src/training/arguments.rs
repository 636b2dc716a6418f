//! The arguments of `candle.train`, checked.

use candle_compute_proto::v1::Model;
use pgrx::PgSqlErrorCode;
use serde_json::{Value, json};

use super::packing::{Packing, PackingKind};
use super::schedule::{Schedule, ScheduleKind};
use crate::error::{Error, Result};

/// What the caller gave; None where nothing or NULL.
pub(crate) struct Arguments {
    pub(crate) model: Option<String>,
    pub(crate) query: Option<String>,
    pub(crate) steps: Option<i32>,
    pub(crate) batch_size: Option<i32>,
    pub(crate) sequence_length: Option<i32>,
    pub(crate) learning_rate: Option<f64>,
    pub(crate) schedule: Option<String>,
    pub(crate) warmup: Option<i32>,
    pub(crate) min_learning_rate: Option<f64>,
    pub(crate) eval_query: Option<String>,
    pub(crate) eval_every: Option<i32>,
    pub(crate) checkpoint_every: Option<i32>,
    pub(crate) seed: Option<i64>,
    pub(crate) workers: Option<Vec<Option<String>>>,
    pub(crate) packing: Option<String>,
    pub(crate) restart: Option<bool>,
    pub(crate) adapter: Option<String>,
}

/// What a run changes: a model, or an adapter of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trained {
    pub(super) model: String,
    /// Empty for the model itself.
    pub(super) adapter: String,
}

impl std::fmt::Display for Trained {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.adapter.as_str() {
            "" => write!(formatter, "model \"{}\"", self.model),
            adapter => write!(formatter, "adapter \"{adapter}\" of model \"{}\"", self.model),
        }
    }
}

/// A run as it was asked for.
pub(super) struct Plan {
    pub(super) trained: Trained,
    pub(super) query: String,
    /// Steps of the whole run.
    pub(super) steps: i64,
    pub(super) packing: Packing,
    pub(super) schedule: Option<Schedule>,
    /// The query whose loss is measured, and after how many steps each time.
    pub(super) evaluation: Option<(String, i64)>,
    pub(super) checkpoint_every: Option<i64>,
    pub(super) seed: i64,
    pub(super) restart: bool,
    /// The arguments that make a run this one rather than another, as a JSON object.
    pub(super) identity: Value,
}

impl Arguments {
    /// What is trained, and the schemas of the workers; empty where there are none.
    ///
    /// # Errors
    /// 22004 for a NULL.
    pub(super) fn targets(&self) -> Result<(Trained, Vec<&str>)> {
        let trained = Trained {
            model: given("model", self.model.clone())?,
            adapter: self.adapter.clone().unwrap_or_default(),
        };
        let Some(workers) = &self.workers else {
            return Ok((trained, Vec::new()));
        };
        let names: Option<Vec<&str>> = workers.iter().map(Option::as_deref).collect();
        let names = names.ok_or_else(|| null("workers"))?;
        if names.is_empty() {
            return Err(Error::bad_value(
                "workers is empty; name at least one schema, or leave it out",
            ));
        }
        Ok((trained, names))
    }

    /// Checks everything against the model.
    ///
    /// # Errors
    /// 22004 and 22023 that name the argument.
    pub(super) fn plan(self, trained: Trained, model: &Model) -> Result<Plan> {
        let query = given("query", self.query)?;
        let steps = i64::from(at_least_one("steps", Some(self.steps.ok_or_else(|| null("steps"))?))?.unwrap_or(1));
        let context = model.context_length as i32;
        let length = at_least_one("sequence_length", self.sequence_length)?.unwrap_or(context);
        if length > context {
            return Err(Error::bad_value(format!(
                "sequence_length is {length}, more than the context length {context} of model \"{}\"",
                model.name
            )));
        }
        let rows = at_least_one("batch_size", self.batch_size)?.unwrap_or(8);
        let kind = PackingKind::named(self.packing.as_deref().unwrap_or("documents"))?;
        let packing = Packing::new(kind, length, rows)?;
        let seed = self.seed.unwrap_or(0);
        let identity = json!({
            "query": &query, "batch_size": rows, "sequence_length": length, "packing": kind.name(), "seed": seed,
            "learning_rate": self.learning_rate, "schedule": &self.schedule, "warmup": self.warmup,
            "min_learning_rate": self.min_learning_rate, "adapter": &self.adapter,
        });
        let warmup = match self.warmup {
            Some(warmup) if warmup < 0 => {
                return Err(Error::bad_value(format!("warmup must be at least 0, not {warmup}")));
            }
            warmup => warmup.map(i64::from),
        };
        let kind = self.schedule.as_deref().map(ScheduleKind::named).transpose()?;
        let schedule = if kind.is_some() || warmup.is_some() || self.learning_rate.is_some() {
            let highest = self
                .learning_rate
                .or(configured(model, "learning_rate"))
                .unwrap_or(1e-3);
            Some(Schedule::new(
                kind.unwrap_or(ScheduleKind::Constant),
                highest,
                self.min_learning_rate,
                warmup.unwrap_or(0),
                steps,
            )?)
        } else if self.min_learning_rate.is_some() {
            return Err(Error::bad_value("min_learning_rate needs a schedule")
                .hint("Give schedule => 'linear' or schedule => 'cosine'."));
        } else {
            None
        };
        let checkpoint_every = at_least_one("checkpoint_every", self.checkpoint_every)?.map(i64::from);
        let evaluation = match (self.eval_query, at_least_one("eval_every", self.eval_every)?) {
            (None, None) => None,
            (Some(query), every) => Some((query, every.map_or(steps, i64::from))),
            (None, Some(_)) => {
                return Err(Error::bad_value("eval_every needs eval_query")
                    .hint("Give a query for the texts whose loss is to be measured, as eval_query => 'SELECT …'."));
            }
        };
        Ok(Plan {
            trained,
            query,
            steps,
            packing,
            schedule,
            evaluation,
            checkpoint_every,
            seed,
            restart: self.restart.unwrap_or(false),
            identity,
        })
    }
}

/// A number of the model's configuration.
fn configured(model: &Model, name: &str) -> Option<f64> {
    serde_json::from_str::<Value>(&model.config_json)
        .ok()?
        .get(name)?
        .as_f64()
}

fn given<T>(name: &str, value: Option<T>) -> Result<T> {
    value.ok_or_else(|| null(name))
}

fn null(name: &str) -> Error {
    let code = PgSqlErrorCode::ERRCODE_NULL_VALUE_NOT_ALLOWED;
    Error::new(code, format!("{name} must not be NULL"))
}

fn at_least_one(name: &str, value: Option<i32>) -> Result<Option<i32>> {
    match value {
        Some(value) if value < 1 => Err(Error::bad_value(format!("{name} must be at least 1, not {value}"))),
        value => Ok(value),
    }
}
