//! Writing a plan.

use std::path::Path;

use super::plan::{Conversion, Format, PlannedTensor};
use super::target::Target;
use super::tensors::with_bytes;
use super::{documents, gguf, manifest, npz, safetensors};
use crate::decoder::check_source;
use crate::error::Result;
use crate::opened::OpenedModel;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Bytes of all files.
    pub bytes: u64,
}

/// Tells after every tensor how many bytes of tensors are done.
pub(super) struct Progress<'a> {
    report: &'a mut dyn FnMut(&PlannedTensor, u64),
    done: u64,
}

impl Progress<'_> {
    /// A tensor has been written.
    pub(super) fn finished(&mut self, tensor: &PlannedTensor) {
        self.done += tensor.bytes;
        (self.report)(tensor, self.done);
    }
}

impl Conversion {
    /// Writes the target, which must not exist, and reads its headers back. `report` is told after each tensor how many
    /// bytes of [`Conversion::bytes`] are done.
    ///
    /// # Errors
    /// `FailedPrecondition` if `target` exists; `InvalidFile` if a tensor of the source is damaged; `InvalidArgument` if
    /// one does not fit its new type; `Io`. What was written is removed.
    pub fn write(&self, target: &Path, report: &mut dyn FnMut(&PlannedTensor, u64)) -> Result<Converted> {
        let target = Target::begin(target, self.options.format.is_folder())?;
        let mut progress = Progress { report, done: 0 };
        let bytes = match self.options.format {
            Format::Safetensors => safetensors::write(self, target.partial(), &mut progress)?,
            Format::Jsonl => manifest::write(self, target.partial(), &mut progress)?,
            Format::Npz => npz::write(self, target.partial(), &mut progress)?,
            Format::Gguf => gguf::write(self, target.partial(), &mut progress)?,
        };
        self.check_written(target.partial())?;
        target.publish()?;
        Ok(Converted { bytes })
    }

    /// Calls `write` with a tensor's bytes in transformers' layout and the planned type.
    pub(super) fn with_bytes_of<T>(
        &self,
        planned: &PlannedTensor,
        write: impl FnOnce(&[u8]) -> Result<T>,
    ) -> Result<T> {
        with_bytes(planned, self.read(planned, false)?, write)
    }

    /// The documents of a Hugging Face directory.
    pub(super) fn documents(&self) -> Result<Vec<(String, String)>> {
        documents::of(self)
    }

    /// Reads the headers of what was written.
    fn check_written(&self, partial: &Path) -> Result<()> {
        let written = match self.options.format {
            Format::Npz => OpenedModel::from_hugging_face(partial)?,
            _ => OpenedModel::open(partial)?,
        };
        check_source(&written.config, &written.source()).map(drop)
    }
}

/// Groups tensors into shards of at most that many bytes each, in order.
pub(super) fn shards(tensors: &[PlannedTensor], most: u64) -> Vec<&[PlannedTensor]> {
    let (mut shards, mut start, mut bytes) = (Vec::new(), 0, 0u64);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && bytes + tensor.bytes > most {
            shards.push(&tensors[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += tensor.bytes;
    }
    shards.push(&tensors[start..]);
    shards
}
