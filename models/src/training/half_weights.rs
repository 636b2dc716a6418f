//! Half-precision copies of the weights that products read.

use candle_core::Tensor;

use super::Precision;
use crate::decoder::{Decoder, ParameterId, Projection, WeightType};
use crate::error::Result;
use crate::ops::half::rounded;

/// Copies of the matrices of all projections and of the head. They are made once a step and are stale as soon as the
/// weights change.
#[derive(Debug)]
pub struct HalfWeights {
    precision: Precision,
    /// One entry a parameter; `None` for those that no product reads.
    copies: Vec<Option<Tensor>>,
}

impl HalfWeights {
    /// Rounds the weights of a decoder; none for f32, whose products read the weights themselves.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`](crate::Error::FailedPrecondition) if the weights are not f32 yet
    /// ([`Decoder::make_trainable`]); [`Error::Candle`](crate::Error::Candle) if the device has no memory for them.
    pub fn new(decoder: &Decoder, precision: Precision) -> Result<Option<Self>> {
        if precision == Precision::F32 {
            return Ok(None);
        }
        let mut copies = vec![None; decoder.parameters().len()];
        for id in matrices(decoder) {
            copies[id.0] = Some(rounded(decoder.weight(id).as_f32()?, precision.dtype())?);
        }
        Ok(Some(Self { precision, copies }))
    }

    /// Bytes of the copies for a decoder.
    #[must_use]
    pub fn bytes(decoder: &Decoder, precision: Precision) -> u64 {
        if precision == Precision::F32 {
            return 0;
        }
        let elements = matrices(decoder)
            .into_iter()
            .map(|id| decoder.weight(id).elements() as u64);
        elements.sum::<u64>() * precision.dtype().size_in_bytes() as u64
    }

    /// Their type.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// That of a parameter; none for one that no product reads.
    pub(super) fn get(&self, id: ParameterId) -> Option<&Tensor> {
        self.copies[id.0].as_ref()
    }
}

/// The matrices that products read, each once, in ascending order; of an adapted decoder only those that are held in f32,
/// since others are read as they are held.
fn matrices(decoder: &Decoder) -> Vec<ParameterId> {
    let layout = decoder.layout();
    let of_layers = layout.layers.iter().flat_map(|layer| {
        let network = &layer.feed_forward;
        let shared = layer.experts.as_ref().and_then(|experts| experts.shared.as_ref());
        let networks = [network].into_iter().chain(shared);
        let of_networks = networks.flat_map(|network| network.gate.iter().chain([&network.up, &network.down]));
        let attention = layer.query_key_value.projections().iter();
        attention.chain([&layer.attention_output]).chain(of_networks)
    });
    let mut ids: Vec<ParameterId> = of_layers
        .chain([&layout.head])
        .map(|projection: &Projection| projection.weight)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids.retain(|&id| !decoder.is_adapted() || decoder.weight(id).kind() == WeightType::F32);
    ids
}
