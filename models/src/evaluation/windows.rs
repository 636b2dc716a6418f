//! How a text that is longer than the context is read: in windows, each of whose last tokens are predicted.

use super::Stretch;

/// Cuts a text into stretches of at most `context` tokens, whose beginnings are `stride` tokens apart, `stride` from 1 to
/// `context`. Every token but the first is predicted once, in the first stretch that reads the token before it: of two that
/// overlap, the second only predicts what the first did not reach, with more of the text before it. A text of fewer than two
/// tokens has no stretch.
///
/// # Panics
/// For a context or stride of 0, or a stride beyond the context.
pub fn windows(tokens: &[u32], context: usize, stride: usize) -> Vec<Stretch> {
    assert!(
        (1..=context).contains(&stride),
        "stride {stride} in a context of {context}"
    );
    // The last token predicts nothing, and is not read.
    let length = tokens.len().saturating_sub(1);
    let mut stretches = Vec::new();
    let (mut start, mut predicted) = (0, 0);
    while predicted < length {
        let end = length.min(start + context);
        stretches.push(Stretch {
            inputs: tokens[start..end].to_vec(),
            targets: tokens[predicted + 1..end + 1].to_vec(),
        });
        predicted = end;
        start += stride;
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs and targets of every stretch.
    fn cut(length: u32, context: usize, stride: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
        let tokens: Vec<u32> = (0..length).collect();
        let stretches = windows(&tokens, context, stride).into_iter();
        stretches.map(|stretch| (stretch.inputs, stretch.targets)).collect()
    }

    #[test]
    fn texts_within_the_context_are_read_at_once() {
        assert_eq!(cut(0, 4, 4), []);
        assert_eq!(cut(1, 4, 4), []);
        assert_eq!(cut(2, 4, 4), [(vec![0], vec![1])]);
        // One token more than the context: the last is only predicted.
        assert_eq!(cut(5, 4, 1), [(vec![0, 1, 2, 3], vec![1, 2, 3, 4])]);
    }

    #[test]
    fn longer_texts_are_read_in_windows() {
        assert_eq!(
            cut(8, 4, 4),
            [(vec![0, 1, 2, 3], vec![1, 2, 3, 4]), (vec![4, 5, 6], vec![5, 6, 7])]
        );
        assert_eq!(
            cut(8, 4, 2),
            [
                (vec![0, 1, 2, 3], vec![1, 2, 3, 4]),
                (vec![2, 3, 4, 5], vec![5, 6]),
                (vec![4, 5, 6], vec![7])
            ]
        );
        assert_eq!(cut(3, 1, 1), [(vec![0], vec![1]), (vec![1], vec![2])]);
    }

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for length in 0..30 {
            for context in 1..9 {
                for stride in 1..=context {
                    let stretches = cut(length, context, stride);
                    assert!(stretches.iter().all(|(inputs, targets)| {
                        inputs.len() <= context && !targets.is_empty() && targets.len() <= inputs.len()
                    }));
                    let predicted: Vec<u32> = stretches.into_iter().flat_map(|(_, targets)| targets).collect();
                    assert_eq!(predicted, (1..length).collect::<Vec<_>>());
                }
            }
        }
    }
}
