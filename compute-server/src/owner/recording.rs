//! What a transaction staged on a model, in the form in which the commit log keeps it.

use candle_compute_proto::v1;
use prost::Message as _;

use super::accumulated::Part;
use super::adapter::StagedMerge;
use super::overlay::{Operation, Overlay};
use super::state::Owner;
use super::writing::StagedWrite;
use crate::commit_log::{
    Batch, Changes, GradientData, GradientSum, Merge, Operation as Logged, Product, Recipe, Step, Train, Write,
    operation, recipe_step,
};
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// What is to be logged of a transaction's changes to a model.
#[derive(Debug)]
pub(crate) struct Recorded {
    /// Encoded [`Changes`].
    pub(crate) data: Vec<u8>,
    /// Tokens that a replay has to compute.
    pub(crate) tokens: u64,
    _memory: Reservation,
}

impl Owner {
    /// What the log is to hold of an overlay that will be applied with `sealed`.
    ///
    /// # Errors
    /// `Memory`.
    pub(super) fn record(&self, overlay: &Overlay, sealed: usize) -> Result<Recorded> {
        let staged = || overlay.operations.iter().map(|staged| &staged.operation);
        // Data is held twice for a moment: as messages, and encoded.
        let bytes = staged().map(|operation| 2 * data_bytes(operation)).sum();
        let mut memory = self.budget.reserve("what is written to the commit log", bytes)?;
        let mut settings = self.settings.to_json();
        let mut changes = Changes {
            sealed: sealed as u64,
            operations: Vec::new(),
        };
        let mut tokens = 0;
        for operation in staged() {
            if let Operation::Batch(part) = operation
                && part.recipe.is_some()
            {
                tokens += part.token_count();
            }
            let kind = logged(operation, &settings)?;
            if let operation::Kind::Settings(new) = &kind {
                settings.clone_from(new);
            }
            changes.operations.push(Logged { kind: Some(kind) });
        }
        let data = changes.encode_to_vec();
        drop(changes);
        memory.shrink(data.len() as u64);
        Ok(Recorded {
            data,
            tokens,
            _memory: memory,
        })
    }
}

/// Bytes of the data that an operation brings into the log, token ids not counted.
fn data_bytes(operation: &Operation) -> u64 {
    match operation {
        Operation::Batch(part) if part.recipe.is_none() => part.gradient.memory_bytes(),
        Operation::Write(write) => 4 * write.values.len() as u64,
        Operation::Attend(staged) => staged.bytes(),
        Operation::Merge(merge) => merge.delta.memory_bytes(),
        _ => 0,
    }
}

/// An operation of a model whose settings are `settings` at that point.
fn logged(operation: &Operation, settings: &str) -> Result<operation::Kind> {
    Ok(match operation {
        Operation::Batch(part) => match &part.recipe {
            Some(recipe) => operation::Kind::Batch(batch(part, recipe, settings)),
            None => operation::Kind::Gradient(gradient(part)?),
        },
        Operation::Zero(consumed) => operation::Kind::Zero(consumed.parts as u64),
        Operation::Step(step) => operation::Kind::Step(Box::new(Step {
            parts: step.consumed.parts as u64,
            decay_norms_and_biases: step.options.decay_norms_and_biases,
            report: Some(step.report.clone()),
        })),
        Operation::Configure(settings) => operation::Kind::Settings(settings.to_json()),
        Operation::Write(write) => operation::Kind::Write(written(write)),
        Operation::Train { parameter, trainable } => operation::Kind::Train(Train {
            parameter: number(*parameter),
            trainable: *trainable,
        }),
        Operation::Attend(staged) => operation::Kind::Layouts(staged.to_log()),
        Operation::Merge(merge) => operation::Kind::Merge(merged(merge)?),
        Operation::Merged => operation::Kind::Merged(true),
        Operation::Spoilt => return Err(Error::Internal("a spoilt gradient is published".to_owned())),
        Operation::Replaced => return Err(Error::Internal("a model that is replaced is logged".to_owned())),
    })
}

fn batch(part: &Part, recipe: &Recipe, settings: &str) -> Batch {
    let mut recipe = recipe.clone();
    leave_out(&mut recipe, settings);
    Batch {
        sequences: sequences(part).cloned().collect(),
        recipe: Some(recipe),
        duration_ms: part.duration_ms,
    }
}

fn sequences(part: &Part) -> impl Iterator<Item = &v1::Sequence> {
    part.sequences.iter().filter_map(|row| row.sequence.as_ref())
}

/// Leaves out settings that are `settings`: nearly always all.
fn leave_out(recipe: &mut Recipe, settings: &str) {
    for step in &mut recipe.steps {
        match &mut step.kind {
            Some(recipe_step::Kind::Pass(pass)) => drop(pass.settings.take_if(|own| own == settings)),
            Some(recipe_step::Kind::Apart(apart)) => leave_out(apart, settings),
            None => {}
        }
    }
}

fn gradient(part: &Part) -> Result<GradientData> {
    let data = part.gradient.to_data()?;
    let sums = data.sums.into_iter().enumerate();
    let sums = sums.filter_map(|(parameter, sum)| {
        Some(GradientSum {
            parameter: number(parameter),
            data: little_endian(&sum?),
        })
    });
    Ok(GradientData {
        sums: sums.collect(),
        trainable: data.trainable,
        tokens: data.tokens,
        micro_batches: data.micro_batches,
        weighted_loss: data.weighted_loss,
        loss_tokens: data.loss_tokens,
        scale: data.scale,
        overflows: data.overflows,
        underflows: data.underflows,
        sequences: part.sequences.clone(),
        duration_ms: part.duration_ms,
    })
}

fn written(write: &StagedWrite) -> Write {
    Write {
        parameter: number(write.parameter),
        chunk: number(write.chunk),
        start: write.start as u64,
        data: little_endian(&write.values),
    }
}

fn merged(merge: &StagedMerge) -> Result<Merge> {
    let products = merge.delta.to_data()?.into_iter().map(|product| Product {
        parameter: number(product.parameter),
        rank: number(product.rank),
        b: little_endian(&product.b),
        a: little_endian(&product.a),
    });
    Ok(Merge {
        products: products.collect(),
    })
}

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
