//! Chooses the next token from the logits: greedy, or a seeded draw after temperature, top-k, top-p and min-p.

use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// How the next token is chosen. The defaults are greedy decoding without a repetition penalty.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 is greedy. At least 0.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: i64,
    /// Keep the smallest set of tokens whose probabilities reach this sum. In (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one. In [0, 1].
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before (CTRL, arXiv:1909.05858). Above 0.
    pub repetition_penalty: f32,
    /// Seed of the random draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks every field.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field and its value.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &str, value: &dyn std::fmt::Display, allowed: &str| {
            Err(Error::InvalidArgument(format!(
                "{field} is {value}, but must be {allowed}"
            )))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return refuse("temperature", &self.temperature, "a number of at least 0; 0 is greedy");
        }
        if self.top_k < 0 {
            return refuse("top_k", &self.top_k, "at least 0; 0 keeps all tokens");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", &self.top_p, "above 0 and at most 1");
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return refuse("min_p", &self.min_p, "between 0 and 1");
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return refuse("repetition_penalty", &self.repetition_penalty, "a number above 0");
        }
        Ok(())
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of the probability that the raw logits give it: before penalty, temperature and filters.
    pub logprob: f32,
}

/// A candidate of the draw: its id and its logit after penalty and temperature.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
}

/// Most likely first; among equals the lowest id, so that the order never depends on the algorithm.
fn by_likelihood(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Draws tokens. The random stream is its own, so the same seed gives the same draws whatever runs beside it.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    /// Kept between calls to spare an allocation of the vocabulary's size per token.
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
            candidates: Vec::new(),
        })
    }

    /// Chooses a token from `logits` [vocabulary], which the repetition penalty changes in place.
    ///
    /// `seen` are the tokens of prompt and completion so far, in any order, repetitions allowed. One number is drawn
    /// per call unless greedy. The order is penalty, temperature, top-k, top-p, min-p, as in transformers.
    ///
    /// # Errors
    /// `FailedPrecondition` if a logit is NaN or infinitely large, or none is finite: the model's weights are broken.
    pub fn sample(&mut self, logits: &mut [f32], seen: &[u32]) -> Result<Sampled> {
        let normalizer = log_sum_exp(logits)?;
        let raw = |logit: f32| (f64::from(logit) - normalizer) as f32;
        if self.options.repetition_penalty == 1.0 {
            let token = self.choose(logits)?;
            return Ok(Sampled {
                token,
                logprob: raw(logits[token as usize]),
            });
        }
        let saved = penalize(logits, seen, self.options.repetition_penalty);
        let token = self.choose(logits)?;
        let original = match saved.binary_search_by_key(&token, |&(id, _)| id) {
            Ok(index) => saved[index].1,
            Err(_) => logits[token as usize],
        };
        Ok(Sampled {
            token,
            logprob: raw(original),
        })
    }

    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        let (best, best_logit) = largest(logits);
        if self.options.temperature == 0.0 || self.options.top_k == 1 {
            return Ok(best);
        }
        // The largest logit is subtracted first, so that a tiny temperature cannot overflow.
        let inverse = 1.0 / f64::from(self.options.temperature);
        let scaled = |logit: f32| (f64::from(logit - best_logit) * inverse) as f32;
        let draw: f64 = self.random.random();
        if self.options.top_k == 0 && self.options.top_p >= 1.0 && self.options.min_p <= 0.0 {
            return Ok(draw_from_all(logits, scaled, draw).unwrap_or(best));
        }
        self.candidates.clear();
        let all = logits.iter().enumerate().map(|(id, &logit)| Candidate {
            token: id as u32,
            logit: scaled(logit),
        });
        self.candidates.extend(all);
        self.keep_likely();
        Ok(draw_in_order(&self.candidates, draw).unwrap_or(best))
    }

    /// Leaves in `candidates` those that pass top-k, top-p and min-p, most likely first.
    fn keep_likely(&mut self) {
        let candidates = &mut self.candidates;
        let top_k = usize::try_from(self.options.top_k).unwrap_or(usize::MAX);
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_likelihood);
            candidates.truncate(top_k);
        }
        // Top-p is a share of what top-k left, so the mass is summed before min-p removes anything. Each of the
        // three filters keeps the head of the same order, hence applying min-p before sorting changes nothing.
        let mass: f64 = candidates.iter().map(|c| f64::from(c.logit).exp()).sum();
        if self.options.min_p > 0.0 {
            let floor = f64::from(self.options.min_p).ln();
            candidates.retain(|c| f64::from(c.logit) >= floor);
        }
        if self.options.top_p < 1.0 {
            keep_nucleus(candidates, f64::from(self.options.top_p) * mass);
        } else {
            candidates.sort_unstable_by(by_likelihood);
        }
    }
}

/// Truncates to the smallest head of the sorted order whose exponentials reach `mass`; sorts no more than that needs.
fn keep_nucleus(candidates: &mut Vec<Candidate>, mass: f64) {
    let mut sorted = 0;
    let mut reached = 0.0;
    let mut step = 64;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let count = step.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, by_likelihood);
        }
        rest[..count].sort_unstable_by(by_likelihood);
        for (index, candidate) in rest[..count].iter().enumerate() {
            reached += f64::from(candidate.logit).exp();
            if reached >= mass {
                candidates.truncate(sorted + index + 1);
                return;
            }
        }
        sorted += count;
        step *= 4;
    }
}

/// The largest logit and the lowest id that has it.
fn largest(logits: &[f32]) -> (u32, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id as u32, logit);
        }
    }
    best
}

/// Draws in the order of ids, without sorting; `draw` in [0, 1). `None` only by rounding at the very end.
fn draw_from_all(logits: &[f32], scaled: impl Fn(f32) -> f32, draw: f64) -> Option<u32> {
    let mass: f64 = logits.iter().map(|&logit| f64::from(scaled(logit)).exp()).sum();
    let target = draw * mass;
    let mut reached = 0.0;
    for (id, &logit) in logits.iter().enumerate() {
        reached += f64::from(scaled(logit)).exp();
        if reached > target {
            return Some(id as u32);
        }
    }
    None
}

/// Draws from sorted candidates, in proportion to their exponentials.
fn draw_in_order(candidates: &[Candidate], draw: f64) -> Option<u32> {
    let mass: f64 = candidates.iter().map(|c| f64::from(c.logit).exp()).sum();
    let target = draw * mass;
    let mut reached = 0.0;
    for candidate in candidates {
        reached += f64::from(candidate.logit).exp();
        if reached > target {
            return Some(candidate.token);
        }
    }
    None
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
    distinct
        .into_iter()
        .map(|token| {
            let logit = &mut logits[token as usize];
            let former = *logit;
            *logit = if former > 0.0 {
                former / penalty
            } else {
                former * penalty
            };
            // A tiny penalty must not make an infinity that the draw would then trip over.
            *logit = logit
                .clamp(f32::MIN, f32::MAX)
                .max(if former == f32::NEG_INFINITY { former } else { f32::MIN });
            (token, former)
        })
        .collect()
}

/// log(sum(exp(logits))), in f64 so that it is exact to f32 for any vocabulary.
fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let mut largest = f32::NEG_INFINITY;
    let mut invalid = false;
    for &logit in logits {
        largest = largest.max(logit);
        invalid |= logit.is_nan();
    }
    if invalid || !largest.is_finite() {
        return Err(Error::FailedPrecondition(
            "the model's logits are not finite: its weights are damaged or training has diverged; restore a checkpoint"
                .to_owned(),
        ));
    }
    let mut sums = [0.0f64; 8];
    for block in logits.chunks(8) {
        for (sum, &logit) in sums.iter_mut().zip(block) {
            *sum += f64::from((logit - largest).exp());
        }
    }
    Ok(f64::from(largest) + sums.iter().sum::<f64>().ln())
}
