//! Block-sparse attention against dense attention: the kernels alone, forward and backward, at a length of 2,048 with a
//! quarter of the blocks that causal attention has; and PyTorch's scaled_dot_product_attention, dense and with the mask.

use std::sync::Arc;
use std::time::Instant;

use candle_kernels_cpu::{
    AttentionHeads, AttentionMask, AttentionSaved, BlockLayout, attention_backward, attention_forward,
};

use crate::peer::{Peer, Program};
use crate::report::{Figure, Measurement, Measurements};

const LENGTH: usize = 2048;
const BLOCK: usize = 64;
const HEADS: usize = 12;
const HEAD_DIM: usize = 64;

const FORWARD: &str = "attention of 12 heads of 64 over 2048 tokens, forward";
const BACKWARD: &str = "the same, backward";

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let mut list: Measurements = vec![Box::new(Kernels::new())];
    let arguments = [LENGTH, BLOCK, HEADS, HEAD_DIM].map(|number| number.to_string());
    let arguments = arguments.each_ref().map(String::as_str);
    if let Some(peer) = Peer::start(Program::PyTorch, "pytorch_sparse.py", &arguments) {
        list.push(Box::new(InPyTorch { peer }));
    }
    list
}

/// The diagonal, the first block, and as many others by a hash that a quarter of all is present.
fn layout(head: usize) -> BlockLayout {
    let blocks = LENGTH / BLOCK;
    let wanted = blocks * (blocks + 1) / 2 / 4;
    let mut rows: Vec<Vec<u32>> = (0..blocks as u32).map(|query| vec![query]).collect();
    let mut others: Vec<(usize, usize)> = (0..blocks)
        .flat_map(|query| (0..query).map(move |key| (query, key)))
        .collect();
    others.sort_by_key(|(query, key)| (query * 7919 + key * 104_729 + head * 31) % 10_007);
    for (query, key) in others.into_iter().take(wanted - blocks) {
        rows[query].push(key as u32);
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    BlockLayout::new(BLOCK, rows.iter().map(Vec::as_slice))
}

struct Kernels {
    layouts: Vec<Option<Arc<BlockLayout>>>,
    inputs: [Vec<f32>; 4],
    out: Vec<f32>,
    log_sum_exp: Vec<f32>,
    gradients: [Vec<f32>; 3],
}

impl Kernels {
    fn new() -> Self {
        let length = LENGTH * HEADS * HEAD_DIM;
        let values = |seed: usize| {
            (0..length)
                .map(|i| ((i * 7919 + seed * 31) % 2003) as f32 / 1002.0 - 1.0)
                .collect()
        };
        Self {
            layouts: (0..HEADS).map(|head| Some(Arc::new(layout(head)))).collect(),
            inputs: [0, 1, 2, 3].map(values),
            out: vec![0.0; length],
            log_sum_exp: vec![0.0; LENGTH * HEADS],
            gradients: [(); 3].map(|()| vec![0.0; length]),
        }
    }

    /// Seconds forward and backward.
    fn times(&mut self, sparse: bool) -> [f64; 2] {
        let heads = AttentionHeads {
            heads: HEADS,
            key_value_heads: HEADS,
            head_dim: HEAD_DIM,
            scale: 0.125,
            mask: AttentionMask {
                window: None,
                layouts: if sparse { &self.layouts } else { &[] },
            },
        };
        let [q, k, v, d_out] = &self.inputs;
        let start = Instant::now();
        let log_sum_exp = Some(self.log_sum_exp.as_mut_slice());
        attention_forward(&heads, &[0, LENGTH], [q, k, v], None, &mut self.out, log_sum_exp);
        let forward = start.elapsed().as_secs_f64();
        let saved = AttentionSaved {
            q,
            k,
            v,
            out: &self.out,
            log_sum_exp: &self.log_sum_exp,
        };
        let gradients = self.gradients.each_mut().map(Vec::as_mut_slice);
        let start = Instant::now();
        attention_backward(&heads, &[0, LENGTH], &saved, None, d_out, gradients);
        [forward, start.elapsed().as_secs_f64()]
    }
}

impl Measurement for Kernels {
    fn run(&mut self) -> Vec<Figure> {
        let (dense, sparse) = (self.times(false), self.times(true));
        let figures = [FORWARD, BACKWARD].into_iter().zip(dense).zip(sparse);
        figures
            .flat_map(|((subject, dense), sparse)| {
                let figure = |path, unit, value| Figure {
                    subject,
                    path,
                    unit,
                    value,
                };
                [
                    figure("kernel, dense", "ms", dense * 1e3),
                    figure("kernel, a quarter of the blocks of 64", "ms", sparse * 1e3),
                    figure("dense over sparse", "times", dense / sparse),
                ]
            })
            .collect()
    }
}

struct InPyTorch {
    peer: Peer,
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        let figure = |subject, name: &str, path| Figure {
            subject,
            path,
            unit: "ms",
            value: answer[name].as_f64().unwrap(),
        };
        vec![
            figure(FORWARD, "dense_forward", "PyTorch, dense"),
            figure(FORWARD, "masked_forward", "PyTorch, with the mask"),
            figure(BACKWARD, "dense_backward", "PyTorch, dense"),
            figure(BACKWARD, "masked_backward", "PyTorch, with the mask"),
        ]
    }
}
