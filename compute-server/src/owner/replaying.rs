//! Making committed changes again from the commit log, by the way in which they were made at first.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::adapters::{Delta, ProductData};
use candle_models::training::{self, AdamWOptions, Gradient, TrainingSequence};

use super::accumulated::Part;
use super::adapter::StagedMerge;
use super::overlay::{Consumed, Operation, StagedStep};
use super::passes::PassInputs;
use super::settings::TrainingSettings;
use super::state::Owner;
use super::writing::StagedWrite;
use super::{Ticket, TransactionId, View};
use crate::commit_log::{Batch, Changes, GradientData, Merge, Pass, Recipe, Step, Write, operation, recipe_step};
use crate::error::{Error, Result};

/// The transaction that a replay is, as far as the model can tell.
const REPLAY: &str = "replay";

impl Owner {
    /// Stages the changes of a frame. Returns whether all steps came out as they did at first.
    ///
    /// # Errors
    /// `Internal` for changes that do not fit the model, `Memory`, `Cancelled` when the model is unloaded meanwhile. The
    /// model is of no use then.
    pub(crate) fn replay(&mut self, changes: Changes) -> Result<bool> {
        let transaction: TransactionId = REPLAY.into();
        let ticket = Ticket {
            transaction: Arc::clone(&transaction),
            subtransaction: 1,
        };
        let mut exact = true;
        for operation in changes.operations {
            let kind = operation.kind.ok_or_else(|| unfit("an operation of an unknown kind"))?;
            let operation = match kind {
                operation::Kind::Batch(batch) => Operation::Batch(self.replay_batch(batch)?),
                operation::Kind::Gradient(data) => Operation::Batch(self.replay_gradient(data)?),
                operation::Kind::Zero(parts) => Operation::Zero(self.replay_consumed(parts)),
                operation::Kind::Step(step) => {
                    let (step, as_before) = self.replay_step(&transaction, *step)?;
                    exact &= as_before;
                    Operation::Step(Box::new(step))
                }
                operation::Kind::Settings(text) => Operation::Configure(TrainingSettings::from_json(&text)?),
                operation::Kind::Write(write) => Operation::Write(self.replay_write(write)?),
                operation::Kind::Train(train) => Operation::Train {
                    parameter: self.known(train.parameter)?,
                    trainable: train.trainable,
                },
                operation::Kind::Layouts(layouts) => Operation::Attend(self.replay_layouts(&view(), layouts)?),
                operation::Kind::Merge(merge) => Operation::Merge(self.replay_merge(merge)?),
                operation::Kind::Merged(_) => Operation::Merged,
            };
            self.push(&ticket, operation);
        }
        self.publishing = Some((transaction, changes.sealed as usize));
        Ok(exact)
    }

    /// Applies what [`replay`](Self::replay) staged, as frame `number`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub(crate) fn end_replay(&mut self, number: u64) -> Result<()> {
        self.apply(&REPLAY.into(), number)
    }

    fn replay_batch(&mut self, batch: Batch) -> Result<Part> {
        self.make_trainable()?;
        let mut rows = batch.sequences.into_iter();
        let mut part = self.replay_recipe(&mut rows, batch.recipe.unwrap_or_default())?;
        part.duration_ms = batch.duration_ms;
        Ok(part)
    }

    fn replay_recipe(&mut self, rows: &mut impl Iterator<Item = v1::Sequence>, recipe: Recipe) -> Result<Part> {
        let mut part = self.new_part(&view())?;
        for step in recipe.steps {
            match step.kind {
                Some(recipe_step::Kind::Pass(pass)) => self.replay_pass(&mut part, rows, &pass)?,
                Some(recipe_step::Kind::Apart(recipe)) => {
                    let apart = self.replay_recipe(rows, recipe)?;
                    part.merge(apart)?;
                }
                None => return Err(unfit("a gradient that was summed in an unknown way")),
            }
        }
        Ok(part)
    }

    fn replay_pass(
        &mut self,
        part: &mut Part,
        rows: &mut impl Iterator<Item = v1::Sequence>,
        pass: &Pass,
    ) -> Result<()> {
        let given = pass.settings.as_deref().map(TrainingSettings::from_json).transpose()?;
        let inputs = PassInputs {
            settings: given.unwrap_or_else(|| self.settings(&view()).clone()),
            first_sequence: pass.first_sequence,
            loss_factor: pass.loss_factor,
            alone: true,
        };
        let rows: Vec<v1::Sequence> = rows.take(pass.sequences as usize).collect();
        let config = &self.shared.decoder_config;
        let sequences = rows.iter().map(|row| {
            let targets = (row.has_targets || !row.targets.is_empty()).then_some(row.targets.as_slice());
            Ok(TrainingSequence::new(&row.token_ids, targets, row.loss_weight, config)?)
        });
        let sequences = sequences.collect::<Result<Vec<_>>>()?;
        if sequences.len() as u64 != pass.sequences {
            return Err(unfit("fewer sequences than it says"));
        }
        let shared = Arc::clone(&self.shared);
        let mut losses = Vec::with_capacity(sequences.len());
        while losses.len() < sequences.len() {
            let cancelled = || shared.is_unloaded();
            let next = (sequences.as_slice(), losses.len());
            let passed = self.accumulate_next(&view(), &inputs, next, &mut part.gradient, &cancelled)?;
            losses.extend(passed.losses);
        }
        let rows = rows
            .into_iter()
            .zip(losses)
            .map(|(sequence, loss)| v1::AccumulatedSequence {
                model: self.shared.name.clone(),
                sequence: Some(sequence),
                loss: Some(v1::SequenceLoss {
                    loss: loss.loss,
                    token_count: loss.token_count,
                }),
            });
        part.sequences.extend(rows);
        Ok(())
    }

    fn replay_gradient(&mut self, data: GradientData) -> Result<Part> {
        self.make_trainable()?;
        let mut part = self.new_part(&view())?;
        let count = self.shared.parameters.len();
        let mut sums = match data.sums.is_empty() {
            true => Vec::new(),
            false => vec![None; count],
        };
        for sum in data.sums {
            sums[self.known(sum.parameter)?] = Some(elements(&sum.data));
        }
        let plain = training::GradientData {
            trainable: data.trainable,
            sums,
            tokens: data.tokens,
            micro_batches: data.micro_batches,
            weighted_loss: data.weighted_loss,
            loss_tokens: data.loss_tokens,
            scale: data.scale,
            overflows: data.overflows,
            underflows: data.underflows,
        };
        part.gradient = Gradient::from_data(self.training_decoder(), plain)?;
        part.sequences = data.sequences;
        part.duration_ms = data.duration_ms;
        Ok(part)
    }

    fn replay_consumed(&self, parts: u64) -> Consumed {
        Consumed {
            parts: parts as usize,
            gradient_version: self.versions.gradient,
        }
    }

    /// The step, and whether its gradient is what it was.
    fn replay_step(&self, transaction: &TransactionId, step: Step) -> Result<(StagedStep, bool)> {
        let report = step.report.ok_or_else(|| unfit("a step without a report"))?;
        let logged = report.options.unwrap_or_default();
        let (Some(learning_rate), Some(beta1), Some(beta2), Some(epsilon), Some(weight_decay)) = (
            logged.learning_rate,
            logged.beta1,
            logged.beta2,
            logged.epsilon,
            logged.weight_decay,
        ) else {
            return Err(unfit("a step without its options"));
        };
        let options = AdamWOptions {
            learning_rate,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            max_grad_norm: logged.max_grad_norm,
            decay_norms_and_biases: step.decay_norms_and_biases,
        };
        let mut memory = Vec::new();
        if self.optimizer.memory_bytes() == 0 {
            let bytes = 8 * self.model.decoder.parameter_count();
            memory.push(self.budget.reserve("the moments of the optimizer", bytes)?);
        }
        let parts = self.parts_of_step(transaction, step.parts as usize);
        let merged = self.merge_parts(&parts, &mut memory)?;
        let gradient = merged.as_ref().or_else(|| parts.first().map(|part| &part.gradient));
        let trainable = self.trainable(&view());
        let grad_norm = gradient.map_or(Ok(f64::NAN), |gradient| gradient.norm(&trainable))?;
        let exact = grad_norm.to_bits() == report.grad_norm.to_bits();
        let scaling = self.settings(&view()).precision().loss_scaling;
        let staged = StagedStep {
            consumed: self.replay_consumed(step.parts),
            options,
            loss_scale: scaling.after_step(self.loss_scale(&view()), report.skipped),
            report,
            merged,
            _memory: memory,
        };
        Ok((staged, exact))
    }

    fn replay_write(&self, write: Write) -> Result<StagedWrite> {
        let values = elements(&write.data);
        let memory = self
            .budget
            .reserve("new elements of a parameter", write.data.len() as u64)?;
        Ok(StagedWrite {
            parameter: self.known(write.parameter)?,
            chunk: write.chunk as usize,
            start: write.start as usize,
            values,
            _memory: memory,
        })
    }

    fn replay_merge(&self, merge: Merge) -> Result<StagedMerge> {
        let products = merge.products.into_iter().map(|product| {
            Ok(ProductData {
                parameter: self.known(product.parameter)?,
                rank: product.rank as usize,
                b: elements(&product.b),
                a: elements(&product.a),
            })
        });
        let delta = Delta::from_data(&self.model.decoder, products.collect::<Result<_>>()?)?;
        let memory = self.budget.reserve("merging the adapter", delta.memory_bytes())?;
        Ok(StagedMerge {
            delta,
            adapter: None,
            _memory: memory,
        })
    }

    fn known(&self, parameter: u32) -> Result<usize> {
        let index = parameter as usize;
        match index < self.shared.parameters.len() {
            true => Ok(index),
            false => Err(unfit("a parameter that the model does not have")),
        }
    }
}

fn view() -> View {
    View::Transaction(REPLAY.into())
}

fn elements(data: &[u8]) -> Vec<f32> {
    data.as_chunks().0.iter().copied().map(f32::from_le_bytes).collect()
}

fn unfit(what: &str) -> Error {
    Error::Internal(format!("the commit log holds {what}"))
}
