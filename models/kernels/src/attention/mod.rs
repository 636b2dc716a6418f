//! Causal attention with grouped queries, block by block with an online softmax: no score matrix is ever built
//! (Milakov and Gimelshein, 2018; Dao et al., "FlashAttention", 2022). An [`AttentionMask`] restricts it to a band or to
//! chosen blocks; what it hides is not computed.
//!
//! All sequences' tokens are packed in one matrix without padding. Heads lie side by side in a row: `q` and outputs are
//! `[tokens, heads * head_dim]`, `k` and `v` `[tokens, key_value_heads * head_dim]`. Query head `h` reads key-value head
//! `h / (heads / key_value_heads)`.
//!
//! A token's output over a cache is computed in the same order whether its sequence is processed whole or in pieces, alone
//! or beside others. Training multiplies tiles of queries and keys out of packed panels, several times as fast, and in an
//! order of its own.

mod attend;
mod backward;
mod block;
mod cached;
mod forward;
mod mask;
mod packed;
mod page;
mod panels;
mod product;
mod rows;
mod tile;

pub use backward::{AttentionSaved, attention_backward};
pub use cached::{CachedSequence, attention_decode};
pub use forward::attention_forward;
pub use mask::{AttentionMask, BlockLayout};
pub use page::{CacheType, PageLayout};

/// Shape of the heads, and what they see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionHeads<'a> {
    /// Query heads; a multiple of `key_value_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Which of the keys up to its own a query sees.
    pub mask: AttentionMask<'a>,
}

impl AttentionHeads<'_> {
    /// Elements of a row of queries.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of a row of keys or of values.
    pub fn key_value_width(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.heads / self.key_value_heads
    }

    /// Panics on shapes that mean nothing, and on masks that do not fit sequences of `positions`.
    fn check(&self, positions: usize) {
        assert!(
            self.head_dim > 0 && self.key_value_heads > 0 && self.heads.is_multiple_of(self.key_value_heads),
            "{self:?} is not a shape of heads"
        );
        self.mask.check(self.heads, positions);
    }
}

/// Panics unless `cumulative_lengths` are ascending bounds of `tokens` tokens, from 0.
fn check_lengths(cumulative_lengths: &[usize], tokens: usize) {
    let bounds = cumulative_lengths;
    assert!(
        bounds.first() == Some(&0) && bounds.last() == Some(&tokens) && bounds.is_sorted(),
        "cumulative lengths {bounds:?} do not cover {tokens} tokens"
    );
}

/// Tokens of the longest sequence.
fn longest(cumulative_lengths: &[usize]) -> usize {
    let lengths = cumulative_lengths.windows(2).map(|bounds| bounds[1] - bounds[0]);
    lengths.max().unwrap_or(0)
}

#[cfg(test)]
mod sparse_tests;
#[cfg(test)]
mod tests;
