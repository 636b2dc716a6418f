//! Speed of the kernels at the shapes of GPT-2 and SmolLM2: `cargo bench -p candle-kernels-cpu [-- FILTER]`.
//!
//! Prints the best of several runs. The level is the process's; run it again with `COMPUTE_SERVER_SIMD=avx2` or
//! `portable` to compare, and with `KERNEL_THREADS` for another number of threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_kernels_cpu::{
    AdamWStep, AttentionHeads, AttentionMask, AttentionSaved, CacheType, CachedSequence, HeadGradients, MatrixRef,
    PageLayout, WeightFormat, Weights, adamw, attention_backward, attention_decode, attention_forward,
    cross_entropy_head, dequantize, gelu_tanh, layer_norm, linear, matmul, rms_norm, silu_gate, simd, threads,
};
use half::{bf16, f16};

/// Seconds of the fastest run, of as many as fit into a moment.
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    let mut runs = 0;
    while runs < 5 || begin.elapsed() < Duration::from_millis(400) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

struct Bench {
    filter: Option<String>,
}

impl Bench {
    /// Whether the filter lets the name through.
    fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter))
    }

    /// Prints the time of `run` and its rate for the given number of operations or bytes.
    fn report(&self, name: &str, amount: f64, unit: &str, run: impl FnMut()) {
        if !self.wants(name) {
            return;
        }
        let seconds = best(run);
        println!(
            "{name:<44} {:>10.1} us {:>8.1} G{unit}/s",
            seconds * 1e6,
            amount / seconds / 1e9
        );
    }
}

fn values(length: usize) -> Vec<f32> {
    (0..length)
        .map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 1001.0)
        .collect()
}

/// Bytes whose scales, as f16, are small finite numbers.
fn weight_bytes(format: WeightFormat, rows: usize, columns: usize) -> Vec<u8> {
    let length = rows * columns / format.block_elements() * format.block_bytes();
    let dense = values(rows * columns).into_iter();
    // Arbitrary bytes would be full of denormal numbers, which are slow.
    match format {
        WeightFormat::F32 => dense.flat_map(f32::to_le_bytes).collect(),
        WeightFormat::F16 => dense.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
        WeightFormat::BF16 => dense.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => (0..length).map(|i| (i * 31 % 61) as u8).collect(),
    }
}

fn linears(bench: &Bench) {
    let shapes = [
        (WeightFormat::Q4_1, 1536, 576),
        (WeightFormat::Q4_1, 49152, 576),
        (WeightFormat::Q4_0, 49152, 576),
        (WeightFormat::Q8_0, 49152, 576),
        (WeightFormat::Q4K, 49152, 768),
        (WeightFormat::Q6K, 49152, 768),
        (WeightFormat::Q2K, 49152, 768),
        (WeightFormat::Q5_1, 49152, 576),
        (WeightFormat::F32, 50257, 768),
        (WeightFormat::F16, 50257, 768),
        (WeightFormat::BF16, 50257, 768),
        (WeightFormat::F32, 768, 768),
    ];
    for (format, n, k) in shapes {
        if ![1, 2, 4, 8]
            .iter()
            .any(|m| bench.wants(&format!("linear {format:?} {m}x{k}x{n}")))
        {
            continue;
        }
        let data = weight_bytes(format, n, k);
        let weights = Weights {
            format,
            data: &data,
            rows: n,
            columns: k,
        };
        for m in [1, 2, 4, 8] {
            let (x, mut out) = (values(m * k), vec![0.0; m * n]);
            let name = format!("linear {format:?} {m}x{k}x{n}");
            bench.report(&name, data.len() as f64, "B", || {
                linear(black_box(&x), weights, None, &mut out)
            });
        }
    }
    for (format, m, k, n) in [
        (WeightFormat::F32, 1024, 768, 3072),
        (WeightFormat::F32, 256, 3072, 768),
        (WeightFormat::F32, 64, 768, 768),
        (WeightFormat::Q4_1, 512, 576, 1536),
        (WeightFormat::Q4_1, 32, 576, 1536),
    ] {
        let data = weight_bytes(format, n, k);
        let weights = Weights {
            format,
            data: &data,
            rows: n,
            columns: k,
        };
        let (x, mut out) = (values(m * k), vec![0.0; m * n]);
        let name = format!("linear {format:?} {m}x{k}x{n}");
        bench.report(&name, 2.0 * (m * k * n) as f64, "FLOP", || {
            linear(black_box(&x), weights, None, &mut out)
        });
    }
}

fn matrix_products(bench: &Bench) {
    for (m, k, n) in [
        (64, 768, 768),
        (1024, 768, 768),
        (1024, 768, 2304),
        (1024, 768, 3072),
        (1024, 3072, 768),
        (256, 768, 50257),
    ] {
        let (a, b, mut out) = (values(m * k), values(k * n), vec![0.0; m * n]);
        let amount = 2.0 * (m * k * n) as f64;
        let (left, right) = (MatrixRef::new(&a, m, k), MatrixRef::new(&b, k, n));
        bench.report(&format!("matmul {m}x{k}x{n}"), amount, "FLOP", || {
            matmul(left, right, false, &mut out)
        });
        let right = MatrixRef::new(&b, n, k).transpose();
        bench.report(&format!("matmul x*W^T {m}x{k}x{n}"), amount, "FLOP", || {
            matmul(left, right, false, &mut out)
        });
        let left = MatrixRef::new(&a, k, m).transpose();
        let right = MatrixRef::new(&b, k, n);
        bench.report(&format!("matmul dW+=dy^T*x {m}x{k}x{n}"), amount, "FLOP", || {
            matmul(left, right, true, &mut out)
        });
    }
}

fn elementwise(bench: &Bench) {
    let (rows, width) = (1024, 3072);
    let (x, y, mut out) = (values(rows * width), values(rows * width), vec![0.0; rows * width]);
    let bytes = (rows * width * 4) as f64;
    bench.report("gelu_tanh 1024x3072", 2.0 * bytes, "B", || {
        gelu_tanh(black_box(&x), &mut out)
    });
    bench.report("silu_gate 1024x3072", 3.0 * bytes, "B", || {
        silu_gate(black_box(&x), &y, &mut out)
    });
    let weight = values(768);
    let (x, out) = (&x[..1024 * 768], &mut out[..1024 * 768]);
    let bytes = (1024 * 768 * 4) as f64;
    bench.report("layer_norm 1024x768", 2.0 * bytes, "B", || {
        layer_norm(x, &weight, Some(&weight), 1e-5, out, None)
    });
    bench.report("rms_norm 1x768", 2.0 * 768.0 * 4.0, "B", || {
        rms_norm(&x[..768], &weight, 1e-5, &mut out[..768], None);
    });
    let format = WeightFormat::Q4_1;
    let (data, mut dense) = (weight_bytes(format, 1536, 576), vec![0.0; 1536 * 576]);
    bench.report("dequantize Q4_1 1536x576", data.len() as f64, "B", || {
        dequantize(format, &data, &mut dense)
    });
    let length = 10_000_000;
    let (mut p, mut m, mut v, g) = (values(length), vec![0.0; length], vec![0.0; length], values(length));
    let step = AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        gradient_scale: 1.0,
    };
    bench.report("adamw 10M", 28.0 * length as f64, "B", || {
        adamw(&mut p, &mut m, &mut v, &g, &step)
    });
}

fn attention(bench: &Bench) {
    for (name, heads, key_value_heads, sequences, length) in [
        ("gpt2", 12, 12, 4, 256),
        ("gpt2", 12, 12, 1, 1024),
        ("gpt2", 12, 12, 1, 2048),
        ("smollm2", 9, 3, 1, 512),
    ] {
        let heads = AttentionHeads {
            heads,
            key_value_heads,
            head_dim: 64,
            scale: 0.125,
            mask: AttentionMask::default(),
        };
        let tokens = sequences * length;
        let bounds: Vec<usize> = (0..=sequences).map(|i| i * length).collect();
        let q = values(tokens * heads.query_width());
        let (k, v) = (
            values(tokens * heads.key_value_width()),
            values(tokens * heads.key_value_width()),
        );
        let (mut out, mut log_sum_exp) = (vec![0.0; q.len()], vec![0.0; tokens * heads.heads]);
        // Two products over half of the square.
        let flops = 2.0 * (sequences * length * length * heads.query_width()) as f64;
        bench.report(
            &format!("attention forward {name} {sequences}x{length}"),
            flops,
            "FLOP",
            || {
                attention_forward(&heads, &bounds, [&q, &k, &v], None, &mut out, Some(&mut log_sum_exp));
            },
        );
        let saved = AttentionSaved {
            q: &q,
            k: &k,
            v: &v,
            out: &out,
            log_sum_exp: &log_sum_exp,
        };
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        bench.report(
            &format!("attention backward {name} {sequences}x{length}"),
            2.5 * flops,
            "FLOP",
            || {
                attention_backward(&heads, &bounds, &saved, None, &q, [&mut dq, &mut dk, &mut dv]);
            },
        );
        for kind in [CacheType::F32, CacheType::F16, CacheType::Q8] {
            let layout = PageLayout {
                kind,
                positions: tokens,
                key_value_heads: heads.key_value_heads,
                head_dim: heads.head_dim,
            };
            let mut page = vec![0.0; layout.words()];
            layout.store(&mut page, 0, &k, &v);
            let sequence = CachedSequence {
                pages: &[&page],
                positions: tokens,
                new_tokens: 1,
            };
            let row = heads.query_width();
            bench.report(
                &format!("attention decode {name} 1 of {tokens} in {}", kind.name()),
                4.0 * page.len() as f64,
                "B",
                || {
                    attention_decode(&heads, &layout, &q[..row], &[sequence], &mut out[..row]);
                },
            );
        }
    }
}

fn head(bench: &Bench) {
    let (tokens, width, vocabulary) = (256, 768, 50257);
    let (hidden, weight) = (values(tokens * width), values(vocabulary * width));
    let targets: Vec<i64> = (0..tokens as i64).collect();
    let (token_weights, mut losses) = (vec![1.0; tokens], vec![0.0; tokens]);
    let (mut d_hidden, mut d_weight) = (vec![0.0; hidden.len()], vec![0.0; weight.len()]);
    bench.report(
        "cross_entropy_head 256x768x50257",
        6.0 * (tokens * width * vocabulary) as f64,
        "FLOP",
        || {
            let gradients = Some(HeadGradients {
                d_hidden: &mut d_hidden,
                d_weight: Some(&mut d_weight),
                d_bias: None,
            });
            cross_entropy_head(
                MatrixRef::new(&hidden, tokens, width),
                MatrixRef::new(&weight, vocabulary, width).into(),
                &targets,
                &token_weights,
                &mut losses,
                gradients,
            );
        },
    );
}

fn main() {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    if let Some(count) = std::env::var("KERNEL_THREADS")
        .ok()
        .and_then(|count| count.parse().ok())
    {
        threads::set(count);
    }
    println!("level {}, {} threads", simd::level(), threads::count());
    let bench = Bench { filter };
    linears(&bench);
    matrix_products(&bench);
    elementwise(&bench);
    attention(&bench);
    if bench.wants("cross_entropy_head") {
        head(&bench);
    }
}
