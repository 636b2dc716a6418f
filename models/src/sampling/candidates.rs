//! The tokens that pass top-k, top-p and min-p, found without sorting the vocabulary.

use super::exponential::sum_of_exponentials;
use super::options::SamplingOptions;

/// A token and its logit after penalty and temperature, less the largest one: at most 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    pub(super) token: u32,
    pub(super) logit: f32,
}

impl Candidate {
    /// The probability, times a constant.
    pub(super) fn weight(self) -> f64 {
        f64::from(self.logit).exp()
    }
}

/// Most likely first; among equals the lowest id, so that the order never depends on the algorithm.
fn by_likelihood(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

/// Elements over which `top_k_bound` takes maxima.
const BLOCK: usize = 64;

/// Fills `candidates` with what passes the filters of `options`, most likely first. `scaled` `[vocabulary]` is at most 0,
/// and 0 somewhere.
///
/// Top-p is a share of what top-k leaves. All three filters keep the head of one order, so what min-p removes can go
/// before the sorting, as long as the mass that top-p refers to is summed before.
pub(super) fn select(scaled: &[f32], options: &SamplingOptions, candidates: &mut Vec<Candidate>) {
    let top_k = usize::try_from(options.top_k).unwrap_or(usize::MAX);
    let limits_count = top_k > 0 && top_k < scaled.len();
    let min_p_floor = if options.min_p > 0.0 {
        f64::from(options.min_p).ln() as f32
    } else {
        f32::NEG_INFINITY
    };
    let top_p = f64::from(options.top_p);
    let mut mass = 0.0;
    let mut floor = min_p_floor;
    if limits_count {
        floor = top_k_bound(scaled, top_k);
    } else if top_p < 1.0 {
        mass = sum_of_exponentials(scaled, 0.0);
        // Tokens below this share of the rest cannot, all together, be more than the rest; so top-p never reaches them.
        // The last term keeps rounding on the safe side.
        floor = floor.max(((1.0 - top_p) * mass / scaled.len() as f64).ln() as f32 - 0.01);
    }
    candidates.clear();
    let tokens = scaled.iter().enumerate().filter(|&(_, &logit)| logit >= floor);
    candidates.extend(tokens.map(|(id, &logit)| Candidate {
        token: id as u32,
        logit,
    }));
    if limits_count {
        if top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, by_likelihood);
            candidates.truncate(top_k);
        }
        mass = candidates.iter().map(|candidate| candidate.weight()).sum();
        candidates.retain(|candidate| candidate.logit >= min_p_floor);
    }
    if top_p < 1.0 {
        keep_nucleus(candidates, top_p * mass);
    } else {
        candidates.sort_unstable_by(by_likelihood);
    }
}

/// A logit that at least `top_k` tokens reach: the `top_k`-th largest of the maxima of blocks.
fn top_k_bound(scaled: &[f32], top_k: usize) -> f32 {
    let mut maxima: Vec<f32> = scaled
        .chunks(BLOCK)
        .map(|block| block.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a }))
        .collect();
    if maxima.len() < top_k {
        return f32::NEG_INFINITY;
    }
    let (_, bound, _) = maxima.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
    *bound
}

/// Truncates to the smallest head of the order whose weights reach `mass`; sorts no more than that needs.
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
            reached += candidate.weight();
            if reached >= mass {
                candidates.truncate(sorted + index + 1);
                return;
            }
        }
        sorted += count;
        step *= 4;
    }
}
