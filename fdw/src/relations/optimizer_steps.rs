//! `optimizer_steps`: INSERT takes a step of AdamW; SELECT is the training log.

use candle_compute_proto::v1::{AdamWOptions, ListStepsRequest, OptimizerStep, StepRequest};

use crate::client::{read, write};
use crate::error::Error;
use crate::relation::{Call, Column, Inputs, Relation, Row, Rows, Work, Writer, Writes, choice, key, output, stored};
use crate::relations::adapters;
use crate::values::{Kind, Value};

/// One row per step taken.
pub(crate) struct OptimizerSteps;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    output("step", Kind::BigInt),
    output("loss", Kind::Double),
    output("grad_norm", Kind::Double),
    stored("learning_rate", Kind::Double),
    stored("beta1", Kind::Double),
    stored("beta2", Kind::Double),
    stored("epsilon", Kind::Double),
    stored("weight_decay", Kind::Double),
    stored("max_grad_norm", Kind::Double),
    output("loss_scale", Kind::Double),
    output("skipped", Kind::Boolean),
    output("tokens", Kind::BigInt),
    output("duration_ms", Kind::Double),
    output("created_at", Kind::Timestamp),
    choice("adapter", Kind::Text),
    output("overflows", Kind::BigInt),
    output("underflows", Kind::BigInt),
];

impl Relation for OptimizerSteps {
    fn name(&self) -> &'static str {
        "optimizer_steps"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListStepsRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
                adapter: adapters::named(&call.inputs)?,
            };
            for step in read!(call.client, training.list_steps(request)).await?.steps {
                if !rows.row(row(step)).await {
                    break;
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            insert: true,
            ..Writes::default()
        }
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let mut rows = Vec::with_capacity(inputs.len());
            for inputs in inputs {
                let request = StepRequest {
                    transaction: writer.transaction.clone(),
                    model: inputs.required("model")?,
                    options: Some(AdamWOptions {
                        learning_rate: inputs.number("learning_rate"),
                        beta1: inputs.number("beta1"),
                        beta2: inputs.number("beta2"),
                        epsilon: inputs.number("epsilon"),
                        weight_decay: inputs.number("weight_decay"),
                        max_grad_norm: inputs.number("max_grad_norm"),
                    }),
                    adapter: adapters::named(&inputs)?,
                };
                let taken = write!(writer.client, training.step(request)).await?;
                rows.push(row(taken.step.ok_or_else(|| Error::protocol("step"))?));
            }
            Ok(rows)
        })
    }
}

fn row(step: OptimizerStep) -> Row {
    let options = step.options.unwrap_or_default();
    vec![
        step.model.into(),
        Value::count(step.step),
        step.loss.into(),
        step.grad_norm.into(),
        options.learning_rate.into(),
        options.beta1.into(),
        options.beta2.into(),
        options.epsilon.into(),
        options.weight_decay.into(),
        options.max_grad_norm.into(),
        step.loss_scale.into(),
        step.skipped.into(),
        Value::count(step.tokens),
        step.duration_ms.into(),
        Value::time(step.created_at),
        Value::Echo,
        Value::count(step.overflows),
        Value::count(step.underflows),
    ]
}
