//! Penalties and bias: what changes single logits before a token is chosen.

use std::collections::BTreeMap;

use super::options::SamplingOptions;

/// Changes the logits of single tokens, and remembers what they were.
pub(super) struct Adjusted<'a> {
    logits: &'a mut [f32],
    /// Tokens with their former logits, in the order of the changes.
    former: Vec<(u32, f32)>,
}

impl<'a> Adjusted<'a> {
    pub(super) fn new(logits: &'a mut [f32]) -> Self {
        Self {
            logits,
            former: Vec::new(),
        }
    }

    /// Replaces a token's logit. What is not finite stays: an impossible token remains impossible, and an extreme penalty
    /// must not make an infinity.
    fn change(&mut self, token: u32, change: impl FnOnce(f32) -> f32) {
        let Some(logit) = self.logits.get_mut(token as usize) else {
            return;
        };
        self.former.push((token, *logit));
        if logit.is_finite() {
            *logit = change(*logit).clamp(f32::MIN, f32::MAX);
        }
    }

    /// The repetition penalty, once per distinct token of `seen`.
    pub(super) fn repetition(&mut self, seen: &[u32], penalty: f32) {
        if penalty == 1.0 {
            return;
        }
        let mut distinct = seen.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        for token in distinct {
            self.change(
                token,
                |logit| if logit > 0.0 { logit / penalty } else { logit * penalty },
            );
        }
    }

    /// Frequency and presence penalty. `counts` is how often each token was generated, at least once.
    pub(super) fn counts(&mut self, counts: &BTreeMap<u32, u32>, options: &SamplingOptions) {
        let (frequency, presence) = (options.frequency_penalty, options.presence_penalty);
        if frequency == 0.0 && presence == 0.0 {
            return;
        }
        for (&token, &count) in counts {
            self.change(token, |logit| logit - frequency * count as f32 - presence);
        }
    }

    /// What the options add to single tokens.
    pub(super) fn bias(&mut self, bias: &[(u32, f32)]) {
        for &(token, bias) in bias {
            self.change(token, |logit| logit + bias);
        }
    }

    /// The logits as they are now, `[vocabulary]`.
    pub(super) fn logits(&self) -> &[f32] {
        self.logits
    }

    /// The same, to be changed without a record.
    pub(super) fn logits_mut(&mut self) -> &mut [f32] {
        self.logits
    }

    /// The logit that `token` had at first.
    pub(super) fn former(&self, token: u32) -> f32 {
        let first = self.former.iter().find(|&&(changed, _)| changed == token);
        first.map_or_else(|| self.logits[token as usize], |&(_, logit)| logit)
    }
}
