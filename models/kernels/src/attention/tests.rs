use super::backward::backward_with;
use super::cached::decode_with;
use super::forward::forward_with;
use super::*;
use crate::dropout::Dropout;
use crate::simd::{Level, available};
use crate::test_util::{assert_close, numeric_gradient, random, weighted_sum};

fn heads(heads: usize, key_value_heads: usize, head_dim: usize) -> AttentionHeads<'static> {
    AttentionHeads {
        heads,
        key_value_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        mask: AttentionMask::default(),
    }
}

/// The definition, one row at a time in double precision.
fn oracle(shape: &AttentionHeads<'_>, bounds: &[usize], [q, k, v]: [&[f32]; 3]) -> (Vec<f32>, Vec<f32>) {
    let (dim, width, kv_width) = (shape.head_dim, shape.query_width(), shape.key_value_width());
    let tokens = q.len() / width;
    let (mut out, mut log_sum_exp) = (vec![0.0; q.len()], vec![0.0; tokens * shape.heads]);
    for token in 0..tokens {
        let start = *bounds.iter().rfind(|&&bound| bound <= token).unwrap();
        for head in 0..shape.heads {
            let query = &q[token * width + head * dim..][..dim];
            let kv_head = head / (shape.heads / shape.key_value_heads);
            let row = |data: &'_ [f32], j: usize, i: usize| f64::from(data[j * kv_width + kv_head * dim + i]);
            let score = |j: usize| {
                let dot: f64 = (0..dim).map(|i| f64::from(query[i]) * row(k, j, i)).sum();
                (dot * f64::from(shape.scale)).exp()
            };
            let weights: Vec<f64> = (start..=token).map(score).collect();
            let total: f64 = weights.iter().sum();
            log_sum_exp[token * shape.heads + head] = total.ln() as f32;
            for i in 0..dim {
                let sum: f64 = (start..=token)
                    .zip(&weights)
                    .map(|(j, weight)| weight * row(v, j, i))
                    .sum();
                out[token * width + head * dim + i] = (sum / total) as f32;
            }
        }
    }
    (out, log_sum_exp)
}

fn inputs(shape: &AttentionHeads<'_>, tokens: usize) -> [Vec<f32>; 3] {
    let q = random(tokens * shape.query_width(), 1)
        .iter()
        .map(|x| 3.0 * x)
        .collect();
    [
        q,
        random(tokens * shape.key_value_width(), 2),
        random(tokens * shape.key_value_width(), 3),
    ]
}

#[test]
fn forward_agrees_with_the_definition() {
    for (shape, bounds) in [
        (heads(1, 1, 1), vec![0, 1]),
        (heads(2, 1, 7), vec![0, 3, 3, 4, 37]),
        (heads(4, 4, 33), vec![0, 65, 66]),
        (heads(6, 2, 64), vec![0, 130, 200]),
    ] {
        let tokens = *bounds.last().unwrap();
        let [q, k, v] = inputs(&shape, tokens);
        let (want, want_log) = oracle(&shape, &bounds, [&q, &k, &v]);
        for level in available() {
            let (mut out, mut log_sum_exp) = (vec![0.0; q.len()], vec![0.0; tokens * shape.heads]);
            forward_with(
                level,
                &shape,
                &bounds,
                [&q, &k, &v],
                None,
                &mut out,
                Some(&mut log_sum_exp),
            );
            assert_close(&out, &want, 2e-6);
            assert_close(&log_sum_exp, &want_log, 2e-6);
        }
    }
}

/// Pages of 16 positions with these keys and values.
fn paged(shape: &AttentionHeads<'_>, kind: CacheType, [k, v]: [&[f32]; 2]) -> (PageLayout, Vec<Vec<f32>>) {
    let layout = PageLayout {
        kind,
        positions: 16,
        key_value_heads: shape.key_value_heads,
        head_dim: shape.head_dim,
    };
    let step = layout.positions * shape.key_value_width();
    let pages = k.chunks(step).zip(v.chunks(step)).map(|(k, v)| {
        let mut page = vec![f32::NAN; layout.words()];
        // In two parts, since a position must not depend on those beside it.
        let half = k.len() / shape.key_value_width() / 2;
        let (k, v) = (
            k.split_at(half * shape.key_value_width()),
            v.split_at(half * shape.key_value_width()),
        );
        layout.store(&mut page, 0, k.0, v.0);
        layout.store(&mut page, half, k.1, v.1);
        page
    });
    (layout, pages.collect())
}

#[test]
fn pages_give_bitwise_what_the_whole_sequence_gives() {
    for (shape, kind) in [
        (heads(6, 2, 40), CacheType::F32),
        (heads(6, 2, 40), CacheType::F16),
        (heads(3, 1, 7), CacheType::F16),
        (heads(4, 4, 64), CacheType::Q8),
        (heads(6, 2, 37), CacheType::Q8),
    ] {
        let bounds = [0, 150, 230];
        let [q, k, v] = inputs(&shape, 230);
        let (width, kv_width) = (shape.query_width(), shape.key_value_width());
        let pages = [0, 1].map(|index| {
            let rows = bounds[index] * kv_width..bounds[index + 1] * kv_width;
            paged(&shape, kind, [&k[rows.clone()], &v[rows]])
        });
        // The definition is over what the pages hold.
        let (mut k, mut v) = (vec![0.0; k.len()], vec![0.0; v.len()]);
        let step = 16 * kv_width;
        for (index, (layout, pages)) in pages.iter().enumerate() {
            let rows = bounds[index] * kv_width..bounds[index + 1] * kv_width;
            let (k, v) = (k[rows.clone()].chunks_mut(step), v[rows].chunks_mut(step));
            k.zip(v).zip(pages).for_each(|((k, v), page)| layout.load(page, k, v));
        }
        for level in available() {
            let tables = [0, 1].map(|index| pages[index].1.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let sequence = |index: usize, new_tokens| CachedSequence {
                pages: &tables[index],
                positions: bounds[index + 1] - bounds[index],
                new_tokens,
            };
            let mut whole = vec![0.0; q.len()];
            let sequences = [sequence(0, 150), sequence(1, 80)];
            decode_with(level, &shape, &pages[0].0, &q, &sequences, &mut whole);
            let mut trained = vec![0.0; q.len()];
            forward_with(level, &shape, &bounds, [&q, &k, &v], None, &mut trained, None);
            assert_close(&trained, &whole, 1e-5);
            // New tokens at the end of each sequence: one, some, all.
            for new in [[1, 1], [7, 70], [150, 80], [0, 3]] {
                let starts = [150 - new[0], 230 - new[1]];
                let pick = |data: &[f32]| {
                    let parts = [
                        &data[starts[0] * width..150 * width],
                        &data[starts[1] * width..230 * width],
                    ];
                    parts.concat()
                };
                let queries = pick(&q);
                let mut out = vec![0.0; queries.len()];
                let sequences = [sequence(0, new[0]), sequence(1, new[1])];
                decode_with(level, &shape, &pages[0].0, &queries, &sequences, &mut out);
                assert_eq!(out, pick(&whole), "{level}, {kind:?}, {new:?} new tokens");
            }
        }
    }
}

#[test]
fn pages_hold_what_was_stored_within_their_precision() {
    let shape = heads(2, 2, 45);
    let width = shape.key_value_width();
    let (mut k, v) = (random(16 * width, 5), random(16 * width, 6));
    k[3] = 1e9;
    k[50] = f32::INFINITY;
    for (kind, tolerance) in [(CacheType::F32, 0.0), (CacheType::F16, 0.001), (CacheType::Q8, 0.005)] {
        let (layout, pages) = paged(&shape, kind, [&k, &v]);
        let (mut found_k, mut found_v) = (vec![0.0; k.len()], vec![0.0; v.len()]);
        layout.load(&pages[0], &mut found_k, &mut found_v);
        assert!(
            v.iter().zip(&found_v).all(|(a, b)| (a - b).abs() <= tolerance),
            "{kind:?}"
        );
        match kind {
            CacheType::F32 => assert_eq!(k, found_k),
            CacheType::F16 => assert_eq!((found_k[3], found_k[50]), (65504.0, 65504.0)),
            CacheType::Q8 => assert!(found_k[3] > 0.99e9 && found_k.iter().all(|value| value.is_finite())),
        }
    }
    let words = |kind| paged(&shape, kind, [&k, &v]).0.words();
    assert_eq!(words(CacheType::F32), 2 * 16 * 90);
    assert_eq!(words(CacheType::F16), 16 * 90);
    assert_eq!(words(CacheType::Q8), 2 * 16 * 90 / 4 + 2 * 16 * 2 * 2);
}

#[test]
fn gradients_agree_with_differences() {
    for (shape, bounds) in [(heads(2, 1, 3), vec![0, 5, 9]), (heads(2, 2, 17), vec![0, 1, 4])] {
        let tokens = *bounds.last().unwrap();
        let [q, k, v] = inputs(&shape, tokens);
        let d_out = random(q.len(), 4);
        let loss = |q: &[f32], k: &[f32], v: &[f32]| weighted_sum(&d_out, &oracle(&shape, &bounds, [q, k, v]).0);
        let want_q = numeric_gradient(&q, 1e-2, |q| loss(q, &k, &v));
        let want_k = numeric_gradient(&k, 1e-2, |k| loss(&q, k, &v));
        let want_v = numeric_gradient(&v, 1e-2, |v| loss(&q, &k, v));
        for level in available() {
            let [dq, dk, dv] = backward_of(level, &shape, &bounds, [&q, &k, &v], &d_out);
            assert_close(&dq, &want_q, 1e-3);
            assert_close(&dk, &want_k, 1e-3);
            assert_close(&dv, &want_v, 1e-3);
        }
    }
}

fn backward_of(
    level: Level,
    shape: &AttentionHeads<'_>,
    bounds: &[usize],
    [q, k, v]: [&[f32]; 3],
    d_out: &[f32],
) -> [Vec<f32>; 3] {
    let tokens = bounds[bounds.len() - 1];
    let (mut out, mut log_sum_exp) = (vec![0.0; q.len()], vec![0.0; tokens * shape.heads]);
    forward_with(level, shape, bounds, [q, k, v], None, &mut out, Some(&mut log_sum_exp));
    let saved = AttentionSaved {
        q,
        k,
        v,
        out: &out,
        log_sum_exp: &log_sum_exp,
    };
    let mut gradients = [
        vec![f32::NAN; q.len()],
        vec![f32::NAN; k.len()],
        vec![f32::NAN; v.len()],
    ];
    let [dq, dk, dv] = &mut gradients;
    backward_with(level, shape, bounds, &saved, None, d_out, [dq, dk, dv]);
    gradients
}

/// Row by row, with the masks that the kernels should use.
fn oracle_with_dropout(
    shape: &AttentionHeads<'_>,
    bounds: &[usize],
    [q, k, v]: [&[f32]; 3],
    dropout: &Dropout<'_>,
) -> Vec<f32> {
    let (dim, width, kv_width) = (shape.head_dim, shape.query_width(), shape.key_value_width());
    let mut out = vec![0.0; q.len()];
    for (sequence, bound) in bounds.windows(2).enumerate() {
        for token in bound[0]..bound[1] {
            for head in 0..shape.heads {
                let at = token * width + head * dim;
                let kv_head = head / (shape.heads / shape.key_value_heads);
                let row = |data: &'_ [f32], j: usize, i: usize| f64::from(data[j * kv_width + kv_head * dim + i]);
                let score = |j: usize| {
                    let dot: f64 = (0..dim).map(|i| f64::from(q[at + i]) * row(k, j, i)).sum();
                    (dot * f64::from(shape.scale)).exp()
                };
                let weights: Vec<f64> = (bound[0]..=token).map(score).collect();
                let total: f64 = weights.iter().sum();
                let masks = dropout.masks(sequence, head);
                let factor = |key: usize| masks.factors((token - bound[0]) as u32, (key / 64) as u32)[key % 64];
                for i in 0..dim {
                    let terms = weights.iter().enumerate();
                    let sum: f64 = terms
                        .map(|(j, weight)| weight * f64::from(factor(j)) * row(v, bound[0] + j, i))
                        .sum();
                    out[at + i] = (sum / total) as f32;
                }
            }
        }
    }
    out
}

#[test]
fn dropout_drops_probabilities_in_both_directions() {
    let forward =
        |level, shape: &AttentionHeads<'_>, bounds: &[usize], [q, k, v]: [&[f32]; 3], dropout: &Dropout<'_>| {
            let tokens = bounds[bounds.len() - 1];
            let (mut out, mut log_sum_exp) = (vec![0.0; q.len()], vec![0.0; tokens * shape.heads]);
            let log = Some(log_sum_exp.as_mut_slice());
            forward_with(level, shape, bounds, [q, k, v], Some(dropout), &mut out, log);
            (out, log_sum_exp)
        };
    let dropout = Dropout {
        probability: 0.4,
        key: 77,
        site: 5,
        sequences: &[3, 9],
    };
    // Several blocks of keys forward; few elements for the differences.
    let (shape, bounds) = (heads(6, 2, 20), [0, 130, 200]);
    let [q, k, v] = inputs(&shape, 200);
    let want = oracle_with_dropout(&shape, &bounds, [&q, &k, &v], &dropout);
    for level in available() {
        assert_close(&forward(level, &shape, &bounds, [&q, &k, &v], &dropout).0, &want, 2e-6);
    }
    let (shape, bounds) = (heads(4, 2, 3), [0, 5, 9]);
    let [q, k, v] = inputs(&shape, 9);
    let d_out = random(q.len(), 4);
    let loss = |q: &[f32], k: &[f32], v: &[f32]| {
        weighted_sum(&d_out, &oracle_with_dropout(&shape, &bounds, [q, k, v], &dropout))
    };
    let want = [
        numeric_gradient(&q, 1e-2, |q| loss(q, &k, &v)),
        numeric_gradient(&k, 1e-2, |k| loss(&q, k, &v)),
        numeric_gradient(&v, 1e-2, |v| loss(&q, &k, v)),
    ];
    for level in available() {
        let (out, log_sum_exp) = forward(level, &shape, &bounds, [&q, &k, &v], &dropout);
        let saved = AttentionSaved {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            log_sum_exp: &log_sum_exp,
        };
        let mut got = [
            vec![f32::NAN; q.len()],
            vec![f32::NAN; k.len()],
            vec![f32::NAN; v.len()],
        ];
        let [dq, dk, dv] = &mut got;
        backward_with(level, &shape, &bounds, &saved, Some(&dropout), &d_out, [dq, dk, dv]);
        for (got, want) in got.iter().zip(&want) {
            assert_close(got, want, 1e-3);
        }
    }
}

#[test]
fn gradients_of_long_sequences_agree_with_the_definition() {
    // The gradient of one weighted sum, written out as in a textbook: several blocks of rows and of keys.
    let shape = heads(3, 1, 20);
    let tokens = 150;
    let [q, k, v] = inputs(&shape, tokens);
    let d_out = random(q.len(), 4);
    let (dim, width) = (shape.head_dim, shape.query_width());
    let mut want = [vec![0.0f64; q.len()], vec![0.0f64; k.len()], vec![0.0f64; v.len()]];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    for token in 0..tokens {
        for head in 0..shape.heads {
            let at = token * width + head * dim;
            let (query, upstream) = (&q[at..at + dim], &d_out[at..at + dim]);
            let rows = |data: &'_ [f32], j: usize| data[j * dim..(j + 1) * dim].to_vec();
            let scores: Vec<f64> = (0..=token)
                .map(|j| (dot(query, &rows(&k, j)) * f64::from(shape.scale)).exp())
                .collect();
            let total: f64 = scores.iter().sum();
            let weights: Vec<f64> = scores.iter().map(|score| score / total).collect();
            let slopes: Vec<f64> = (0..=token).map(|j| dot(upstream, &rows(&v, j))).collect();
            let mean: f64 = weights.iter().zip(&slopes).map(|(w, s)| w * s).sum();
            for j in 0..=token {
                let d_score = weights[j] * (slopes[j] - mean) * f64::from(shape.scale);
                for i in 0..dim {
                    want[0][at + i] += d_score * f64::from(k[j * dim + i]);
                    want[1][j * dim + i] += d_score * f64::from(query[i]);
                    want[2][j * dim + i] += weights[j] * f64::from(upstream[i]);
                }
            }
        }
    }
    for level in available() {
        let got = backward_of(level, &shape, &[0, tokens], [&q, &k, &v], &d_out);
        for (got, want) in got.iter().zip(&want) {
            assert_close(got, &want.iter().map(|x| *x as f32).collect::<Vec<_>>(), 1e-5);
        }
    }
}

#[test]
#[should_panic(expected = "do not cover 3 tokens")]
fn lengths_that_do_not_cover_the_tokens_are_refused() {
    let data = [0.0; 3];
    attention_forward(
        &heads(1, 1, 1),
        &[0, 2],
        [&data, &data, &data],
        None,
        &mut [0.0; 3],
        None,
    );
}
