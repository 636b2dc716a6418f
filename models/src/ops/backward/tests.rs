//! Every backward against candle's own differentiation of a plain composition.

use candle_core::{DType, Device, Tensor, Var};
use candle_kernels_cpu::{AttentionMask, BlockLayout};
use std::sync::Arc;

use super::accumulate::add_elsewhere;
use super::attention::forward_elsewhere as attention_elsewhere;
use super::{Matrix, NormWeights, OutputGradient, composed, linear};
use crate::config::{Activation, Norm};
use crate::error::Result;
use crate::ops::attention::{AttentionShape, CachedSequence};
use crate::ops::{activation, attention, norm};

fn random(shape: &[usize]) -> Var {
    Var::from_tensor(&Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()).unwrap()
}

/// Gradients of `(y * dy).sum()`.
fn differentiate(y: &Tensor, dy: &Tensor, variables: &[&Var]) -> Vec<Tensor> {
    let gradients = (y * dy).unwrap().sum_all().unwrap().backward().unwrap();
    variables
        .iter()
        .map(|variable| gradients.get(variable).unwrap().clone())
        .collect()
}

fn assert_near(actual: &Tensor, expected: &Tensor) {
    assert_eq!(actual.dims(), expected.dims());
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (actual, expected) = (flat(actual), flat(expected));
    let largest = expected.iter().map(|x| x.abs()).fold(1e-3, f32::max);
    for (index, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!((a - e).abs() < 2e-5 * largest, "element {index}: {a} instead of {e}");
    }
}

/// A gradient that is not rounded.
fn exact(dy: &Tensor) -> OutputGradient<'_> {
    OutputGradient { exact: dy, rounded: dy }
}

#[test]
fn norms() {
    let (x, weight, bias, dy) = (random(&[5, 17]), random(&[17]), random(&[17]), random(&[5, 17]));
    let y = norm::composed(&x, Norm::Layer, &weight, Some(&bias), 1e-5).unwrap();
    let expected = differentiate(&y, &dy, &[&x, &weight, &bias]);
    let (dx, dweight, dbias) = composed::layer_norm(&x, &weight, &dy, 1e-5).unwrap();
    [dx, dweight, dbias]
        .iter()
        .zip(&expected)
        .for_each(|(a, e)| assert_near(a, e));
    let y = norm::composed(&x, Norm::Rms, &weight, None, 1e-5).unwrap();
    let expected = differentiate(&y, &dy, &[&x, &weight]);
    let (dx, dweight) = composed::rms_norm(&x, &weight, &dy, 1e-5).unwrap();
    [dx, dweight].iter().zip(&expected).for_each(|(a, e)| assert_near(a, e));
}

#[test]
fn norms_in_place() {
    for kind in [Norm::Layer, Norm::Rms] {
        let (x, weight, bias, dy) = (random(&[70, 17]), random(&[17]), random(&[17]), random(&[70, 17]));
        let bias = (kind == Norm::Layer).then_some(&bias);
        let y = norm::composed(&x, kind, &weight, bias.map(|bias| bias.as_tensor()), 1e-5).unwrap();
        let mut expected = differentiate(&y, &dy, &[&x, &weight]);
        expected.extend(bias.map(|bias| differentiate(&y, &dy, &[bias]).remove(0)));
        // Everything is added to what is there already.
        let before = |x: &Tensor| random(x.dims()).as_tensor().copy().unwrap();
        let sums: Vec<Tensor> = expected.iter().map(before).collect();
        let started: Vec<Tensor> = sums.iter().map(|sum| sum.copy().unwrap()).collect();
        let weights = NormWeights {
            kind,
            epsilon: 1e-5,
            weight: &weight,
            bias: bias.map(|bias| bias.as_tensor()),
            dweight: Some(&sums[1]),
            dbias: sums.get(2),
        };
        let normed = weights.forward(&x).unwrap();
        assert_near(&normed.output, &y);
        weights.backward(&normed, &x, &dy, &sums[0]).unwrap();
        for ((sum, started), expected) in sums.iter().zip(&started).zip(&expected) {
            assert_near(&(sum - started).unwrap(), expected);
        }
        let frozen = NormWeights {
            dweight: None,
            dbias: None,
            ..weights
        };
        frozen.backward(&normed, &x, &dy, &started[0]).unwrap();
        assert_near(&started[0], &sums[0]);
    }
}

#[test]
fn projections_of_a_part_of_a_matrix() {
    let (x, weight, dy) = (random(&[9, 11]), random(&[20, 11]), random(&[9, 7]));
    let part = weight.narrow(0, 5, 7).unwrap();
    let expected = differentiate(&x.matmul(&part.t().unwrap()).unwrap(), &dy, &[&x, &weight]);
    let (dweight, dbias) = (
        weight.zeros_like().unwrap(),
        weight.narrow(1, 0, 1).unwrap().squeeze(1).unwrap(),
    );
    let dbias = dbias.zeros_like().unwrap();
    let matrix = Matrix {
        weight: &weight,
        rows: 5..12,
        dweight: Some(&dweight),
        dbias: Some(&dbias),
    };
    let y = super::linear_forward(&matrix, None, &x).unwrap();
    assert_near(&y, &x.matmul(&part.t().unwrap()).unwrap());
    let bias = random(&[20]);
    let biased = y.broadcast_add(&bias.narrow(0, 5, 7).unwrap()).unwrap();
    assert_near(&super::linear_forward(&matrix, Some(&bias), &x).unwrap(), &biased);
    let dx = super::linear_backward(&matrix, &x, exact(&dy), None).unwrap();
    assert_near(&dx, &expected[0]);
    assert_near(&dweight, &expected[1]);
    assert_near(&dbias.narrow(0, 5, 7).unwrap(), &dy.sum(0).unwrap());
    assert_near(
        &dbias.narrow(0, 0, 5).unwrap(),
        &Tensor::zeros(5, DType::F32, &Device::Cpu).unwrap(),
    );
    let twice = super::linear_backward(&matrix, &x, exact(&dy), Some(dx.copy().unwrap())).unwrap();
    assert_near(&twice, &(dx * 2.0).unwrap());
}

#[test]
fn rows_of_a_table() {
    let (table, dy) = (random(&[6, 5]), random(&[4, 5]));
    let ids = [3, 0, 3, 5];
    let rows = super::gather_rows(&table, &ids).unwrap();
    let ids_tensor = Tensor::new(&ids, &Device::Cpu).unwrap();
    let y = table.index_select(&ids_tensor, 0).unwrap();
    assert_near(&rows, &y);
    let expected = differentiate(&y, &dy, &[&table]);
    let dtable = table.zeros_like().unwrap();
    super::embedding_backward(&ids, &dy, &dtable).unwrap();
    assert_near(&dtable, &expected[0]);
    assert_near(&composed::embedding(&ids, &dy, 6).unwrap(), &expected[0]);
}

#[test]
fn activations() {
    for kind in [Activation::GeluTanh, Activation::GeluErf, Activation::Silu] {
        let (gate, up, dy) = (random(&[5, 17]), random(&[5, 17]), random(&[5, 17]));
        let expected = differentiate(&activation::composed(&up, kind).unwrap(), &dy, &[&up]);
        assert_near(&super::activate_backward(kind, None, &up, &dy).unwrap().1, &expected[0]);
        let y = (activation::composed(&gate, kind).unwrap() * &*up).unwrap();
        let expected = differentiate(&y, &dy, &[&gate, &up]);
        let (dgate, dup) = super::activate_backward(kind, Some(&gate), &up, &dy).unwrap();
        assert_near(&dgate.unwrap(), &expected[0]);
        assert_near(&dup, &expected[1]);
    }
}

#[test]
fn attention_of_packed_sequences() {
    packed_sequences(AttentionMask::default());
    packed_sequences(AttentionMask {
        window: Some(3),
        layouts: &[],
    });
    let layout = |rows: [&[u32]; 4]| Some(Arc::new(BlockLayout::new(3, rows)));
    let first = layout([&[0], &[0], &[1, 2], &[0, 2, 3]]);
    let layouts = [first.clone(), first, layout([&[0], &[1], &[0], &[1]]), None];
    packed_sequences(AttentionMask {
        window: None,
        layouts: &layouts,
    });
}

/// The kernels and the composition against candle's differentiation.
fn packed_sequences(mask: AttentionMask<'_>) {
    let shape = AttentionShape {
        heads: 4,
        key_value_heads: 2,
        head_dim: 6,
        scale: 0.4,
        mask,
    };
    let bounds = [0, 7, 8, 19];
    let (q, k, v, dy) = (
        random(&[19, 24]),
        random(&[19, 12]),
        random(&[19, 12]),
        random(&[19, 24]),
    );
    let sequences: Vec<_> = bounds
        .windows(2)
        .map(|bound| CachedSequence {
            rows: bound[0]..bound[1],
            keys: k.narrow(0, bound[0], bound[1] - bound[0]).unwrap(),
            values: v.narrow(0, bound[0], bound[1] - bound[0]).unwrap(),
        })
        .collect();
    let y = attention::composed(&q, &sequences, &shape).unwrap();
    let expected = differentiate(&y, &dy, &[&q, &k, &v]);
    let copy = |x: &Var| x.as_tensor().copy().unwrap();
    let tape = super::attention_forward(copy(&q), copy(&k), copy(&v), &bounds, &shape, None).unwrap();
    assert_near(&tape.output, &y);
    let (dq, dk, dv) = super::attention_backward(tape, &dy, &bounds, &shape, None).unwrap();
    [dq, dk, dv].iter().zip(&expected).for_each(|(a, e)| assert_near(a, e));
    let (dq, dk, dv) = composed::attention((&q, &k, &v), &dy, &bounds, &shape).unwrap();
    [dq, dk, dv].iter().zip(&expected).for_each(|(a, e)| assert_near(a, e));
}

#[test]
fn head_with_cross_entropy() {
    // More rows than one block.
    let (rows, width, vocabulary) = (300, 7, 61);
    let (x, weight, bias) = (
        random(&[rows, width]),
        random(&[vocabulary, width]),
        random(&[vocabulary]),
    );
    let targets: Vec<u32> = (0..rows as u32).map(|row| row * 17 % vocabulary as u32).collect();
    let factors: Vec<f32> = (0..rows).map(|row| (row % 3) as f32 * 0.5).collect();
    let logits = x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(&bias).unwrap();
    let targets_tensor = Tensor::new(targets.as_slice(), &Device::Cpu)
        .unwrap()
        .unsqueeze(1)
        .unwrap();
    let exponentials = logits.exp().unwrap();
    let losses = (exponentials.sum_keepdim(1).unwrap().log().unwrap() - logits.gather(&targets_tensor, 1).unwrap())
        .unwrap()
        .squeeze(1)
        .unwrap();
    let factors_tensor = Tensor::new(factors.as_slice(), &Device::Cpu).unwrap();
    let expected = differentiate(&losses, &factors_tensor, &[&x, &weight, &bias]);
    let (dweight, dbias) = (weight.zeros_like().unwrap(), bias.zeros_like().unwrap());
    let matrix = Matrix {
        weight: &weight,
        rows: 0..vocabulary,
        dweight: Some(&dweight),
        dbias: Some(&dbias),
    };
    let (own, dx, _) = super::cross_entropy_head(&x, &matrix, Some(&bias), &targets, &factors).unwrap();
    assert_near(&Tensor::new(own, &Device::Cpu).unwrap(), &losses);
    let composed = composed::cross_entropy_head(&x, &weight, Some(&bias), &targets, &factors).unwrap();
    let composed = [&composed.dx, &composed.dweight, &composed.dbias];
    for ((found, composed), expected) in [&dx, &dweight, &dbias].into_iter().zip(composed).zip(&expected) {
        assert_near(found, expected);
        assert_near(composed, expected);
    }
}

/// What other devices run does on the CPU what the kernels do.
#[test]
fn plain_operations_do_what_the_kernels_do() {
    let zeros = |x: &Tensor| x.zeros_like().unwrap();
    let (x, weight, dy) = (random(&[9, 11]), random(&[20, 11]), random(&[9, 7]));
    let run = |backward: fn(&Matrix<'_>, &Tensor, OutputGradient<'_>, Option<Tensor>) -> Result<Tensor>| {
        let (dweight, dbias) = (zeros(&weight), Tensor::zeros(20, DType::F32, &Device::Cpu).unwrap());
        let matrix = Matrix {
            weight: &weight,
            rows: 5..12,
            dweight: Some(&dweight),
            dbias: Some(&dbias),
        };
        let dx = backward(&matrix, &x, exact(&dy), Some(x.copy().unwrap())).unwrap();
        [dx, dweight, dbias]
    };
    run(linear::on_cpu)
        .iter()
        .zip(&run(linear::elsewhere))
        .for_each(|(a, e)| assert_near(a, e));

    let (weight, bias, dy) = (random(&[11]), random(&[11]), random(&[9, 11]));
    let run = |kernels: bool| {
        let sums = [zeros(&x), zeros(&weight), zeros(&bias)];
        let [dx, dweight, dbias] = &sums;
        let (dweight, dbias) = (Some(dweight), Some(dbias));
        let norm = NormWeights {
            kind: Norm::Layer,
            epsilon: 1e-5,
            weight: &weight,
            bias: Some(&bias),
            dweight,
            dbias,
        };
        match kernels {
            true => norm.backward(&norm.forward(&x).unwrap(), &x, &dy, dx).unwrap(),
            false => norm.backward_elsewhere(&x, &dy, dx).unwrap(),
        }
        sums
    };
    run(true).iter().zip(&run(false)).for_each(|(a, e)| assert_near(a, e));

    let shape = AttentionShape {
        heads: 4,
        key_value_heads: 2,
        head_dim: 6,
        scale: 0.4,
        mask: AttentionMask::default(),
    };
    let (q, k, v) = (random(&[9, 24]), random(&[9, 12]), random(&[9, 12]));
    let plain = attention_elsewhere(&q, &k, &v, &[0, 4, 9], &shape).unwrap();
    let copy = |x: &Var| x.as_tensor().copy().unwrap();
    let tape = super::attention_forward(copy(&q), copy(&k), copy(&v), &[0, 4, 9], &shape, None).unwrap();
    assert_near(&plain, &tape.output);

    let (sum, delta) = (random(&[6, 5]), random(&[2, 5]));
    let expected = (sum.narrow(0, 3, 2).unwrap() + &*delta).unwrap();
    let untouched = sum.narrow(0, 0, 3).unwrap().copy().unwrap();
    add_elsewhere(&sum.narrow(0, 3, 2).unwrap(), &delta).unwrap();
    assert_near(&sum.narrow(0, 3, 2).unwrap(), &expected);
    assert_near(&sum.narrow(0, 0, 3).unwrap(), &untouched);
}
