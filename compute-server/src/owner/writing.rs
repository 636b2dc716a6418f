//! Parameters that clients write, and which of them are trained.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_models::{Decoder, ParameterId, ParameterInfo};

use super::overlay::{Operation, Overlay};
use super::state::Owner;
use super::{Ticket, View};
use crate::chunks;
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// New elements of a chunk of a parameter, all or some.
pub(super) struct StagedWrite {
    /// Number of the parameter.
    pub(super) parameter: usize,
    /// Number of the chunk.
    pub(super) chunk: usize,
    /// Elements of the parameter before it.
    pub(super) start: usize,
    pub(super) values: Vec<f32>,
    pub(super) _memory: Reservation,
}

impl Operation {
    /// Applies a write of parameters or layouts to a decoder of the model; other operations change nothing.
    pub(super) fn write_to(&self, decoder: &mut Decoder) -> Result<()> {
        match self {
            Self::Write(write) => {
                let name = decoder.parameters()[write.parameter].name.clone();
                decoder.write_parameter(&name, write.start, &write.values)?;
            }
            Self::Attend(staged) => decoder.put_attention_layouts(staged.layouts.clone()),
            Self::Merge(merge) => merge.delta.apply(decoder)?,
            Self::Merged => decoder.set_merged(),
            Self::Train { parameter, trainable } => decoder.set_trainable(ParameterId(*parameter), *trainable),
            _ => {}
        }
        Ok(())
    }
}

impl Owner {
    /// Stages writes of parameters, all or none.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown parameter and a chunk that does not fit, `Unsupported` for elements of a quantised
    /// parameter, `Memory`.
    pub(crate) fn stage_writes(&mut self, ticket: &Ticket, writes: &[v1::WriteParametersRequest]) -> Result<()> {
        self.check_usable(ticket)?;
        let view = View::Transaction(Arc::clone(&ticket.transaction));
        let mut operations = Vec::with_capacity(writes.len());
        for write in writes {
            let chunk = write
                .chunk
                .as_ref()
                .ok_or_else(|| Error::invalid("a message has no chunk"))?;
            let infos = self.parameter_infos(&view);
            let own = self.model.decoder.own_parameters();
            let parameter = infos[own.clone()]
                .iter()
                .position(|info| info.is_listed() && info.name == chunk.name)
                .map(|index| own.start + index)
                .ok_or_else(|| unknown_parameter(&self.shared.name, &chunk.name))?;
            if !chunk.data.is_empty() || write.trainable.is_none() {
                operations.push(Operation::Write(self.staged_write(
                    parameter,
                    &infos[parameter],
                    chunk,
                )?));
            }
            if let Some(trainable) = write.trainable {
                operations.push(Operation::Train { parameter, trainable });
            }
        }
        for operation in operations {
            self.push(ticket, operation);
        }
        Ok(())
    }

    fn staged_write(&self, parameter: usize, info: &ParameterInfo, chunk: &v1::TensorChunk) -> Result<StagedWrite> {
        if !["f32", "f16", "bf16"].contains(&info.dtype) {
            return Err(candle_models::Error::Unsupported(format!(
                "parameter \"{}\" is held as {} and cannot be written; load the model with dtype f32",
                info.name, info.dtype
            ))
            .into());
        }
        let received = chunks::receive(info, chunk, chunks::dtype_of(info.dtype))?;
        let bytes = 4 * received.values.len() as u64;
        Ok(StagedWrite {
            parameter,
            chunk: received.number,
            start: received.start,
            values: received.values,
            _memory: self.budget.reserve("new elements of a parameter", bytes)?,
        })
    }

    /// The parameters as `view` sees them: a staged step has expanded weights that were not f32.
    fn parameter_infos(&self, view: &View) -> &[ParameterInfo] {
        match self.overlay(view).is_some_and(Overlay::is_stepped) {
            true => self.training_decoder().parameters(),
            false => self.model.decoder.parameters(),
        }
    }

    /// Which parameters optimizer steps change, as `view` sees it; one entry a parameter.
    pub(super) fn trainable(&self, view: &View) -> Vec<bool> {
        let committed = self.model.decoder.parameters().iter();
        let mut trainable: Vec<bool> = committed.map(|parameter| parameter.trainable).collect();
        for staged in self.overlay(view).iter().flat_map(|overlay| &overlay.operations) {
            if let Operation::Train {
                parameter,
                trainable: new,
            } = staged.operation
            {
                trainable[parameter] = new;
            }
        }
        trainable
    }

    /// The elements of a chunk as `view` has staged them, unless a step of its own has changed them since; none where it has
    /// staged nothing of the chunk. `committed` reads the chunk, for what is staged in part.
    ///
    /// # Errors
    /// Of `committed`.
    pub(super) fn staged_chunk(
        &self,
        view: &View,
        (parameter, chunk): (usize, usize),
        committed: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Option<Vec<f32>>> {
        let Some(overlay) = self.overlay(view).filter(|overlay| !overlay.is_recomputed()) else {
            return Ok(None);
        };
        let range = chunks::range(&self.model.decoder.parameters()[parameter], chunk);
        let writes = overlay.operations.iter().filter_map(|staged| match &staged.operation {
            Operation::Write(write) if (write.parameter, write.chunk) == (parameter, chunk) => Some(write),
            _ => None,
        });
        let writes: Vec<&StagedWrite> = writes.collect();
        let whole = writes.iter().rposition(|write| write.values.len() == range.len());
        let mut values = match whole {
            Some(index) => writes[index].values.clone(),
            None if writes.is_empty() => return Ok(None),
            None => committed()?,
        };
        for write in &writes[whole.map_or(0, |index| index + 1)..] {
            let start = write.start - range.start;
            values[start..start + write.values.len()].copy_from_slice(&write.values);
        }
        Ok(Some(values))
    }
}

/// Says of every parameter whether it is trained.
pub(super) fn set_trainable(decoder: &mut Decoder, trainable: &[bool]) {
    for (index, &trainable) in trainable.iter().enumerate() {
        decoder.set_trainable(ParameterId(index), trainable);
    }
}

/// The error for a parameter that the model does not have.
pub(crate) fn unknown_parameter(model: &str, name: &str) -> Error {
    let shown: String = name.chars().take(200).collect();
    Error::invalid(format!("model \"{model}\" has no parameter \"{shown}\""))
}
