//! The keys and values of one sequence's past.

use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Capacity is a multiple of this many positions.
const CHUNK: usize = 64;

/// Keys and values of one sequence in every layer. Grows with the sequence; a fresh one holds nothing.
#[derive(Debug)]
pub struct KeyValueCache {
    layers: Vec<LayerCache>,
    length: usize,
    capacity: usize,
    context_length: usize,
    key_value_width: usize,
    device: Device,
}

/// One layer's keys and values, each `[capacity, key_value_width]` f32.
#[derive(Debug)]
struct LayerCache {
    keys: Tensor,
    values: Tensor,
}

impl KeyValueCache {
    pub(super) fn new(config: &DecoderConfig, device: &Device) -> Self {
        Self {
            layers: Vec::with_capacity(config.layers),
            length: 0,
            capacity: 0,
            context_length: config.context_length,
            key_value_width: config.key_value_width(),
            device: device.clone(),
        }
    }

    /// Number of positions held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Positions that can still be added.
    pub fn remaining(&self) -> usize {
        self.context_length - self.length
    }

    /// Forgets the positions from `length` on. Longer than what is held changes nothing.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> u64 {
        2 * (self.layers.len() * self.capacity * self.key_value_width * DType::F32.size_in_bytes()) as u64
    }

    /// A cache of the same past with storage of its own.
    pub fn deep_copy(&self) -> Result<Self> {
        let copy = |layer: &LayerCache| {
            Ok(LayerCache {
                keys: layer.keys.copy()?,
                values: layer.values.copy()?,
            })
        };
        Ok(Self {
            layers: self.layers.iter().map(copy).collect::<Result<_>>()?,
            device: self.device.clone(),
            ..*self
        })
    }

    /// Whether this cache was made for a decoder of that configuration.
    pub(super) fn fits(&self, config: &DecoderConfig) -> bool {
        self.key_value_width == config.key_value_width()
            && self.context_length == config.context_length
            && (self.layers.is_empty() || self.layers.len() == config.layers)
    }

    /// Makes room for `added` more positions in all `layers`.
    pub(super) fn reserve(&mut self, layers: usize, added: usize) -> Result<()> {
        if added > self.remaining() {
            return Err(Error::InvalidArgument(format!(
                "{} positions do not fit the context of {}",
                self.length + added,
                self.context_length
            )));
        }
        let needed = self.length + added;
        if needed <= self.capacity {
            return Ok(());
        }
        // A quarter more than before keeps the copying linear in the length.
        let capacity = needed
            .max(self.capacity + self.capacity / 4)
            .next_multiple_of(CHUNK)
            .min(self.context_length);
        let mut grown = Vec::with_capacity(layers);
        for layer in 0..layers {
            let present = self.layers.get(layer);
            let keys = self.grow(present.map(|layer| &layer.keys), capacity)?;
            let values = self.grow(present.map(|layer| &layer.values), capacity)?;
            grown.push(LayerCache { keys, values });
        }
        self.layers = grown;
        self.capacity = capacity;
        Ok(())
    }

    fn grow(&self, present: Option<&Tensor>, capacity: usize) -> Result<Tensor> {
        let grown = Tensor::zeros((capacity, self.key_value_width), DType::F32, &self.device)?;
        if let Some(present) = present.filter(|_| self.length > 0) {
            grown.slice_set(&present.narrow(0, 0, self.length)?, 0, 0)?;
        }
        Ok(grown)
    }

    /// Writes the keys and values `[added, key_value_width]` of new positions behind those held. Returns views of all
    /// of the layer's, `[length + added, key_value_width]`. They count as held only after [`advance`](Self::advance).
    pub(super) fn append(&mut self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let total = self.length + keys.dim(0)?;
        let held = &self.layers[layer];
        held.keys.slice_set(keys, 0, self.length)?;
        held.values.slice_set(values, 0, self.length)?;
        Ok((held.keys.narrow(0, 0, total)?, held.values.narrow(0, 0, total)?))
    }

    /// Counts `added` appended positions as held.
    pub(super) fn advance(&mut self, added: usize) {
        self.length += added;
    }
}
