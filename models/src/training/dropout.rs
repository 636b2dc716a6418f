//! Where dropout happens in training, and what its masks depend on.

use candle_kernels_cpu::Dropout;

use crate::config::{DecoderConfig, Fields};
use crate::decoder::LowRank;
use crate::error::{Error, Result};

/// Probabilities of dropout, with transformers' names; from 0 to below 1. Nothing is dropped by default: what a
/// `config.json` says is not looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DropoutSettings {
    /// `embd_pdrop`: of the embeddings' sum.
    pub embedding: f64,
    /// `resid_pdrop`: of what attention and feed-forward network add to the residual stream.
    pub residual: f64,
    /// `attn_pdrop`: of attention's probabilities.
    pub attention: f64,
}

impl DropoutSettings {
    /// Reads `embd_pdrop`, `resid_pdrop` and `attn_pdrop`, and `dropout`, which is the default of all three.
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let probability = |name: &str, default: f64| {
            let probability = fields.number(name)?.unwrap_or(default);
            if !(0.0..1.0).contains(&probability) {
                let reason = format!("{probability}; it must be at least 0 and below 1");
                return Err(Error::invalid_config(name, reason));
            }
            Ok(probability)
        };
        let all = probability("dropout", 0.0)?;
        Ok(Self {
            embedding: probability("embd_pdrop", all)?,
            residual: probability("resid_pdrop", all)?,
            attention: probability("attn_pdrop", all)?,
        })
    }

    /// Whether anything is dropped.
    #[must_use]
    pub fn is_on(&self) -> bool {
        *self != Self::default()
    }
}

/// What the masks of a pass depend on: the same numbers give the same masks, whatever else is in the pass, however often
/// its activations are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropoutKey {
    /// The model's seed.
    pub seed: u64,
    /// Optimizer steps taken before.
    pub step: u64,
    /// Number of the pass' first sequence among those accumulated since the last step, from 0; the others follow.
    pub first_sequence: u64,
}

/// A place of the network where something is dropped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum DropoutSite {
    /// The embeddings' sum.
    Embedding,
    /// The attention probabilities of a layer.
    Attention(usize),
    /// What a layer's attention adds to the stream.
    AttentionOutput(usize),
    /// What a layer's feed-forward network adds to the stream.
    FeedForward(usize),
    /// The input of an adapter's low-rank matrix.
    LowRank(LowRank),
}

impl DropoutSite {
    /// Its number; attention takes one a head.
    fn number(self, config: &DecoderConfig) -> u32 {
        let of_layer = |layer: usize, place: usize| 1 + layer * (config.heads + 2) + place;
        let number = match self {
            Self::Embedding => 0,
            Self::AttentionOutput(layer) => of_layer(layer, 0),
            Self::FeedForward(layer) => of_layer(layer, 1),
            Self::Attention(layer) => of_layer(layer, 2),
            // One a matrix: query, key and value of a fused one read the same input.
            Self::LowRank(matrix) => of_layer(config.layers, matrix.a.0),
        };
        // Layers times heads and parameters come nowhere near the limit.
        number as u32
    }
}

/// Dropout of one pass.
pub(super) struct PassDropout {
    settings: DropoutSettings,
    key: u64,
    /// Numbers of the packed sequences.
    sequences: Vec<u32>,
}

impl PassDropout {
    /// Of a pass over the sequences `members` of those that `key` counts.
    pub(super) fn new(settings: DropoutSettings, key: DropoutKey, members: &[usize]) -> Self {
        // Sequences that wrap around would only share masks.
        let number = |&member: &usize| (key.first_sequence + member as u64) as u32;
        Self {
            settings,
            key: mixed(key.seed.wrapping_add(mixed(key.step))),
            sequences: members.iter().map(number).collect(),
        }
    }

    /// What is dropped at a place; none if nothing is.
    pub(super) fn at(&self, site: DropoutSite, config: &DecoderConfig) -> Option<Dropout<'_>> {
        let probability = match site {
            DropoutSite::Embedding => self.settings.embedding,
            DropoutSite::Attention(_) => self.settings.attention,
            DropoutSite::AttentionOutput(_) | DropoutSite::FeedForward(_) => self.settings.residual,
            DropoutSite::LowRank(matrix) => f64::from(matrix.dropout),
        };
        (probability > 0.0).then(|| Dropout {
            probability,
            key: self.key,
            site: site.number(config),
            sequences: &self.sequences,
        })
    }
}

/// Steele et al.'s SplitMix64: neighbouring numbers become unrelated keys.
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::decoder::ParameterId;
    use serde_json::{Value, json};

    fn read(settings: Value) -> Result<DropoutSettings> {
        DropoutSettings::read(&Fields(settings.as_object().unwrap()))
    }

    #[test]
    fn one_setting_is_the_default_of_the_others() {
        assert!(!read(json!({})).unwrap().is_on());
        let settings = read(json!({"dropout": 0.1, "attn_pdrop": 0})).unwrap();
        assert_eq!(
            (settings.embedding, settings.residual, settings.attention),
            (0.1, 0.1, 0.0)
        );
    }

    #[test]
    fn bad_probabilities_are_refused() {
        for (settings, name) in [
            (json!({"dropout": 1.0}), "`dropout`"),
            (json!({"dropout": -0.1}), "`dropout`"),
            (json!({"resid_pdrop": 2}), "`resid_pdrop`"),
            (json!({"attn_pdrop": "much"}), "`attn_pdrop`"),
            (json!({"embd_pdrop": 1}), "`embd_pdrop`"),
        ] {
            let message = read(settings.clone()).unwrap_err().to_string();
            assert!(message.contains(name), "{settings}: {message}");
        }
    }

    #[test]
    fn sites_have_numbers_of_their_own() {
        let settings = json!({"architecture": "gpt2", "layers": 3, "width": 8, "heads": 2, "context_length": 4,
            "vocabulary": 16});
        let config = crate::config::from_settings(settings.as_object().unwrap(), None).unwrap();
        let mut numbers = vec![DropoutSite::Embedding.number(&config)];
        for layer in 0..3 {
            numbers.push(DropoutSite::AttentionOutput(layer).number(&config));
            numbers.push(DropoutSite::FeedForward(layer).number(&config));
            let first = DropoutSite::Attention(layer).number(&config);
            numbers.extend([first, first + 1]);
        }
        let low_rank = |a: usize| LowRank {
            a: ParameterId(a),
            b: ParameterId(a + 1),
            scale: 1.0,
            dropout: 0.5,
        };
        numbers.extend([0, 1].map(|a| DropoutSite::LowRank(low_rank(a)).number(&config)));
        assert_eq!(numbers, (0..15).collect::<Vec<_>>());
    }

    #[test]
    fn keys_differ_by_seed_and_step() {
        let settings = read(json!({"dropout": 0.5})).unwrap();
        let key = |seed, step| {
            PassDropout::new(
                settings,
                DropoutKey {
                    seed,
                    step,
                    first_sequence: 3,
                },
                &[0, 4],
            )
        };
        assert_ne!(key(1, 0).key, key(0, 1).key);
        assert_ne!(key(0, 0).key, key(0, 1).key);
        assert_eq!(key(0, 0).sequences, [3, 7]);
    }
}
