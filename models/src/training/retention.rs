//! Which checkpoints of a model are kept.

use std::num::NonZeroU64;

/// Rules for keeping checkpoints. Without any, all are kept; otherwise those that at least one rule keeps, and always the
/// last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// So many of the largest steps are kept.
    pub keep_last: Option<NonZeroU64>,
    /// Those whose step is a multiple are kept.
    pub keep_every: Option<NonZeroU64>,
    /// Whether those with a tag are kept. Default: they are.
    pub keep_tagged: Option<bool>,
}

impl Retention {
    /// Steps of the checkpoints that are not kept. `checkpoints` are all of a model, in the order of their steps, with
    /// whether they have a tag.
    #[must_use]
    pub fn pruned(&self, checkpoints: &[(u64, bool)]) -> Vec<u64> {
        if *self == Self::default() {
            return Vec::new();
        }
        let last = self.keep_last.map_or(1, NonZeroU64::get);
        let first_kept = checkpoints
            .len()
            .saturating_sub(usize::try_from(last).unwrap_or(usize::MAX));
        let kept = |step: u64, tagged: bool| {
            self.keep_every.is_some_and(|every| step.is_multiple_of(every.get()))
                || tagged && self.keep_tagged.unwrap_or(true)
        };
        let older = checkpoints[..first_kept].iter();
        older
            .filter(|(step, tagged)| !kept(*step, *tagged))
            .map(|(step, _)| *step)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECKPOINTS: [(u64, bool); 6] = [
        (5, false),
        (10, true),
        (15, false),
        (20, false),
        (23, true),
        (25, false),
    ];

    fn pruned(keep_last: u64, keep_every: u64, keep_tagged: Option<bool>) -> Vec<u64> {
        let retention = Retention {
            keep_last: NonZeroU64::new(keep_last),
            keep_every: NonZeroU64::new(keep_every),
            keep_tagged,
        };
        retention.pruned(&CHECKPOINTS)
    }

    #[test]
    fn one_rule_is_enough_to_be_kept() {
        assert_eq!(pruned(0, 0, None), [0; 0]);
        assert_eq!(pruned(2, 0, None), [5, 15, 20]);
        assert_eq!(pruned(2, 0, Some(false)), [5, 10, 15, 20]);
        assert_eq!(pruned(1, 10, None), [5, 15]);
        assert_eq!(pruned(0, 10, Some(false)), [5, 15, 23]);
        assert_eq!(pruned(0, 0, Some(true)), [5, 15, 20]);
        assert_eq!(pruned(9, 0, None), [0; 0]);
    }

    #[test]
    fn the_last_is_kept_whatever_the_rules() {
        assert_eq!(pruned(0, 0, Some(false)), [5, 10, 15, 20, 23]);
        assert_eq!(pruned(0, 7, None), [5, 15, 20]);
    }
}
