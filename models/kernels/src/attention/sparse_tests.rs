//! Bands and block layouts against the definition, in which hidden keys are left out one by one.

use super::backward::backward_with;
use super::cached::decode_with;
use super::forward::forward_with;
use super::*;
use crate::dropout::Dropout;
use crate::simd::{Level, available};
use crate::test_util::{assert_close, numeric_gradient, random, weighted_sum};
use std::sync::Arc;

/// A layout of `blocks` blocks in which a pair is present by a hash, and every block sees something.
fn layout(size: usize, blocks: usize, seed: usize) -> Option<Arc<BlockLayout>> {
    let rows: Vec<Vec<u32>> = (0..blocks)
        .map(|query| {
            let present = |key: &usize| (query * 31 + key * 17 + seed * 7) % 5 < 2;
            let keys: Vec<u32> = (0..=query).filter(present).map(|key| key as u32).collect();
            // Some rows do not see their own block.
            if keys.is_empty() { vec![query as u32 / 2] } else { keys }
        })
        .collect();
    Some(Arc::new(BlockLayout::new(size, rows.iter().map(Vec::as_slice))))
}

/// A layout in which every block sees those up to its own.
fn causal(size: usize, blocks: u32) -> Option<Arc<BlockLayout>> {
    let rows: Vec<Vec<u32>> = (0..blocks).map(|query| (0..=query).collect()).collect();
    Some(Arc::new(BlockLayout::new(size, rows.iter().map(Vec::as_slice))))
}

fn heads<'a>([heads, key_value_heads, head_dim]: [usize; 3], mask: AttentionMask<'a>) -> AttentionHeads<'a> {
    AttentionHeads {
        heads,
        key_value_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        mask,
    }
}

fn sees(mask: &AttentionMask<'_>, head: usize, query: usize, key: usize) -> bool {
    let in_block = |layout: &BlockLayout| {
        let size = layout.block_size();
        layout.keys(query / size).contains(&((key / size) as u32))
    };
    key <= query
        && query - key < mask.window.unwrap_or(usize::MAX)
        && mask.layouts.get(head).and_then(Option::as_deref).is_none_or(in_block)
}

/// Output, log-sum-exp, and the gradients by queries, keys and values, as in a textbook, in double precision.
#[allow(clippy::type_complexity)]
fn definition(
    shape: &AttentionHeads<'_>,
    bounds: &[usize],
    [q, k, v]: [&[f32]; 3],
    d_out: &[f32],
) -> ([Vec<f32>; 2], [Vec<f32>; 3]) {
    let (dim, width, kv_width) = (shape.head_dim, shape.query_width(), shape.key_value_width());
    let (mut out, mut log) = (vec![0.0; q.len()], vec![0.0; q.len() / dim]);
    let mut gradients = [vec![0.0f64; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    for bound in bounds.windows(2) {
        for token in bound[0]..bound[1] {
            for head in 0..shape.heads {
                let at = token * width + head * dim;
                let column = head / shape.group() * dim;
                let place = |key: usize| key * kv_width + column;
                let keys: Vec<usize> = (bound[0]..=token)
                    .filter(|key| sees(&shape.mask, head, token - bound[0], key - bound[0]))
                    .collect();
                let scale = f64::from(shape.scale);
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|key| (dot(&q[at..at + dim], &k[place(*key)..][..dim]) * scale).exp())
                    .collect();
                let total: f64 = scores.iter().sum();
                log[token * shape.heads + head] = total.ln() as f32;
                let slopes: Vec<f64> = keys
                    .iter()
                    .map(|key| dot(&d_out[at..at + dim], &v[place(*key)..][..dim]))
                    .collect();
                let mean: f64 = scores
                    .iter()
                    .zip(&slopes)
                    .map(|(score, slope)| score / total * slope)
                    .sum();
                for i in 0..dim {
                    let terms = keys.iter().zip(&scores);
                    out[at + i] = terms
                        .map(|(key, score)| score / total * f64::from(v[place(*key) + i]))
                        .sum::<f64>() as f32;
                    for (key, (score, slope)) in keys.iter().zip(scores.iter().zip(&slopes)) {
                        let d_score = score / total * (slope - mean) * scale;
                        gradients[0][at + i] += d_score * f64::from(k[place(*key) + i]);
                        gradients[1][place(*key) + i] += d_score * f64::from(q[at + i]);
                        gradients[2][place(*key) + i] += score / total * f64::from(d_out[at + i]);
                    }
                }
            }
        }
    }
    let narrow = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
    ([out, log], gradients.map(narrow))
}

fn inputs(shape: &AttentionHeads<'_>, tokens: usize) -> [Vec<f32>; 4] {
    let (width, kv_width) = (shape.query_width(), shape.key_value_width());
    let q = random(tokens * width, 1).iter().map(|x| 3.0 * x).collect();
    [
        q,
        random(tokens * kv_width, 2),
        random(tokens * kv_width, 3),
        random(tokens * width, 4),
    ]
}

fn run(
    level: Level,
    shape: &AttentionHeads<'_>,
    bounds: &[usize],
    [q, k, v]: [&[f32]; 3],
    d_out: &[f32],
    dropout: Option<&Dropout<'_>>,
) -> ([Vec<f32>; 2], [Vec<f32>; 3]) {
    let mut found = [vec![f32::NAN; q.len()], vec![f32::NAN; q.len() / shape.head_dim]];
    let [out, log_sum_exp] = &mut found;
    forward_with(level, shape, bounds, [q, k, v], dropout, out, Some(log_sum_exp));
    let saved = AttentionSaved {
        q,
        k,
        v,
        out,
        log_sum_exp,
    };
    let mut gradients = [q, k, v].map(|x| vec![f32::NAN; x.len()]);
    let [dq, dk, dv] = &mut gradients;
    backward_with(level, shape, bounds, &saved, dropout, d_out, [dq, dk, dv]);
    (found, gradients)
}

/// Calls `check` with masks of many kinds over sequences of up to 150 tokens.
fn for_masks(check: impl Fn(&AttentionHeads<'_>, &[usize])) {
    let bounds = [0, 1, 1, 70, 220, 223];
    let dense = &[];
    for window in [1, 2, 63, 64, 65, 100, 1000] {
        let mask = AttentionMask {
            window: Some(window),
            layouts: dense,
        };
        check(&heads([6, 2, 7], mask), &bounds);
    }
    // A single position a block, blocks that divide nothing, and one that is longer than every sequence.
    for (size, blocks) in [(1, 150), (7, 22), (16, 10), (64, 3), (100, 2), (1000, 1)] {
        let each: Vec<_> = (0..6).map(|seed| layout(size, blocks, seed)).collect();
        let same = vec![each[0].clone(); 6];
        // A dense head beside others of its group.
        let some: Vec<_> = (0..6)
            .map(|head| each[head].clone().filter(|_| head % 4 != 1))
            .collect();
        for (shape, layouts) in [
            ([6, 2, 8], &same),
            ([6, 2, 5], &each),
            ([6, 6, 3], &some),
            ([1, 1, 33], &same[..1].to_vec()),
        ] {
            check(&heads(shape, AttentionMask { window: None, layouts }), &bounds);
        }
    }
    let diagonal: Vec<Vec<u32>> = (0..10)
        .map(|query: u32| (query.saturating_sub(2)..=query).step_by(2).collect())
        .collect();
    let layout = BlockLayout::new(15, diagonal.iter().map(Vec::as_slice));
    let layouts = [None, Some(Arc::new(layout))];
    check(
        &heads(
            [2, 1, 4],
            AttentionMask {
                window: Some(20),
                layouts: &layouts,
            },
        ),
        &bounds,
    );
}

#[test]
fn forward_and_backward_agree_with_the_definition() {
    for_masks(|shape, bounds| {
        let tokens = bounds[bounds.len() - 1];
        let [q, k, v, d_out] = inputs(shape, tokens);
        let (want, want_gradients) = definition(shape, bounds, [&q, &k, &v], &d_out);
        for level in available() {
            let (got, gradients) = run(level, shape, bounds, [&q, &k, &v], &d_out, None);
            got.iter()
                .zip(&want)
                .for_each(|(got, want)| assert_close(got, want, 3e-6));
            gradients
                .iter()
                .zip(&want_gradients)
                .for_each(|(got, want)| assert_close(got, want, 2e-5));
        }
    });
}

#[test]
fn gradients_agree_with_differences() {
    let (first, second) = (layout(2, 5, 1), layout(2, 5, 2));
    let layouts = [first, second];
    for mask in [
        AttentionMask {
            window: None,
            layouts: &layouts,
        },
        AttentionMask {
            window: Some(3),
            layouts: &[],
        },
    ] {
        let (shape, bounds) = (heads([2, 1, 3], mask), [0, 9, 10]);
        let [q, k, v, d_out] = inputs(&shape, 10);
        let loss = |q: &[f32], k: &[f32], v: &[f32]| {
            weighted_sum(&d_out, &definition(&shape, &bounds, [q, k, v], &d_out).0[0])
        };
        let want = [
            numeric_gradient(&q, 1e-2, |q| loss(q, &k, &v)),
            numeric_gradient(&k, 1e-2, |k| loss(&q, k, &v)),
            numeric_gradient(&v, 1e-2, |v| loss(&q, &k, v)),
        ];
        for level in available() {
            let (_, gradients) = run(level, &shape, &bounds, [&q, &k, &v], &d_out, None);
            gradients
                .iter()
                .zip(&want)
                .for_each(|(got, want)| assert_close(got, want, 1e-3));
        }
    }
}

#[test]
fn a_layout_of_all_blocks_is_bitwise_dense() {
    for size in [16, 64, 48] {
        let layouts = vec![causal(size, 10); 6];
        let sparse = heads(
            [6, 2, 20],
            AttentionMask {
                window: None,
                layouts: &layouts,
            },
        );
        let dense = heads([6, 2, 20], AttentionMask::default());
        let bounds = [0, 150, 151];
        let [q, k, v, d_out] = inputs(&dense, 151);
        for level in available() {
            let [sparse, dense] = [&sparse, &dense].map(|shape| run(level, shape, &bounds, [&q, &k, &v], &d_out, None));
            assert_eq!(sparse.0, dense.0, "{size}");
            sparse
                .1
                .iter()
                .zip(&dense.1)
                .for_each(|(got, want)| assert_close(got, want, 1e-6));
        }
    }
}

#[test]
fn pages_give_bitwise_what_the_whole_sequence_gives() {
    for_masks(|shape, _| {
        let length = 150;
        let [q, k, v, _] = inputs(shape, length);
        let layout = PageLayout {
            kind: CacheType::F32,
            positions: 16,
            key_value_heads: shape.key_value_heads,
            head_dim: shape.head_dim,
        };
        let step = 16 * shape.key_value_width();
        let pages: Vec<Vec<f32>> = k
            .chunks(step)
            .zip(v.chunks(step))
            .map(|(k, v)| {
                let mut page = vec![f32::NAN; layout.words()];
                layout.store(&mut page, 0, k, v);
                page
            })
            .collect();
        let table: Vec<&[f32]> = pages.iter().map(Vec::as_slice).collect();
        let width = shape.query_width();
        for level in available() {
            let mut whole = vec![0.0; q.len()];
            let sequence = CachedSequence {
                pages: &table,
                positions: length,
                new_tokens: length,
            };
            decode_with(level, shape, &layout, &q, &[sequence], &mut whole);
            let mut trained = vec![0.0; q.len()];
            forward_with(level, shape, &[0, length], [&q, &k, &v], None, &mut trained, None);
            assert_close(&trained, &whole, 1e-5);
            for [start, end] in [[0, 150], [149, 150], [64, 65], [37, 130], [3, 4], [0, 1]] {
                let sequence = CachedSequence {
                    pages: &table,
                    positions: end,
                    new_tokens: end - start,
                };
                let rows = start * width..end * width;
                let mut out = vec![0.0; rows.len()];
                decode_with(level, shape, &layout, &q[rows.clone()], &[sequence], &mut out);
                assert_eq!(out, whole[rows], "{level} {start}..{end}");
            }
        }
    });
}

#[test]
fn what_is_dropped_depends_on_the_key_alone() {
    // With blocks that are all present, the masks are those of dense attention.
    let layouts = vec![causal(5, 31); 2];
    let dropout = Dropout {
        probability: 0.4,
        key: 77,
        site: 5,
        sequences: &[3, 9],
    };
    let bounds = [0, 140, 150];
    let sparse = heads(
        [2, 1, 6],
        AttentionMask {
            window: None,
            layouts: &layouts,
        },
    );
    let dense = heads([2, 1, 6], AttentionMask::default());
    let [q, k, v, d_out] = inputs(&dense, 150);
    for level in available() {
        let [sparse, dense] =
            [&sparse, &dense].map(|shape| run(level, shape, &bounds, [&q, &k, &v], &d_out, Some(&dropout)));
        sparse
            .0
            .iter()
            .zip(&dense.0)
            .for_each(|(got, want)| assert_close(got, want, 1e-6));
        sparse
            .1
            .iter()
            .zip(&dense.1)
            .for_each(|(got, want)| assert_close(got, want, 1e-5));
    }
    // Absent blocks take their masks with them: a row that sees one key only.
    let layout = BlockLayout::new(1, (0..150u32).map(|query| query / 2).collect::<Vec<_>>().chunks(1));
    let layouts = vec![Some(Arc::new(layout)); 2];
    let one = heads(
        [2, 1, 6],
        AttentionMask {
            window: None,
            layouts: &layouts,
        },
    );
    let (found, _) = run(available()[0], &one, &bounds, [&q, &k, &v], &d_out, Some(&dropout));
    for token in 0..140 {
        let masks = dropout.masks(0, 1);
        let factor = masks.factors(token as u32, (token / 2 / 64) as u32)[token / 2 % 64];
        let want: Vec<f32> = v[token / 2 * 6..][..6].iter().map(|value| value * factor).collect();
        assert_close(&found[0][token * 12 + 6..][..6], &want, 1e-6);
    }
}

#[test]
#[should_panic(expected = "a layout of 6 positions for 7")]
fn a_layout_that_is_too_short_is_refused() {
    let layout = BlockLayout::new(3, [&[0][..], &[1]]);
    let layouts = [Some(Arc::new(layout))];
    let mask = AttentionMask {
        window: None,
        layouts: &layouts,
    };
    let shape = heads([1, 1, 1], mask);
    let data = [0.0; 7];
    attention_forward(&shape, &[0, 7], [&data, &data, &data], None, &mut [0.0; 7], None);
}
