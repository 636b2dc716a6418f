//! The data of each benchmark, and the call that is measured.

use half::{bf16, f16};

use super::{Benchmark, Variant};
use crate::{
    AdamWStep, AttentionHeads, AttentionMask, AttentionSaved, HeadGradients, MatrixRef, RotaryLayout, RotaryTable,
    WeightFormat, Weights,
};

type Run = Box<dyn FnMut()>;

/// Values from -1 to 1, none of them denormal.
fn values(length: usize) -> Vec<f32> {
    (0..length)
        .map(|i| ((i * 7919 % 2003) as f32 - 1001.5) / 1002.0)
        .collect()
}

fn rows(benchmark: &Benchmark) -> [usize; 2] {
    [benchmark.shape[0], benchmark.shape[1]]
}

fn elements(benchmark: &Benchmark) -> usize {
    benchmark.shape.iter().product()
}

pub(super) fn matmul(benchmark: &Benchmark, variant: Variant) -> Run {
    let &[m, k, n] = benchmark.shape else {
        return Box::new(|| {});
    };
    let (a, b, mut out) = (values(m * k), values(k * n), vec![0.0; m * n]);
    let mut run = move |a: MatrixRef<'_>, b: MatrixRef<'_>| match variant {
        Variant::Level(level) => crate::matmul::widened(level, a, b, false, &mut out),
        Variant::Pairs(pairs) => pairs.product(a, b, false, &mut out),
    };
    match benchmark.dtype {
        "bf16" => {
            let [a, b] = [a, b].map(|x| x.into_iter().map(bf16::from_f32).collect::<Vec<_>>());
            Box::new(move || run(MatrixRef::bf16(&a, m, k), MatrixRef::bf16(&b, k, n)))
        }
        "f16" => {
            let [a, b] = [a, b].map(|x| x.into_iter().map(f16::from_f32).collect::<Vec<_>>());
            Box::new(move || run(MatrixRef::f16(&a, m, k), MatrixRef::f16(&b, k, n)))
        }
        _ => Box::new(move || run(MatrixRef::new(&a, m, k), MatrixRef::new(&b, k, n))),
    }
}

pub(super) fn linear(benchmark: &Benchmark, _: Variant) -> Run {
    let &[m, columns, rows] = benchmark.shape else {
        return Box::new(|| {});
    };
    let dense = values(rows * columns).into_iter();
    let quantized = |format| (format, blocks(format, rows * columns));
    let (format, data): (_, Vec<u8>) = match benchmark.dtype {
        "bf16" => {
            let bytes = dense.flat_map(|value| bf16::from_f32(value).to_le_bytes());
            (WeightFormat::BF16, bytes.collect())
        }
        "f16" => {
            let bytes = dense.flat_map(|value| f16::from_f32(value).to_le_bytes());
            (WeightFormat::F16, bytes.collect())
        }
        "q4_0" => quantized(WeightFormat::Q4_0),
        "q4_1" => quantized(WeightFormat::Q4_1),
        "q8_0" => quantized(WeightFormat::Q8_0),
        "q4_k" => quantized(WeightFormat::Q4K),
        "q6_k" => quantized(WeightFormat::Q6K),
        _ => (WeightFormat::F32, dense.flat_map(f32::to_le_bytes).collect()),
    };
    let (x, mut out) = (values(m * columns), vec![0.0; m * rows]);
    Box::new(move || {
        let weights = Weights {
            format,
            data: &data,
            rows,
            columns,
        };
        crate::linear(&x, weights, None, &mut out);
    })
}

/// Blocks of a quantised format: bytes that are small finite numbers as scales.
fn blocks(format: WeightFormat, elements: usize) -> Vec<u8> {
    let length = elements / format.block_elements() * format.block_bytes();
    (0..length).map(|i| (i * 31 % 61) as u8).collect()
}

fn heads(benchmark: &Benchmark) -> AttentionHeads<'static> {
    AttentionHeads {
        heads: benchmark.shape[1],
        key_value_heads: benchmark.shape[1],
        head_dim: benchmark.shape[2],
        scale: 0.125,
        mask: AttentionMask::default(),
    }
}

pub(super) fn attention_forward(benchmark: &Benchmark, _: Variant) -> Run {
    let (heads, tokens, x) = (heads(benchmark), benchmark.shape[0], values(elements(benchmark)));
    let mut out = vec![0.0; x.len()];
    Box::new(move || crate::attention_forward(&heads, &[0, tokens], [&x, &x, &x], None, &mut out, None))
}

pub(super) fn attention_backward(benchmark: &Benchmark, _: Variant) -> Run {
    let (heads, tokens, x) = (heads(benchmark), benchmark.shape[0], values(elements(benchmark)));
    let (mut out, mut log_sum_exp) = (vec![0.0; x.len()], vec![0.0; tokens * heads.heads]);
    crate::attention_forward(
        &heads,
        &[0, tokens],
        [&x, &x, &x],
        None,
        &mut out,
        Some(&mut log_sum_exp),
    );
    let mut gradients = [0; 3].map(|_| vec![0.0; x.len()]);
    Box::new(move || {
        let saved = AttentionSaved {
            q: &x,
            k: &x,
            v: &x,
            out: &out,
            log_sum_exp: &log_sum_exp,
        };
        let gradients = gradients.each_mut().map(Vec::as_mut_slice);
        crate::attention_backward(&heads, &[0, tokens], &saved, None, &x, gradients);
    })
}

pub(super) fn cross_entropy_head(benchmark: &Benchmark, _: Variant) -> Run {
    let (tokens, width, vocabulary) = (benchmark.shape[0], benchmark.shape[1], benchmark.shape[2]);
    let (hidden, weight) = (values(tokens * width), values(vocabulary * width));
    let (targets, token_weights): (Vec<i64>, _) = ((0..tokens as i64).collect(), vec![1.0; tokens]);
    let mut losses = vec![0.0; tokens];
    let (mut d_hidden, mut d_weight) = (vec![0.0; hidden.len()], vec![0.0; weight.len()]);
    Box::new(move || {
        let gradients = HeadGradients {
            d_hidden: &mut d_hidden,
            d_weight: Some(&mut d_weight),
            d_bias: None,
        };
        let gradients = Some(gradients);
        crate::cross_entropy_head(
            MatrixRef::new(&hidden, tokens, width),
            MatrixRef::new(&weight, vocabulary, width).into(),
            &targets,
            &token_weights,
            &mut losses,
            gradients,
        );
    })
}

pub(super) fn layer_norm(benchmark: &Benchmark, _: Variant) -> Run {
    let [count, width] = rows(benchmark);
    let (x, weight, mut out) = (values(count * width), values(width), vec![0.0; count * width]);
    Box::new(move || crate::layer_norm(&x, &weight, Some(&weight), 1e-5, &mut out, None))
}

pub(super) fn layer_norm_backward(benchmark: &Benchmark, _: Variant) -> Run {
    let [count, width] = rows(benchmark);
    let (x, weight, mut dx) = (values(count * width), values(width), vec![0.0; count * width]);
    let (mean, rstd) = (vec![0.0; count], vec![1.0; count]);
    let (mut d_weight, mut d_bias) = (vec![0.0; width], vec![0.0; width]);
    Box::new(move || {
        let d_bias = Some(d_bias.as_mut_slice());
        crate::layer_norm_backward(&x, &x, &weight, &mean, &rstd, &mut dx, &mut d_weight, d_bias);
    })
}

pub(super) fn rms_norm(benchmark: &Benchmark, _: Variant) -> Run {
    let [count, width] = rows(benchmark);
    let (x, weight, mut out) = (values(count * width), values(width), vec![0.0; count * width]);
    Box::new(move || crate::rms_norm(&x, &weight, 1e-5, &mut out, None))
}

pub(super) fn gelu_tanh(benchmark: &Benchmark, _: Variant) -> Run {
    let (x, mut out) = (values(elements(benchmark)), vec![0.0; elements(benchmark)]);
    Box::new(move || crate::gelu_tanh(&x, &mut out))
}

pub(super) fn gelu_tanh_backward(benchmark: &Benchmark, _: Variant) -> Run {
    let (x, mut dx) = (values(elements(benchmark)), vec![0.0; elements(benchmark)]);
    Box::new(move || crate::gelu_tanh_backward(&x, &x, &mut dx))
}

pub(super) fn silu_gate(benchmark: &Benchmark, _: Variant) -> Run {
    let (x, mut out) = (values(elements(benchmark)), vec![0.0; elements(benchmark)]);
    let up = x.clone();
    Box::new(move || crate::silu_gate(&x, &up, &mut out))
}

pub(super) fn silu_gate_backward(benchmark: &Benchmark, _: Variant) -> Run {
    let dy = values(elements(benchmark));
    let (gate, up) = (dy.clone(), dy.clone());
    let (mut d_gate, mut d_up) = (vec![0.0; dy.len()], vec![0.0; dy.len()]);
    Box::new(move || crate::silu_gate_backward(&dy, &gate, &up, &mut d_gate, &mut d_up))
}

pub(super) fn rotary(benchmark: &Benchmark, _: Variant) -> Run {
    let (tokens, head_dim) = (benchmark.shape[0], benchmark.shape[2]);
    let mut x = values(elements(benchmark));
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let angles = (0..tokens * head_dim / 2).map(|i| i as f32 * 0.01);
    let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
    Box::new(move || {
        let table = RotaryTable {
            cos: &cos,
            sin: &sin,
            rotary_dim: head_dim,
        };
        crate::rotary(&mut x, head_dim, &positions, table, RotaryLayout::HalfSplit, false);
    })
}

pub(super) fn embedding_scatter_add(benchmark: &Benchmark, _: Variant) -> Run {
    const VOCABULARY: usize = 8192;
    let [count, width] = rows(benchmark);
    let (dy, mut table) = (values(count * width), vec![0.0; VOCABULARY * width]);
    let ids: Vec<u32> = (0..count).map(|i| (i * 7919 % VOCABULARY) as u32).collect();
    Box::new(move || crate::embedding_scatter_add(&dy, &ids, width, &mut table))
}

pub(super) fn adamw(benchmark: &Benchmark, _: Variant) -> Run {
    let g = values(elements(benchmark));
    let (mut p, mut m) = (g.clone(), g.clone());
    let mut v: Vec<f32> = g.iter().map(|g| g * g).collect();
    let step = AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        gradient_scale: 1.0,
    };
    Box::new(move || crate::adamw(&mut p, &mut m, &mut v, &g, &step))
}

pub(super) fn sum_of_squares(benchmark: &Benchmark, _: Variant) -> Run {
    let x = values(elements(benchmark));
    Box::new(move || {
        std::hint::black_box(crate::sum_of_squares(&x));
    })
}

pub(super) fn f32_to_bf16(benchmark: &Benchmark, _: Variant) -> Run {
    let (x, mut out) = (values(elements(benchmark)), vec![bf16::ZERO; elements(benchmark)]);
    Box::new(move || crate::f32_to_bf16(&x, &mut out))
}
