//! Sequences of a statement put together without padding.

use super::TrainingSequence;

/// Tokens that one pass takes at most, unless a single sequence has more: bounds the memory of the activations.
const TOKENS_PER_PASS: usize = 2048;

/// Sequences laid end to end: rows `[tokens, width]` of which sequence `i` has those from `bounds[i]` to
/// `bounds[i + 1]`.
pub(super) struct Packed {
    /// Token ids, `[tokens]`.
    pub(super) tokens: Vec<u32>,
    /// Position of each token in its sequence, `[tokens]`.
    pub(super) positions: Vec<u32>,
    /// Where each sequence begins, and where the last ends, `[sequences + 1]`.
    pub(super) bounds: Vec<usize>,
    /// Rows that have a target, ascending, `[targets]`.
    pub(super) rows: Vec<u32>,
    /// Their targets, `[targets]`.
    pub(super) targets: Vec<u32>,
    /// Their loss weights, `[targets]`.
    pub(super) factors: Vec<f32>,
    /// Which of the statement's sequences these are, `[sequences]`.
    pub(super) members: Vec<usize>,
}

impl Packed {
    /// Puts the sequences that have targets into passes of bounded size, in their order. The others need none.
    pub(super) fn split(sequences: &[TrainingSequence]) -> Vec<Self> {
        let mut passes: Vec<Self> = vec![];
        for (member, sequence) in sequences
            .iter()
            .enumerate()
            .filter(|(_, sequence)| sequence.target_count() > 0)
        {
            match passes.last_mut() {
                Some(pass) if pass.tokens.len() + sequence.tokens().len() <= TOKENS_PER_PASS => {
                    pass.push(member, sequence);
                }
                _ => {
                    let mut pass = Self::empty();
                    pass.push(member, sequence);
                    passes.push(pass);
                }
            }
        }
        passes
    }

    fn empty() -> Self {
        let (tokens, positions, bounds) = (vec![], vec![], vec![0]);
        Self {
            tokens,
            positions,
            bounds,
            rows: vec![],
            targets: vec![],
            factors: vec![],
            members: vec![],
        }
    }

    fn push(&mut self, member: usize, sequence: &TrainingSequence) {
        // Passes have far fewer rows than u32 can count: context lengths are bounded by the configuration.
        let start = self.tokens.len() as u32;
        for (row, target) in (start..).zip(sequence.targets()) {
            if let Some(target) = *target {
                self.rows.push(row);
                self.targets.push(target);
                self.factors.push(sequence.loss_weight());
            }
        }
        self.tokens.extend_from_slice(sequence.tokens());
        self.positions.extend(0..sequence.tokens().len() as u32);
        self.bounds.push(self.tokens.len());
        self.members.push(member);
    }

    /// The sequence (by its place in this pass) of each row that has a target.
    pub(super) fn sequence_of_rows(&self) -> impl Iterator<Item = usize> + '_ {
        let mut sequence = 0;
        self.rows.iter().map(move |&row| {
            while self.bounds[sequence + 1] <= row as usize {
                sequence += 1;
            }
            sequence
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_know_their_sequence_and_passes_are_bounded() {
        let config = crate::config::from_settings(
            serde_json::json!({"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 1024,
                "vocabulary": 9})
            .as_object()
            .unwrap(),
            None,
        )
        .unwrap();
        let sequence = |length: usize| TrainingSequence::new(&vec![1; length], None, None, &config).unwrap();
        let passes = Packed::split(&[sequence(1000), sequence(1), sequence(1000), sequence(49), sequence(3)]);
        assert_eq!(
            passes.iter().map(|pass| pass.members.clone()).collect::<Vec<_>>(),
            [vec![0, 2], vec![3, 4]]
        );
        assert_eq!(passes[1].bounds, [0, 49, 52]);
        assert_eq!(passes[1].positions[48..], [48, 0, 1, 2]);
        assert_eq!(passes[1].rows[46..], [46, 47, 49, 50]);
        assert_eq!(passes[1].sequence_of_rows().collect::<Vec<_>>()[46..], [0, 0, 1, 1]);
    }
}
