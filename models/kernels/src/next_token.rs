//! How likely the logits make given tokens, and whether they make them the likeliest.

use crate::cross_entropy::{Labels, check_targets, softmax_rows};
use crate::simd::level;

/// Log-probabilities (natural logarithm) of the targets under `logits` `[tokens, vocabulary]`, and whether each target's
/// logit is the greatest of its row, of equal ones the first. `targets`, `log_probabilities` and `likeliest` are `[tokens]`;
/// a target of -100 gives 0 and false. The logits are not changed; they are mutable because gradients share the code.
///
/// # Panics
/// Where the lengths do not fit each other or a target is neither -100 nor below the vocabulary.
pub fn score_logits(logits: &mut [f32], targets: &[i64], log_probabilities: &mut [f32], likeliest: &mut [bool]) {
    let tokens = targets.len();
    assert!(
        log_probabilities.len() == tokens && likeliest.len() == tokens,
        "outputs are not [{tokens}]"
    );
    if tokens == 0 {
        return;
    }
    let vocabulary = logits.len() / tokens;
    assert_eq!(
        logits.len(),
        tokens * vocabulary,
        "logits are not [{tokens}, vocabulary]"
    );
    check_targets(targets, vocabulary);
    for ((logits, target), likeliest) in logits.chunks(vocabulary).zip(targets).zip(likeliest) {
        *likeliest = usize::try_from(*target).is_ok_and(|target| {
            let greatest = logits[target];
            logits[..target].iter().all(|logit| *logit < greatest)
                && logits[target + 1..].iter().all(|logit| *logit <= greatest)
        });
    }
    let labels = Labels {
        targets,
        token_weights: &[],
    };
    softmax_rows(level(), logits, labels, false, log_probabilities);
    log_probabilities.iter_mut().for_each(|loss| *loss = 0.0 - *loss);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::{assert_close, at_every_level, random};

    #[test]
    fn likeliest_targets_and_their_probabilities_are_found() {
        at_every_level(|| {
            let (tokens, vocabulary) = (21, 37);
            let mut logits = random(tokens * vocabulary, 1);
            // Of equal ones the first is the greatest.
            for row in logits.chunks_mut(vocabulary) {
                row[30] = row[4];
            }
            let row = |token: usize| logits[token * vocabulary..(token + 1) * vocabulary].to_vec();
            let greatest = |token| {
                let row = row(token);
                (0..vocabulary).fold(0, |best, next| if row[next] > row[best] { next } else { best })
            };
            // Every third token gets the likeliest target, every third the one behind it, every third none.
            let target = |token: usize| match token % 3 {
                0 => greatest(token) as i64,
                1 => ((greatest(token) + 1) % vocabulary) as i64,
                _ => -100,
            };
            let targets: Vec<i64> = (0..tokens).map(target).collect();
            let want = |token: usize| {
                let Ok(target) = usize::try_from(targets[token]) else {
                    return 0.0;
                };
                let row = row(token);
                let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
                (f64::from(row[target]) - sum.ln()) as f32
            };
            let want: Vec<f32> = (0..tokens).map(want).collect();
            let (mut scores, mut likeliest) = (vec![f32::NAN; tokens], vec![true; tokens]);
            score_logits(&mut logits.clone(), &targets, &mut scores, &mut likeliest);
            assert_eq!(likeliest, (0..tokens).map(|token| token % 3 == 0).collect::<Vec<_>>());
            assert_close(&scores, &want, 1e-5);
            // A row alone gives the same bits.
            let (mut score, mut alone) = ([f32::NAN], [false]);
            score_logits(&mut row(7), &targets[7..8], &mut score, &mut alone);
            assert_eq!((score[0].to_bits(), alone[0]), (scores[7].to_bits(), likeliest[7]));
        });
    }
}
