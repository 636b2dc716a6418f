//! The sampler itself: penalties, bias, temperature, filters, draw.

use std::collections::BTreeMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::adjustments::Adjusted;
use super::candidates::{Candidate, select};
use super::exponential::{exp_of_negative, largest, sum_of_exponentials};
use super::options::SamplingOptions;
use super::top::largest_logits;
use crate::error::{Error, Result};

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of the probability that the raw logits give it: before penalties, bias, temperature and filters.
    pub logprob: f32,
    /// The most likely tokens by the raw logits with the logarithms of their probabilities, most likely first; as many as
    /// the options ask for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Draws tokens. The random stream is its own, so the same seed gives the same draws whatever runs beside it.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    /// How often each token was chosen, where a penalty asks for it.
    counts: BTreeMap<u32, u32>,
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
            counts: BTreeMap::new(),
            scaled: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// Chooses a token from `logits` `[vocabulary]`, which penalties and bias change in place.
    ///
    /// `seen` are the tokens of prompt and completion so far, in any order, repetitions allowed. One number is drawn
    /// per call unless greedy. The order is repetition penalty, frequency and presence penalty, bias, temperature, top-k,
    /// top-p, min-p.
    ///
    /// # Errors
    /// `FailedPrecondition` if a logit is NaN or infinitely large, or none is finite: the model's weights are broken.
    pub fn sample(&mut self, logits: &mut [f32], seen: &[u32]) -> Result<Sampled> {
        self.sample_restricted(logits, seen, |_| {})
    }

    /// As [`sample`](Self::sample), but `restrict` may make tokens impossible, by negative infinity as their logit, after
    /// penalties and bias and before everything else.
    ///
    /// # Errors
    /// As [`sample`](Self::sample); also when no token is left.
    pub fn sample_restricted(
        &mut self,
        logits: &mut [f32],
        seen: &[u32],
        restrict: impl FnOnce(&mut [f32]),
    ) -> Result<Sampled> {
        let normalizer = log_sum_exp(logits)?;
        let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
        let mut top_logprobs = largest_logits(logits, usize::try_from(self.options.top_logprobs).unwrap_or(0));
        top_logprobs.iter_mut().for_each(|(_, value)| *value = logprob(*value));
        let mut adjusted = Adjusted::new(logits);
        adjusted.repetition(seen, self.options.repetition_penalty);
        adjusted.counts(&self.counts, &self.options);
        adjusted.bias(&self.options.logit_bias);
        restrict(adjusted.logits_mut());
        let token = self.choose(adjusted.logits())?;
        if self.options.frequency_penalty != 0.0 || self.options.presence_penalty != 0.0 {
            *self.counts.entry(token).or_insert(0) += 1;
        }
        Ok(Sampled {
            token,
            logprob: logprob(adjusted.former(token)),
            top_logprobs,
        })
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let (best, _) = largest(logits);
        if !best.is_finite() {
            return Err(Error::FailedPrecondition(
                "of the tokens that may come next the model holds every one for impossible".to_owned(),
            ));
        }
        let options = &self.options;
        if options.temperature == 0.0 || options.top_k == 1 {
            return Ok(logits.iter().position(|&logit| logit == best).unwrap_or(0) as u32);
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
            return Ok(draw_from_all(&self.scaled, draw));
        }
        select(&self.scaled, options, &mut self.candidates);
        Ok(draw_in_order(&self.candidates, draw))
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
        let weight = candidate.weight();
        if weight > 0.0 {
            reached += weight;
            last = candidate.token;
            if reached > target {
                break;
            }
        }
    }
    last
}

/// log(sum(exp(logits))).
fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let (largest, invalid) = largest(logits);
    if invalid || !largest.is_finite() {
        return Err(Error::logits_not_finite());
    }
    Ok(f64::from(largest) + sum_of_exponentials(logits, largest).ln())
}
