//! The last forward pass of training in the protocol's form.

use candle_compute_proto::v1;
use candle_models::training::{ActivationStorage, TapeEntry};

use super::state::Owner;

impl Owner {
    /// What the last forward pass of training recorded, whichever transaction asked for it.
    pub(crate) fn tape(&self) -> Vec<v1::TapeEntry> {
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let entry = |(position, entry): (usize, &TapeEntry)| v1::TapeEntry {
            model: self.shared.name.clone(),
            position: number(position),
            segment: entry.segment.clone(),
            operation: entry.operation.to_owned(),
            inputs: entry.inputs.iter().copied().map(number).collect(),
            shape: entry.shape.iter().map(|&size| size as u64).collect(),
            dtype: match entry.dtype {
                "bf16" => v1::DataType::Bf16,
                "q8" => v1::DataType::Q8,
                "f16" => v1::DataType::F16,
                _ => v1::DataType::F32,
            }
            .into(),
            bytes: entry.bytes,
            storage: match entry.storage {
                ActivationStorage::Kept => v1::ActivationStorage::Kept,
                ActivationStorage::Recomputed => v1::ActivationStorage::Recomputed,
                ActivationStorage::Compressed => v1::ActivationStorage::Compressed,
            }
            .into(),
        };
        self.tape.iter().enumerate().map(entry).collect()
    }
}
