//! What a training step of GPT-2 124M spends its time on, kernel by kernel and without a server: AdamW alone, the head
//! with its cross-entropy alone, all products of matrices alone; and the same of PyTorch.

use std::time::Instant;

use candle_kernels_cpu::{AdamWStep, HeadGradients, MatrixRef, adamw, axpy, cross_entropy_head, matmul};

use crate::peer::{Peer, Program};
use crate::report::{Figure, Measurement, Measurements};

const PARAMETERS: usize = 124_439_808;
const TOKENS: usize = 1024;
const WIDTH: usize = 768;
const VOCABULARY: usize = 50257;
/// Inputs and outputs of a layer's products, and how many there are in a step.
const LAYERS: [[usize; 2]; 4] = [
    [WIDTH, 3 * WIDTH],
    [WIDTH, WIDTH],
    [WIDTH, 4 * WIDTH],
    [4 * WIDTH, WIDTH],
];
const LAYER_COUNT: usize = 12;

const ADAMW: &str = "AdamW alone, 124M parameters";
const HEAD: &str = "cross-entropy with head, 1024 x 50257, and its gradients";
const PRODUCTS: &str = "products of a training step of GPT-2 124M, 4 x 256";

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let mut list: Measurements = vec![Box::new(Optimizer::new()), Box::new(Head::new()), Box::new(Products)];
    if let Some(peer) = Peer::start(Program::PyTorch, "pytorch_parts.py", &[]) {
        list.push(Box::new(InPyTorch { peer }));
    }
    list
}

/// Values from -1 to 1.
fn values(length: usize) -> Vec<f32> {
    (0..length)
        .map(|i| ((i * 7919 % 2003) as f32 - 1001.5) / 1002.0)
        .collect()
}

fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// AdamW over all parameters, and what memory allows: 28 bytes a parameter at the rate of `x += a y`.
struct Optimizer {
    parameters: Vec<f32>,
    moments: [Vec<f32>; 2],
    gradient: Vec<f32>,
}

impl Optimizer {
    fn new() -> Self {
        let gradient = values(PARAMETERS);
        Self {
            parameters: gradient.clone(),
            moments: [vec![0.0; PARAMETERS], vec![0.0; PARAMETERS]],
            gradient,
        }
    }
}

impl Measurement for Optimizer {
    fn run(&mut self) -> Vec<Figure> {
        let step = AdamWStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 1,
            gradient_scale: 1.0,
        };
        let [first, second] = &mut self.moments;
        let time = seconds(|| adamw(&mut self.parameters, first, second, &self.gradient, &step));
        let sum = seconds(|| axpy(1e-9, &self.gradient, &mut self.parameters));
        let nanoseconds = |seconds: f64| seconds / PARAMETERS as f64 * 1e9;
        let figure = |path, value| Figure {
            subject: ADAMW,
            path,
            unit: "ns a parameter",
            value,
        };
        vec![
            figure("kernel", nanoseconds(time)),
            figure(
                "floor: 28 bytes at the rate of x += a y",
                nanoseconds(sum) * 28.0 / 12.0,
            ),
        ]
    }
}

/// The head's forward and backward pass, and its products alone.
struct Head {
    hidden: Vec<f32>,
    weight: Vec<f32>,
    d_hidden: Vec<f32>,
    d_weight: Vec<f32>,
    logits: Vec<f32>,
}

impl Head {
    fn new() -> Self {
        Self {
            hidden: values(TOKENS * WIDTH),
            weight: values(VOCABULARY * WIDTH),
            d_hidden: vec![0.0; TOKENS * WIDTH],
            d_weight: vec![0.0; VOCABULARY * WIDTH],
            logits: vec![0.0; TOKENS / 2 * VOCABULARY],
        }
    }
}

impl Measurement for Head {
    fn run(&mut self) -> Vec<Figure> {
        let targets: Vec<i64> = (0..TOKENS).map(|i| (i * 7919 % VOCABULARY) as i64).collect();
        let (token_weights, mut losses) = (vec![1.0; TOKENS], vec![0.0; TOKENS]);
        let all = seconds(|| {
            let gradients = HeadGradients {
                d_hidden: &mut self.d_hidden,
                d_weight: Some(&mut self.d_weight),
                d_bias: None,
            };
            let hidden = MatrixRef::new(&self.hidden, TOKENS, WIDTH);
            let weight = MatrixRef::new(&self.weight, VOCABULARY, WIDTH);
            let gradients = Some(gradients);
            cross_entropy_head(hidden, weight.into(), &targets, &token_weights, &mut losses, gradients);
        });
        // In two halves, as many logits as the kernel holds.
        let rows = TOKENS / 2;
        let products = 2.0
            * seconds(|| {
                let hidden = MatrixRef::new(&self.hidden[..rows * WIDTH], rows, WIDTH);
                let weight = MatrixRef::new(&self.weight, VOCABULARY, WIDTH);
                matmul(hidden, weight.transpose(), false, &mut self.logits);
                let logits = MatrixRef::new(&self.logits, rows, VOCABULARY);
                matmul(logits, weight, false, &mut self.d_hidden[..rows * WIDTH]);
                matmul(logits.transpose(), hidden, true, &mut self.d_weight);
            });
        let figure = |path, seconds| Figure {
            subject: HEAD,
            path,
            unit: "ms",
            value: seconds * 1e3,
        };
        vec![figure("kernel", all), figure("kernel, its products alone", products)]
    }
}

/// Every product of matrices of a step, forward and both of backward; those of attention left out. In f32, and in bf16.
struct Products;

impl Measurement for Products {
    fn run(&mut self) -> Vec<Figure> {
        let mut time = [0.0; 2];
        let mut measure = |inputs: usize, outputs: usize, tokens: usize, times: usize| {
            let [x, w, dy] = [tokens * inputs, outputs * inputs, tokens * outputs].map(values);
            let half = [&x, &w, &dy].map(|values| {
                let mut half = vec![half::bf16::ZERO; values.len()];
                candle_kernels_cpu::f32_to_bf16(values, &mut half);
                half
            });
            let mut outs = [tokens * outputs, tokens * inputs, outputs * inputs].map(|length| vec![0.0; length]);
            let of = |[x, w, dy]: [MatrixRef<'_>; 3], outs: &mut [Vec<f32>; 3]| {
                matmul(x, w.transpose(), false, &mut outs[0]);
                matmul(dy, w, false, &mut outs[1]);
                matmul(dy.transpose(), x, true, &mut outs[2]);
            };
            let shapes = [[tokens, inputs], [outputs, inputs], [tokens, outputs]];
            let full = [(&x, shapes[0]), (&w, shapes[1]), (&dy, shapes[2])].map(|(v, [m, n])| MatrixRef::new(v, m, n));
            let [hx, hw, hdy] = &half;
            let narrow = [(hx, shapes[0]), (hw, shapes[1]), (hdy, shapes[2])];
            let narrow = narrow.map(|(v, [m, n])| MatrixRef::bf16(v, m, n));
            of(full, &mut outs);
            time[0] += times as f64 * seconds(|| of(full, &mut outs));
            time[1] += times as f64 * seconds(|| of(narrow, &mut outs));
        };
        for [inputs, outputs] in LAYERS {
            measure(inputs, outputs, TOKENS, LAYER_COUNT);
        }
        measure(WIDTH, VOCABULARY, TOKENS / 2, 2);
        let figure = |path, value| Figure {
            subject: PRODUCTS,
            path,
            unit: "s",
            value,
        };
        vec![figure("kernel, f32", time[0]), figure("kernel, bf16", time[1])]
    }
}

struct InPyTorch {
    peer: Peer,
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        let figure = |subject, unit, name: &str, path| Figure {
            subject,
            path,
            unit,
            value: answer[name].as_f64().unwrap(),
        };
        vec![
            figure(ADAMW, "ns a parameter", "adamw", "PyTorch"),
            figure(HEAD, "ms", "head", "PyTorch"),
            figure(PRODUCTS, "s", "products", "PyTorch, f32"),
        ]
    }
}
