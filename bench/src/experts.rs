//! A mixture of experts beside the dense network of the size that a token meets in it: forward and backward over 1,024
//! tokens, without a server; and the same of PyTorch.

use std::time::Instant;

use candle_models::config::from_settings;
use candle_models::training::{Gradient, PassOptions, TrainingSequence, accumulate_in_place};
use candle_models::{Decoder, Device};
use serde_json::json;

use crate::peer::{Peer, Program};
use crate::report::{Figure, Measurement, Measurements};

const SUBJECT: &str = "block of 8 experts, top 2, width 512, inner 1024 each, 1024 tokens, forward and backward";
const TOKENS: usize = 1024;
const VOCABULARY: usize = 64;

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let mut list: Measurements = vec![
        Box::new(Block::new("mixture of experts", "mixtral", 1024)),
        Box::new(Block::new("dense, inner 2048", "llama", 2048)),
    ];
    if let Some(peer) = Peer::start(Program::PyTorch, "pytorch_experts.py", &[]) {
        list.push(Box::new(InPyTorch { peer }));
    }
    list
}

/// A model of one layer with hardly any attention and head: its feed-forward part is nearly all of its work.
struct Block {
    path: &'static str,
    decoder: Decoder,
    gradient: Gradient,
    sequence: TrainingSequence,
}

impl Block {
    fn new(path: &'static str, architecture: &str, inner: usize) -> Self {
        let settings = json!({"architecture": architecture, "layers": 1, "width": 512, "heads": 1, "head_dim": 2,
            "context_length": TOKENS, "vocabulary": VOCABULARY, "feed_forward_width": inner});
        let config = from_settings(settings.as_object().unwrap(), None).unwrap();
        let tokens: Vec<i64> = (0..TOKENS).map(|n| (n * 7919 % VOCABULARY) as i64).collect();
        let sequence = TrainingSequence::new(&tokens, None, None, &config).unwrap();
        let decoder = Decoder::initialize(config, &Device::Cpu, None, 1).unwrap();
        Self {
            path,
            gradient: Gradient::new(&decoder),
            decoder,
            sequence,
        }
    }
}

impl Measurement for Block {
    fn run(&mut self) -> Vec<Figure> {
        let start = Instant::now();
        let sequences = std::slice::from_ref(&self.sequence);
        let options = PassOptions::default();
        accumulate_in_place(&self.decoder, sequences, &mut self.gradient, &options, &|| false).unwrap();
        vec![figure(self.path, start.elapsed().as_secs_f64() * 1e3)]
    }
}

fn figure(path: &'static str, value: f64) -> Figure {
    Figure {
        subject: SUBJECT,
        path,
        unit: "ms",
        value,
    }
}

struct InPyTorch {
    peer: Peer,
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        vec![
            figure("PyTorch, mixture of experts", answer["experts"].as_f64().unwrap()),
            figure("PyTorch, dense, inner 2048", answer["dense"].as_f64().unwrap()),
        ]
    }
}
