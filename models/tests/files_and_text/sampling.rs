//! The sampler against a naive one, and against distributions worked out by hand.

use candle_models::{Error, Sampler, SamplingOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn options() -> SamplingOptions {
    SamplingOptions {
        temperature: 1.0,
        ..Default::default()
    }
}

/// The plain way: sort everything, filter step by step, draw. Returns the kept tokens, most likely first.
fn naive(logits: &[f32], options: &SamplingOptions) -> Vec<(u32, f64)> {
    let best = logits.iter().copied().fold(f32::MIN, f32::max);
    let weight = |logit: f32| f64::from((f64::from(logit - best) / f64::from(options.temperature)) as f32).exp();
    let mut kept: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(id, &logit)| (id as u32, weight(logit)))
        .collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1));
    if options.top_k > 0 {
        kept.truncate(options.top_k as usize);
    }
    let mass: f64 = kept.iter().map(|entry| entry.1).sum();
    if options.top_p < 1.0 {
        let mut reached = 0.0;
        let enough = kept.iter().position(|entry| {
            reached += entry.1;
            reached >= f64::from(options.top_p) * mass
        });
        kept.truncate(enough.map_or(kept.len(), |index| index + 1));
    }
    kept.retain(|entry| entry.1 >= f64::from(options.min_p));
    kept
}

fn draw(kept: &[(u32, f64)], number: f64) -> u32 {
    let target = number * kept.iter().map(|entry| entry.1).sum::<f64>();
    let mut reached = 0.0;
    let found = kept.iter().find(|entry| {
        reached += entry.1;
        reached > target
    });
    found.unwrap_or(&kept[kept.len() - 1]).0
}

#[test]
fn filters_and_draws_as_the_naive_sampler() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for case in 0..2000u64 {
        let vocabulary = [1, 2, 7, 63, 64, 65, 300, 2000][random.random_range(0..8)];
        let spread: f32 = [0.0, 1.0, 5.0, 30.0][random.random_range(0..4)];
        let mut logits: Vec<f32> = (0..vocabulary)
            .map(|_| random.random_range(-1.0..=1.0f32) * spread)
            .collect();
        if case % 5 == 0 {
            logits.iter_mut().for_each(|logit| *logit = logit.round());
        }
        let mut options = SamplingOptions {
            temperature: random.random_range(0.05..3.0),
            seed: case,
            ..options()
        };
        options.top_k = [0, 2, 3, 40, 5000][random.random_range(0..5)];
        options.top_p = [1.0, 0.9, 0.5, 0.01][random.random_range(0..4)];
        options.min_p = [0.0, 0.01, 0.3, 1.0][random.random_range(0..4)];
        let filters = options.top_k > 0 || options.top_p < 1.0 || options.min_p > 0.0;
        let mut sampler = Sampler::new(&options).unwrap();
        let mut numbers = ChaCha8Rng::seed_from_u64(case);
        for _ in 0..4 {
            let mut kept = naive(&logits, &options);
            if !filters {
                kept.sort_by_key(|entry| entry.0);
            }
            let token = sampler.sample(&mut logits.clone(), &[]).unwrap().token;
            assert_eq!(token, draw(&kept, numbers.random()), "case {case}: {options:?}");
        }
    }
}

/// Shares of tokens over many draws.
fn shares(probabilities: &[f64], options: &SamplingOptions) -> Vec<f64> {
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32 + 2.0).collect();
    let mut sampler = Sampler::new(options).unwrap();
    let mut counts = vec![0.0; probabilities.len()];
    for _ in 0..100_000 {
        counts[sampler.sample(&mut logits.clone(), &[]).unwrap().token as usize] += 1e-5;
    }
    counts
}

#[test]
fn distributions_are_as_worked_out() {
    let probabilities = [0.1, 0.4, 0.2, 0.3];
    let quarter_power: f64 = probabilities.iter().map(|p: &f64| p.powf(0.5)).sum();
    let cases = [
        (options(), vec![0.1, 0.4, 0.2, 0.3]),
        (
            SamplingOptions { top_k: 2, ..options() },
            vec![0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        ),
        (SamplingOptions { top_k: 1, ..options() }, vec![0.0, 1.0, 0.0, 0.0]),
        (
            SamplingOptions {
                top_p: 0.39,
                ..options()
            },
            vec![0.0, 1.0, 0.0, 0.0],
        ),
        (
            SamplingOptions {
                top_p: 0.69,
                ..options()
            },
            vec![0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        ),
        (
            SamplingOptions {
                top_p: 0.71,
                ..options()
            },
            vec![0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0],
        ),
        // Top-p is a share of what top-k leaves: 4/9 + 3/9 = 0.78 reaches 0.75.
        (
            SamplingOptions {
                top_k: 3,
                top_p: 0.75,
                ..options()
            },
            vec![0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        ),
        (
            SamplingOptions {
                min_p: 0.6,
                ..options()
            },
            vec![0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        ),
        (
            SamplingOptions {
                min_p: 1.0,
                ..options()
            },
            vec![0.0, 1.0, 0.0, 0.0],
        ),
        (
            SamplingOptions {
                temperature: 2.0,
                ..options()
            },
            probabilities.iter().map(|p| p.powf(0.5) / quarter_power).collect(),
        ),
        (
            SamplingOptions {
                temperature: 1e-30,
                ..options()
            },
            vec![0.0, 1.0, 0.0, 0.0],
        ),
    ];
    for (options, expected) in cases {
        for (share, expected) in shares(&probabilities, &options).iter().zip(&expected) {
            // Five standard deviations of a share of 100,000 draws; exactly zero where the token is excluded.
            let tolerance = 5.0 * (expected * (1.0 - expected) / 1e5).sqrt() + 1e-9;
            assert!(
                (share - expected).abs() <= tolerance,
                "{options:?}: {share} instead of {expected}"
            );
        }
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_the_largest() {
    let mut sampler = Sampler::new(&SamplingOptions::default()).unwrap();
    assert_eq!(sampler.sample(&mut [1.0, 3.0, 3.0, -2.0], &[]).unwrap().token, 1);
    assert_eq!(sampler.sample(&mut [-0.0, 0.0], &[]).unwrap().token, 0);
    assert_eq!(sampler.sample(&mut [f32::NEG_INFINITY, -1e30], &[]).unwrap().token, 1);
    let mut flat = Sampler::new(&SamplingOptions { top_k: 3, ..options() }).unwrap();
    assert!((0..100).all(|_| flat.sample(&mut [0.0, -0.0, 0.0, 0.0, -0.0], &[]).unwrap().token < 3));
}

#[test]
fn logprob_is_of_the_raw_logits() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 37 % 101) as f32) / 7.0).collect();
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let changes = SamplingOptions {
        temperature: 0.3,
        top_k: 5,
        repetition_penalty: 1.7,
        seed: 3,
        ..options()
    };
    for options in [SamplingOptions::default(), changes] {
        let seen: Vec<u32> = (0..1000).rev().step_by(2).chain([5000, 5]).collect();
        let sampled = Sampler::new(&options)
            .unwrap()
            .sample(&mut logits.clone(), &seen)
            .unwrap();
        let exact = f64::from(logits[sampled.token as usize]) - sum.ln();
        assert!(
            (f64::from(sampled.logprob) - exact).abs() < 2e-6,
            "{} instead of {exact}",
            sampled.logprob
        );
    }
}

#[test]
fn repetition_penalty_counts_once_per_token() {
    let mut sampler = Sampler::new(&SamplingOptions {
        repetition_penalty: 2.0,
        ..Default::default()
    })
    .unwrap();
    let mut logits = [3.0, -1.0, 2.0, -3.0];
    let sampled = sampler.sample(&mut logits, &[0, 0, 1, 0, 99]).unwrap();
    assert_eq!(logits, [1.5, -2.0, 2.0, -3.0]);
    assert_eq!(sampled.token, 2);
    let extreme = SamplingOptions {
        repetition_penalty: 1e-38,
        ..options()
    };
    assert_eq!(
        Sampler::new(&extreme)
            .unwrap()
            .sample(&mut [30.0, 1.0], &[0])
            .unwrap()
            .token,
        0
    );
}

#[test]
fn seeds_decide() {
    let logits: Vec<f32> = (0..500).map(|i| (i % 13) as f32 / 5.0).collect();
    let draws = |seed: u64| -> Vec<u32> {
        let mut sampler = Sampler::new(&SamplingOptions { seed, ..options() }).unwrap();
        (0..20)
            .map(|_| sampler.sample(&mut logits.clone(), &[]).unwrap().token)
            .collect()
    };
    assert_eq!(draws(7), draws(7));
    assert_ne!(draws(7), draws(8));
}

#[test]
fn bad_options_are_named() {
    let with = |change: fn(&mut SamplingOptions)| {
        let mut options = options();
        change(&mut options);
        match Sampler::new(&options) {
            Err(Error::InvalidArgument(message)) => message,
            other => panic!("{other:?}"),
        }
    };
    assert!(with(|o| o.temperature = -1.0).starts_with("temperature is -1,"));
    assert!(with(|o| o.temperature = f32::NAN).starts_with("temperature is NaN,"));
    assert!(with(|o| o.temperature = f32::INFINITY).starts_with("temperature is inf,"));
    assert!(with(|o| o.top_k = -5).starts_with("top_k is -5,"));
    assert!(with(|o| o.top_p = 0.0).starts_with("top_p is 0,"));
    assert!(with(|o| o.top_p = 1.5).starts_with("top_p is 1.5,"));
    assert!(with(|o| o.top_p = f32::NAN).starts_with("top_p is NaN,"));
    assert!(with(|o| o.min_p = -0.1).starts_with("min_p is -0.1,"));
    assert!(with(|o| o.min_p = f32::NAN).starts_with("min_p is NaN,"));
    assert!(with(|o| o.repetition_penalty = 0.0).starts_with("repetition_penalty is 0,"));
    assert!(with(|o| o.repetition_penalty = f32::NAN).starts_with("repetition_penalty is NaN,"));
    assert!(with(|o| o.frequency_penalty = 2.5).starts_with("frequency_penalty is 2.5,"));
    assert!(with(|o| o.presence_penalty = f32::NAN).starts_with("presence_penalty is NaN,"));
    assert!(with(|o| o.logit_bias = vec![(1, 0.0), (7, 101.0)]).starts_with("logit_bias of token 7 is 101,"));
    assert!(with(|o| o.logit_bias = vec![(7, f32::NAN)]).starts_with("logit_bias of token 7 is NaN,"));
    assert!(with(|o| o.logit_bias = vec![(0, 0.0); 4097]).starts_with("logit_bias is of 4097 tokens,"));
    assert!(with(|o| o.top_logprobs = 21).starts_with("top_logprobs is 21,"));
    assert!(with(|o| o.top_logprobs = -1).starts_with("top_logprobs is -1,"));
}

#[test]
fn penalties_count_what_was_generated_and_not_the_prompt() {
    let mut sampler = Sampler::new(&SamplingOptions {
        frequency_penalty: 0.5,
        presence_penalty: 1.0,
        ..Default::default()
    })
    .unwrap();
    let raw = [3.0, 2.0, 1.9, -5.0];
    let mut chosen = Vec::new();
    for _ in 0..4 {
        let mut logits = raw;
        chosen.push(sampler.sample(&mut logits, &[1, 1, 1]).unwrap().token);
        for (token, &logit) in raw.iter().enumerate() {
            let count = chosen[..chosen.len() - 1]
                .iter()
                .filter(|&&id| id as usize == token)
                .count() as f32;
            let expected = if count == 0.0 { logit } else { logit - 0.5 * count - 1.0 };
            assert_eq!(logits[token], expected);
        }
    }
    assert_eq!(chosen, [0, 1, 2, 0]);
}

#[test]
fn bias_is_added_after_the_penalties() {
    let mut sampler = Sampler::new(&SamplingOptions {
        repetition_penalty: 2.0,
        logit_bias: vec![(1, 10.0), (0, -100.0), (77, 5.0)],
        ..Default::default()
    })
    .unwrap();
    let mut logits = [f32::NEG_INFINITY, -1.0, 8.0];
    let sampled = sampler.sample(&mut logits, &[1, 2]).unwrap();
    assert_eq!(logits, [f32::NEG_INFINITY, 8.0, 4.0]);
    assert_eq!(sampled.token, 1);
    // Of the raw logits: exp(-1) / (exp(-1) + exp(8)).
    assert!((sampled.logprob - (-9.0 - 1.000_123_4_f32.ln())).abs() < 1e-5);
}

#[test]
fn top_logprobs_are_of_the_raw_logits() {
    let logits = [1.0f32, 4.0, 4.0, -2.0, 3.0];
    let sum: f32 = logits.iter().map(|logit| logit.exp()).sum();
    let mut sampler = Sampler::new(&SamplingOptions {
        temperature: 0.5,
        top_k: 1,
        logit_bias: vec![(3, 100.0)],
        top_logprobs: 3,
        ..Default::default()
    })
    .unwrap();
    let sampled = sampler.sample(&mut logits.clone(), &[]).unwrap();
    assert_eq!(sampled.token, 3);
    let ids: Vec<u32> = sampled.top_logprobs.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [1, 2, 4]);
    for (id, logprob) in sampled.top_logprobs {
        assert!((logprob - (logits[id as usize].exp() / sum).ln()).abs() < 1e-5);
    }
}

#[test]
fn broken_logits_are_an_error() {
    let mut sampler = Sampler::new(&SamplingOptions::default()).unwrap();
    for logits in [
        vec![1.0, f32::NAN],
        vec![f32::INFINITY, 0.0],
        vec![f32::NEG_INFINITY; 3],
        vec![],
        vec![f32::NAN; 40],
    ] {
        let result = sampler.sample(&mut logits.clone(), &[]);
        assert!(matches!(result, Err(Error::FailedPrecondition(_))), "{logits:?}");
    }
}

#[test]
#[ignore = "prints timings"]
fn speed() {
    let logits: Vec<f32> = {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        (0..50_257)
            .map(|_| (0..4).map(|_| random.random_range(-3.0..3.0f32)).sum())
            .collect()
    };
    let variants = [
        ("greedy", SamplingOptions::default()),
        ("temperature", options()),
        ("top_k 40", SamplingOptions { top_k: 40, ..options() }),
        (
            "top_p 0.9",
            SamplingOptions {
                top_p: 0.9,
                ..options()
            },
        ),
        (
            "min_p 0.05",
            SamplingOptions {
                min_p: 0.05,
                ..options()
            },
        ),
    ];
    for (name, options) in variants {
        let mut sampler = Sampler::new(&options).unwrap();
        let mut copy = logits.clone();
        let started = std::time::Instant::now();
        for _ in 0..200 {
            sampler.sample(&mut copy, &[]).unwrap();
        }
        println!("{name}: {:.1?} per token", started.elapsed() / 200);
    }
}
