//! Sequences of a statement put together without padding; prefixes that they have in common are there once, if asked for.

use std::collections::HashMap;

use super::TrainingSequence;

/// Tokens that one pass takes at most, unless a single sequence has more: bounds the memory of the activations.
const TOKENS_PER_PASS: usize = 2048;
/// Likewise with every shared token counted as often as it is attended to.
const ATTENDED_TOKENS_PER_PASS: usize = 4 * TOKENS_PER_PASS;

/// Sequences laid end to end as rows `[tokens, width]`.
pub(super) struct Packed {
    /// Token ids, `[tokens]`.
    pub(super) tokens: Vec<u32>,
    /// Position of each token in its sequence, `[tokens]`.
    pub(super) positions: Vec<u32>,
    /// Which tokens attend; none where these are just the rows in their order, because no sequence shares rows with
    /// another.
    pub(super) attended: Option<Attended>,
    /// Where each sequence begins among the tokens that attend, and where the last ends, `[sequences + 1]`.
    pub(super) bounds: Vec<usize>,
    /// Rows that have a target, `[targets]`. A shared row is there once for each of its different targets.
    pub(super) rows: Vec<u32>,
    /// Their targets, `[targets]`.
    pub(super) targets: Vec<u32>,
    /// Their loss weights, `[targets]`; of a target that sequences share, the sum.
    pub(super) factors: Vec<f32>,
    /// The place in `rows` and the member of each target of each sequence.
    pub(super) credits: Vec<(u32, u32)>,
    /// Which of the statement's sequences these are, `[sequences]`.
    pub(super) members: Vec<usize>,
}

/// The tokens that attend, sequence after sequence: shared rows once in each of their sequences.
pub(super) struct Attended {
    /// The row of each, `[attended]`.
    pub(super) rows: Vec<u32>,
    /// The first of them for each row, `[tokens]`.
    pub(super) first: Vec<u32>,
}

/// The rows of a pass by what comes before them: a trie whose nodes are rows.
#[derive(Default)]
struct Prefixes {
    /// The row after a row (none at the beginning of a sequence) with a token.
    next: HashMap<(Option<u32>, u32), u32>,
}

impl Prefixes {
    /// The rows of the longest known prefix of `tokens`.
    fn shared(&self, tokens: &[u32]) -> Vec<u32> {
        let mut rows = vec![];
        while let Some(row) = tokens
            .get(rows.len())
            .and_then(|token| self.next.get(&(rows.last().copied(), *token)))
        {
            rows.push(*row);
        }
        rows
    }

    /// Makes the rows of a sequence known.
    fn insert(&mut self, tokens: &[u32], rows: &[u32]) {
        let mut before = None;
        for (token, row) in tokens.iter().zip(rows) {
            self.next.insert((before, *token), *row);
            before = Some(*row);
        }
    }
}

/// A pass that is being put together.
struct Packing {
    pass: Packed,
    attended: Vec<u32>,
    prefixes: Option<Prefixes>,
    /// Place in `rows` of a row and a target; kept where rows are shared.
    places: HashMap<(u32, u32), u32>,
}

impl Packed {
    /// Puts the sequences that have targets into passes of bounded size, in their order. The others need none. With
    /// `reuse`, sequences of a pass share the rows of common prefixes.
    pub(super) fn split(sequences: &[TrainingSequence], reuse: bool) -> Vec<Self> {
        let mut passes: Vec<Packing> = vec![];
        for (member, sequence) in sequences
            .iter()
            .enumerate()
            .filter(|(_, sequence)| sequence.target_count() > 0)
        {
            let fits = |pass: &Packing| pass.fits(sequence, TOKENS_PER_PASS, ATTENDED_TOKENS_PER_PASS);
            if !passes.last().is_some_and(fits) {
                passes.push(Packing::new(reuse));
            }
            if let Some(pass) = passes.last_mut() {
                pass.push(member, sequence);
            }
        }
        passes.into_iter().map(Packing::finish).collect()
    }

    /// Whether the rows that have a target are all rows, once each and in their order.
    pub(super) fn every_row_has_a_target(&self) -> bool {
        self.rows.len() == self.tokens.len() && (0..).zip(&self.rows).all(|(index, row)| index == *row)
    }
}

impl Attended {
    /// Of the row of each token that attends, `[attended]`, in a pass of `tokens` rows.
    fn new(rows: Vec<u32>, tokens: usize) -> Self {
        let mut first = vec![u32::MAX; tokens];
        for (place, row) in (0..).zip(&rows) {
            let first = &mut first[*row as usize];
            *first = place.min(*first);
        }
        Self { rows, first }
    }
}

impl Packing {
    fn new(reuse: bool) -> Self {
        Self {
            pass: Packed {
                tokens: vec![],
                positions: vec![],
                attended: None,
                bounds: vec![0],
                rows: vec![],
                targets: vec![],
                factors: vec![],
                credits: vec![],
                members: vec![],
            },
            attended: vec![],
            prefixes: reuse.then(Prefixes::default),
            places: HashMap::new(),
        }
    }

    /// The rows of a prefix of the sequence that are there already.
    fn shared(&self, sequence: &TrainingSequence) -> Vec<u32> {
        self.prefixes
            .as_ref()
            .map_or_else(Vec::new, |prefixes| prefixes.shared(sequence.tokens()))
    }

    fn fits(&self, sequence: &TrainingSequence, tokens: usize, attended: usize) -> bool {
        let length = sequence.tokens().len();
        let new = length - self.shared(sequence).len();
        self.pass.tokens.len() + new <= tokens && self.attended.len() + length <= attended
    }

    fn push(&mut self, member: usize, sequence: &TrainingSequence) {
        let mut rows = self.shared(sequence);
        let pass = &mut self.pass;
        // Passes have far fewer rows than u32 can count: context lengths are bounded by the configuration.
        let (known, start) = (rows.len(), pass.tokens.len() as u32);
        pass.tokens.extend_from_slice(&sequence.tokens()[known..]);
        pass.positions.extend(known as u32..sequence.tokens().len() as u32);
        rows.extend(start..pass.tokens.len() as u32);
        let number = pass.members.len() as u32;
        for (row, target) in rows.iter().zip(sequence.targets()) {
            let Some(target) = *target else { continue };
            let end = pass.rows.len() as u32;
            let place = match &self.prefixes {
                Some(_) => *self.places.entry((*row, target)).or_insert(end),
                None => end,
            };
            pass.credits.push((place, number));
            if place < end {
                pass.factors[place as usize] += sequence.loss_weight();
                continue;
            }
            pass.rows.push(*row);
            pass.targets.push(target);
            pass.factors.push(sequence.loss_weight());
        }
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.insert(sequence.tokens(), &rows);
        }
        self.attended.extend(rows);
        pass.bounds.push(self.attended.len());
        pass.members.push(member);
    }

    fn finish(self) -> Packed {
        let tokens = self.pass.tokens.len();
        let shares = self.attended.len() != tokens;
        Packed {
            attended: shares.then(|| Attended::new(self.attended, tokens)),
            ..self.pass
        }
    }
}

/// The number of leading sequences that together have at most `tokens` tokens, at least 1 of them. With `reuse`, tokens
/// of common prefixes count once, as [`accumulate_in_place`](super::accumulate_in_place) computes them once.
pub fn leading_sequences(sequences: &[TrainingSequence], tokens: usize, reuse: bool) -> usize {
    let mut pass = Packing::new(reuse);
    let fits = sequences.iter().take_while(|sequence| {
        let fits = pass.fits(sequence, tokens, 4 * tokens);
        pass.push(0, sequence);
        fits
    });
    fits.count().max(1)
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
        let passes = Packed::split(
            &[sequence(1000), sequence(1), sequence(1000), sequence(49), sequence(3)],
            false,
        );
        assert_eq!(
            passes.iter().map(|pass| pass.members.clone()).collect::<Vec<_>>(),
            [vec![0, 2], vec![3, 4]]
        );
        assert_eq!(passes[1].bounds, [0, 49, 52]);
        assert_eq!(passes[1].positions[48..], [48, 0, 1, 2]);
        assert_eq!(passes[1].rows[46..], [46, 47, 49, 50]);
        assert_eq!(passes[1].credits[46..], [(46, 0), (47, 0), (48, 1), (49, 1)]);
        assert!(passes[1].attended.is_none());
    }

    #[test]
    fn common_prefixes_are_there_once() {
        let config = crate::config::from_settings(
            serde_json::json!({"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 16,
                "vocabulary": 9})
            .as_object()
            .unwrap(),
            None,
        )
        .unwrap();
        let sequence = |tokens: &[i64], weight| TrainingSequence::new(tokens, None, Some(weight), &config).unwrap();
        let sequences = [
            sequence(&[1, 2, 3, 4], 1.0),
            sequence(&[5, 2], 1.0),
            sequence(&[1, 2, 3, 5, 6], 0.5),
            sequence(&[1, 2], 2.0),
        ];
        let passes = Packed::split(&sequences, true);
        let [pass] = &passes[..] else { panic!("one pass") };
        assert_eq!(pass.tokens, [1, 2, 3, 4, 5, 2, 5, 6]);
        assert_eq!(pass.positions, [0, 1, 2, 3, 0, 1, 3, 4]);
        let attended = pass.attended.as_ref().unwrap();
        assert_eq!(attended.rows, [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 0, 1]);
        assert_eq!(pass.bounds, [0, 4, 6, 11, 13]);
        assert_eq!(pass.rows, [0, 1, 2, 4, 2, 6]);
        assert_eq!(pass.targets, [2, 3, 4, 2, 5, 6]);
        assert_eq!(pass.factors, [3.5, 1.5, 1.0, 1.0, 0.5, 0.5]);
        let credits = [(0, 0), (1, 0), (2, 0), (3, 1), (0, 2), (1, 2), (4, 2), (5, 2), (0, 3)];
        assert_eq!(pass.credits, credits);
        assert_eq!(attended.first, [0, 1, 2, 3, 4, 5, 9, 10]);
        assert!(!pass.every_row_has_a_target());
        assert!(Packed::split(&sequences, false)[0].attended.is_none());
        for (tokens, expected, shared) in [(1, 1, 1), (4, 1, 1), (8, 2, 4), (6, 2, 2), (10, 2, 4)] {
            assert_eq!(leading_sequences(&sequences, tokens, false), expected, "{tokens}");
            assert_eq!(leading_sequences(&sequences, tokens, true), shared, "{tokens}");
        }
    }
}
