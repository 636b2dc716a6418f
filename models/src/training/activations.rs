//! What of the forward pass is kept for the backward pass, and how.

use std::num::NonZeroUsize;

/// How a pass treats the activations that its backward needs. The defaults are the fastest and take the most memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActivationSettings {
    /// Which are computed again.
    pub recompute: Recompute,
    /// How those that are kept are stored.
    pub compression: Compression,
    /// Whether sequences of one pass that begin with the same tokens share the activations of these.
    pub reuse: bool,
}

/// Which activations the backward pass computes again (arXiv:1604.06174). Gradients are the same bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// All are kept, but for outputs of norms and activation functions, which are cheap.
    #[default]
    None,
    /// Only the input of every n-th block is kept. Backward runs the forward pass of n blocks again, so that activations
    /// of n blocks exist at a time.
    EveryNthBlock(NonZeroUsize),
}

impl Recompute {
    /// Of every block: `"blocks"`.
    pub const BLOCKS: Self = Self::EveryNthBlock(NonZeroUsize::MIN);
}

/// How kept activations are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As they are, f32.
    #[default]
    None,
    /// Rounded to bfloat16: half the memory. The loss is the same; the gradient differs by the rounding, in the tests by
    /// at most 0.5 % of its norm.
    Bf16,
    /// Signed bytes in blocks of 64 with one scale each: a little more than a quarter of the memory. The residual stream
    /// after attention is stored as differences to that before it where these are smaller. The loss is the same; the
    /// gradient differs by the rounding, in the tests by at most 3 % of its norm.
    Q8,
}

impl Compression {
    /// Every way.
    pub const ALL: [Self; 3] = [Self::None, Self::Bf16, Self::Q8];

    /// Its name in a model's settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
        }
    }
}
