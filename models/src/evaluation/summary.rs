//! What the rows of a run come to.

use super::{Question, Scores, Verdict};

/// The sums over texts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TextTotals {
    /// Over the texts' tokens.
    pub scores: Scores,
    /// UTF-8 bytes of the texts.
    pub bytes: u64,
}

impl TextTotals {
    /// Mean cross-entropy (natural logarithm) over the tokens; None where there are none.
    pub fn loss(&self) -> Option<f64> {
        self.mean(-self.scores.log_likelihood)
    }

    /// e to the power of the loss.
    pub fn perplexity(&self) -> Option<f64> {
        self.loss().map(f64::exp)
    }

    /// Cross-entropy in bits, by the texts' bytes; None where there are none of either.
    pub fn bits_per_byte(&self) -> Option<f64> {
        let known = self.bytes > 0 && self.scores.targets > 0;
        known.then(|| -self.scores.log_likelihood / std::f64::consts::LN_2 / self.bytes as f64)
    }

    /// Share of the tokens that are the likeliest at their place.
    pub fn next_token_accuracy(&self) -> Option<f64> {
        self.mean(self.scores.likeliest as f64)
    }

    fn mean(&self, sum: f64) -> Option<f64> {
        (self.scores.targets > 0).then(|| sum / self.scores.targets as f64)
    }
}

/// How many questions were answered, and how many of them rightly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Questions.
    pub questions: u64,
    /// Those whose likeliest choice is the answer.
    pub right: u64,
    /// Those whose likeliest choice by byte is the answer.
    pub right_norm: u64,
}

impl Answers {
    /// Counts a question.
    pub fn add(&mut self, question: &Question, verdict: &Verdict) {
        self.questions += 1;
        self.right += u64::from(verdict.choice == question.answer);
        self.right_norm += u64::from(verdict.choice_norm == question.answer);
    }

    /// Share of the questions whose likeliest choice is the answer; None where there are none.
    pub fn accuracy(&self) -> Option<f64> {
        (self.questions > 0).then(|| self.right as f64 / self.questions as f64)
    }

    /// The same by likelihood per byte.
    pub fn accuracy_norm(&self) -> Option<f64> {
        (self.questions > 0).then(|| self.right_norm as f64 / self.questions as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_means() {
        assert_eq!(TextTotals::default().loss(), None);
        assert_eq!(TextTotals::default().bits_per_byte(), None);
        let totals = TextTotals {
            scores: Scores {
                log_likelihood: -4.0 * std::f64::consts::LN_2,
                targets: 2,
                likeliest: 1,
            },
            bytes: 8,
        };
        assert!((totals.loss().unwrap() - 2.0 * std::f64::consts::LN_2).abs() < 1e-12);
        assert!((totals.perplexity().unwrap() - 4.0).abs() < 1e-12);
        assert_eq!(totals.bits_per_byte(), Some(0.5));
        assert_eq!(totals.next_token_accuracy(), Some(0.5));
    }
}
