//! `batches`: INSERT runs forward and backward on a row and adds to the model's gradient.

use candle_compute_proto::v1::{AccumulateBatchesRequest, ListBatchesRequest, Sequence, SequenceLoss};

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Call, Column, Inputs, Relation, Row, Rows, Work, Writer, Writes, choice, key, missing, output, stored,
};
use crate::relations::adapters;
use crate::values::{Kind, Value};

/// One row per training sequence accumulated since the last step.
pub(crate) struct Batches;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    stored("tokens", Kind::IntArray),
    stored("targets", Kind::IntArray),
    stored("loss_weight", Kind::Real),
    output("loss", Kind::Double),
    output("token_count", Kind::Int),
    choice("adapter", Kind::Text),
];

impl Relation for Batches {
    fn name(&self) -> &'static str {
        "batches"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let request = ListBatchesRequest {
                transaction: call.transaction,
                models: call.inputs.wanted("model"),
                adapter: adapters::named(&call.inputs)?,
            };
            for entry in read!(call.client, training.list_batches(request)).await?.sequences {
                let sequence = entry.sequence.unwrap_or_default();
                if !rows
                    .row(row(entry.model, sequence, entry.loss.unwrap_or_default()))
                    .await
                {
                    break;
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            insert: true,
            batched: i32::MAX,
            ..Writes::default()
        }
    }

    fn insert(&self, writer: Writer, inputs: Vec<Inputs>) -> Work<Vec<Row>> {
        Box::pin(async move {
            let mut rows = Vec::with_capacity(inputs.len());
            let mut pending = inputs.into_iter().peekable();
            // Runs of rows of one model or adapter travel together, in the order of the statement.
            while let Some(first) = pending.next() {
                let target = [first.required("model")?, adapters::named(&first)?];
                let same =
                    |next: &Inputs| ["model", "adapter"].map(|column| next.text(column).unwrap_or_default()) == target;
                let mut sequences = vec![sequence(&first)?];
                while let Some(next) = pending.next_if(same) {
                    sequences.push(sequence(&next)?);
                }
                accumulate(&writer, &target, sequences, &mut rows).await?;
            }
            Ok(rows)
        })
    }
}

async fn accumulate(
    writer: &Writer,
    [model, adapter]: &[String; 2],
    sequences: Vec<Sequence>,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let request = AccumulateBatchesRequest {
        transaction: writer.transaction.clone(),
        model: model.clone(),
        sequences: sequences.clone(),
        adapter: adapter.clone(),
    };
    let losses = write!(writer.client, training.accumulate_batches(request))
        .await?
        .losses;
    if losses.len() != sequences.len() {
        return Err(Error::protocol("loss for every sequence"));
    }
    rows.extend(
        sequences
            .into_iter()
            .zip(losses)
            .map(|(sequence, loss)| row(model.clone(), sequence, loss)),
    );
    Ok(())
}

fn sequence(inputs: &Inputs) -> Result<Sequence> {
    let Some(token_ids) = inputs.integers("tokens") else {
        return Err(missing("tokens"));
    };
    let targets = inputs.integers("targets");
    Ok(Sequence {
        token_ids,
        has_targets: targets.is_some(),
        targets: targets.unwrap_or_default(),
        loss_weight: inputs.real("loss_weight"),
    })
}

fn row(model: String, sequence: Sequence, loss: SequenceLoss) -> Row {
    vec![
        model.into(),
        Value::Ints(sequence.token_ids),
        if sequence.has_targets {
            Value::Ints(sequence.targets)
        } else {
            Value::Null
        },
        sequence.loss_weight.into(),
        loss.loss.into(),
        loss.token_count.into(),
        Value::Echo,
    ]
}
