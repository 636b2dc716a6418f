//! The sampler itself: penalty, temperature, filters, draw.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::candidates::{Candidate, select};
use super::exponential::{exp_of_negative, largest, sum_of_exponentials};
use super::options::SamplingOptions;
use crate::error::{Error, Result};

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of the probability that the raw logits give it: before penalty, temperature and filters.
    pub logprob: f32,
}

/// Draws tokens. The random stream is its own, so the same seed gives the same draws whatever runs beside it.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    /// Both kept between calls, to spare allocations of the vocabulary's size per token.
    scaled: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the start of the random stream of `options.seed`.
    ///
    /// # Errors
    /// `InvalidArgument` for an option out of range.
    pub fn new(options: &SamplingOptions) -> Result<Self> {
        options.validate()?;
        let random = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Self {
            options: options.clone(),
            random,
            scaled: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// Chooses a token from `logits` `[vocabulary]`, which the repetition penalty changes in place.
    ///
    /// `seen` are the tokens of prompt and completion so far, in any order, repetitions allowed. One number is drawn
    /// per call unless greedy. The order is penalty, temperature, top-k, top-p, min-p, as in transformers.
    ///
    /// # Errors
    /// `FailedPrecondition` if a logit is NaN or infinitely large, or none is finite: the model's weights are broken.
    pub fn sample(&mut self, logits: &mut [f32], seen: &[u32]) -> Result<Sampled> {
        let normalizer = log_sum_exp(logits)?;
        let saved = match self.options.repetition_penalty {
            1.0 => Vec::new(),
            penalty => penalize(logits, seen, penalty),
        };
        let token = self.choose(logits);
        let raw = match saved.binary_search_by_key(&token, |&(id, _)| id) {
            Ok(index) => saved[index].1,
            Err(_) => logits[token as usize],
        };
        Ok(Sampled {
            token,
            logprob: (f64::from(raw) - normalizer) as f32,
        })
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        let (best, _) = largest(logits);
        let options = &self.options;
        if options.temperature == 0.0 || options.top_k == 1 {
            return logits.iter().position(|&logit| logit == best).unwrap_or(0) as u32;
        }
        // The largest logit is subtracted first, so that a tiny temperature cannot overflow. Adding 0 makes -0 equal 0.
        let inverse = 1.0 / f64::from(options.temperature);
        self.scaled.clear();
        self.scaled.extend(
            logits
                .iter()
                .map(|&logit| (f64::from(logit - best) * inverse) as f32 + 0.0),
        );
        let draw: f64 = self.random.random();
        if options.top_k == 0 && options.top_p >= 1.0 && options.min_p <= 0.0 {
            return draw_from_all(&self.scaled, draw);
        }
        select(&self.scaled, options, &mut self.candidates);
        draw_in_order(&self.candidates, draw)
    }
}

/// Draws in the order of ids; `draw` in [0, 1).
fn draw_from_all(scaled: &[f32], draw: f64) -> u32 {
    let target = draw * sum_of_exponentials(scaled, 0.0);
    let mut reached = 0.0;
    let mut last = 0;
    for (id, &logit) in scaled.iter().enumerate() {
        let weight = f64::from(exp_of_negative(logit));
        if weight > 0.0 {
            reached += weight;
            last = id as u32;
            if reached > target {
                break;
            }
        }
    }
    last
}

/// Draws from sorted candidates, of which there is at least one.
fn draw_in_order(candidates: &[Candidate], draw: f64) -> u32 {
    let target = draw * candidates.iter().map(|candidate| candidate.weight()).sum::<f64>();
    let mut reached = 0.0;
    let mut last = 0;
    for candidate in candidates {
        reached += candidate.weight();
        last = candidate.token;
        if reached > target {
            break;
        }
    }
    last
}

/// Applies the repetition penalty once per seen token; returns the changed tokens, sorted, with their former logits.
fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) -> Vec<(u32, f32)> {
    let mut distinct: Vec<u32> = seen
        .iter()
        .copied()
        .filter(|&token| (token as usize) < logits.len())
        .collect();
    distinct.sort_unstable();
    distinct.dedup();
    let change = |token: u32| {
        let logit = &mut logits[token as usize];
        let former = *logit;
        let changed = if former > 0.0 {
            former / penalty
        } else {
            former * penalty
        };
        // An extreme penalty must not make an infinity; a token that was impossible stays so.
        *logit = if former.is_finite() {
            changed.clamp(f32::MIN, f32::MAX)
        } else {
            former
        };
        (token, former)
    };
    distinct.into_iter().map(change).collect()
}

/// log(sum(exp(logits))).
fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let (largest, invalid) = largest(logits);
    if invalid || !largest.is_finite() {
        return Err(Error::FailedPrecondition(
            "the model's logits are not finite: its weights are damaged or training has diverged; restore a checkpoint"
                .to_owned(),
        ));
    }
    Ok(f64::from(largest) + sum_of_exponentials(logits, largest).ln())
}
