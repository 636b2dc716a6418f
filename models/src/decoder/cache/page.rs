//! One page, and who grants the memory for it.

use candle_kernels_cpu::{CacheType, PageLayout};
use std::fmt::Debug;
use std::sync::Arc;

use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// Positions of a page. A divisor of the attention kernel's blocks of keys; small, since a sequence's last page is partly
/// empty and only full ones are shared.
pub const PAGE_POSITIONS: usize = 16;

/// Grants memory for pages.
pub trait PageMemory: Debug + Send + Sync {
    /// Takes `bytes`, if need be by [evicting](super::PagePool::evict) pages that no sequence uses. False when there is
    /// no room for them.
    fn reserve(&self, bytes: u64) -> bool;

    /// Gives back what was reserved.
    fn release(&self, bytes: u64);
}

/// What pages of a decoder look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageShape {
    /// One layer's part.
    pub(crate) layout: PageLayout,
    /// Layers of the decoder; all are in one page.
    pub(crate) layers: usize,
}

impl PageShape {
    pub(crate) fn new(config: &DecoderConfig, kind: CacheType) -> Self {
        Self {
            layout: PageLayout {
                kind,
                positions: PAGE_POSITIONS,
                key_value_heads: config.key_value_heads,
                head_dim: config.head_dim,
            },
            layers: config.layers,
        }
    }

    /// Bytes of a page.
    pub(crate) fn bytes(&self) -> u64 {
        (self.layers * self.layout.words() * size_of::<f32>()) as u64
    }

    /// Elements of a position's keys in one layer.
    pub(crate) fn key_value_width(&self) -> usize {
        self.layout.key_value_heads * self.layout.head_dim
    }
}

/// Keys and values of [`PAGE_POSITIONS`] neighbouring positions in all layers.
#[derive(Debug)]
pub(super) struct Page {
    /// One layer's part after another.
    words: Box<[f32]>,
    memory: Option<Arc<dyn PageMemory>>,
}

impl Page {
    /// An empty page, from the memory that `memory` grants. Fails with [`Error::ResourceExhausted`].
    pub(super) fn new(shape: &PageShape, memory: Option<&Arc<dyn PageMemory>>) -> Result<Self> {
        if memory.is_some_and(|memory| !memory.reserve(shape.bytes())) {
            return Err(Error::ResourceExhausted(format!(
                "there is no room for a further page of {} bytes in the key/value cache",
                shape.bytes()
            )));
        }
        Ok(Self {
            words: vec![0.0; shape.layers * shape.layout.words()].into_boxed_slice(),
            memory: memory.cloned(),
        })
    }

    /// A page of the same content.
    pub(super) fn copy(&self, shape: &PageShape) -> Result<Self> {
        let mut copy = Self::new(shape, self.memory.as_ref())?;
        copy.words.copy_from_slice(&self.words);
        Ok(copy)
    }

    /// One layer's part.
    pub(super) fn layer(&self, shape: &PageShape, layer: usize) -> &[f32] {
        let words = shape.layout.words();
        &self.words[layer * words..(layer + 1) * words]
    }

    /// One layer's part, to be written.
    pub(super) fn layer_mut(&mut self, shape: &PageShape, layer: usize) -> &mut [f32] {
        let words = shape.layout.words();
        &mut self.words[layer * words..(layer + 1) * words]
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if let Some(memory) = &self.memory {
            memory.release(size_of_val::<[f32]>(&self.words) as u64);
        }
    }
}
