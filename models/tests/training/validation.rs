//! What a training sequence refuses, and how it says so.

use candle_models::training::TrainingSequence;

use crate::support::load;

#[test]
fn bad_sequences_are_refused_by_index_and_value() {
    let decoder = load("gpt2");
    let config = decoder.config();
    let long = vec![1; config.context_length + 1];
    type Case<'a> = (&'a [i64], Option<&'a [i64]>, Option<f32>, &'a str);
    let cases: [Case<'_>; 10] = [
        (&[], None, None, "tokens is empty"),
        (&[1, 61], None, None, "tokens[1] is 61; it must be from 0 to 60"),
        (&[-1], None, None, "tokens[0] is -1"),
        (&[i64::from(u32::MAX) + 2], None, None, "tokens[0] is 4294967297"),
        (&long, None, None, "more than the context length 40"),
        (&[1, 2], Some(&[1]), None, "targets has 1 elements but tokens has 2"),
        (&[1, 2], Some(&[1, -99]), None, "targets[1] is -99"),
        (&[1, 2], Some(&[61, 1]), None, "targets[0] is 61"),
        (&[1, 2], None, Some(-0.5), "loss_weight is -0.5"),
        (&[1, 2], None, Some(f32::NAN), "loss_weight is NaN"),
    ];
    for (tokens, targets, weight, expected) in cases {
        let error = TrainingSequence::new(tokens, targets, weight, config)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
    }
}

#[test]
fn targets_default_to_the_next_token() {
    let decoder = load("gpt2");
    let sequence = TrainingSequence::new(&[5, 6, 7], None, None, decoder.config()).unwrap();
    assert_eq!(sequence.targets(), [Some(6), Some(7), None]);
    assert_eq!((sequence.target_count(), sequence.loss_weight()), (2, 1.0));
    let single = TrainingSequence::new(&[5], None, None, decoder.config()).unwrap();
    assert_eq!(single.target_count(), 0);
    let masked = TrainingSequence::new(&[5, 6], Some(&[-100, 0]), None, decoder.config()).unwrap();
    assert_eq!(masked.targets(), [None, Some(0)]);
}
