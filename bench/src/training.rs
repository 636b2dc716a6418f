//! A training step of GPT-2 124M, batch 4 x 256, from SQL and in PyTorch, and the peak memory of both.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use postgres::Client;

use crate::peer::Peer;
use crate::report::{Figure, Measurement, Measurements};

/// Makes the model `m`: GPT-2's smallest shape with random weights.
pub(crate) const CREATE_GPT2: &str = r#"INSERT INTO llm.models (name, seed, config) VALUES ('m', 1,
    '{"architecture": "gpt2", "layers": 12, "width": 768, "heads": 12, "context_length": 1024, "vocabulary": 50257,
      "tokenizer": "small"}')"#;

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    client.batch_execute(CREATE_GPT2).unwrap();
    let mut list: Measurements = vec![Box::new(FromSql { client, fixture })];
    if let Some(peer) = Peer::start("pytorch_train.py", "gpt2") {
        list.push(Box::new(InPyTorch { peer }));
    }
    list
}

const STEP: &str = "training step of GPT-2 124M, 4 x 256";
const MEMORY: &str = "its peak memory";

struct FromSql {
    client: Client,
    fixture: Fixture,
}

impl Measurement for FromSql {
    fn run(&mut self) -> Vec<Figure> {
        let started = Instant::now();
        self.client
            .batch_execute(
                "BEGIN;
                 INSERT INTO llm.batches (model, tokens)
                 SELECT 'm', array_agg((i * 7919 + 13) % 50257 ORDER BY i) FROM generate_series(0, 1023) i GROUP BY i / 256;
                 INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('m', 0.0001);
                 COMMIT",
            )
            .unwrap();
        let seconds = started.elapsed().as_secs_f64();
        let megabytes = peak_megabytes(self.fixture.server.process_id());
        vec![
            Figure {
                subject: STEP,
                path: "SQL",
                unit: "s",
                value: seconds,
            },
            Figure {
                subject: MEMORY,
                path: "compute-server",
                unit: "MB",
                value: megabytes,
            },
        ]
    }
}

struct InPyTorch {
    peer: Peer,
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        let megabytes = peak_megabytes(self.peer.process_id());
        vec![
            Figure {
                subject: STEP,
                path: "PyTorch",
                unit: "s",
                value: answer["step"].as_f64().unwrap(),
            },
            Figure {
                subject: MEMORY,
                path: "PyTorch",
                unit: "MB",
                value: megabytes,
            },
        ]
    }
}

fn peak_megabytes(process: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}
