//! A training step of GPT-2 124M, batch 4 x 256, in f32 and in bf16, from SQL and in PyTorch, and the peak memory of each.

use std::time::Instant;

use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::processes::peak_kilobytes;
use postgres::Client;

use crate::peer::{Peer, Program};
use crate::report::{Figure, Measurement, Measurements};

/// Makes the model `m`: GPT-2's smallest shape with random weights.
pub(crate) fn create_gpt2(dtype: &str) -> String {
    format!(
        r#"INSERT INTO llm.models (name, seed, dtype, config) VALUES ('m', 1, '{dtype}',
            '{{"architecture": "gpt2", "layers": 12, "width": 768, "heads": 12, "context_length": 1024,
              "vocabulary": 50257, "tokenizer": "small"}}')"#
    )
}

/// The measurements.
pub(crate) fn measurements() -> Measurements {
    let mut list: Measurements = vec![];
    for work in [F32, BF16] {
        let fixture = Fixture::with_models();
        let mut client = fixture.connect();
        client.batch_execute(&create_gpt2("f32")).unwrap();
        let precision = format!(r#"{{"precision": "{}"}}"#, work.precision);
        client
            .execute(
                "UPDATE llm.models SET config = config || $1::text::jsonb WHERE name = 'm'",
                &[&precision],
            )
            .unwrap();
        list.push(Box::new(FromSql { work, client, fixture }));
        if let Some(peer) = Peer::start(Program::PyTorch, "pytorch_train.py", &[work.precision]) {
            list.push(Box::new(InPyTorch { work, peer }));
        }
    }
    list
}

/// How the step's time grows: one of layers, width and length is halved or doubled. Without PyTorch.
pub(crate) fn growth() -> Measurements {
    const SHAPES: [(&str, u32, u32, u32); 5] = [
        ("training step of a GPT-2, 12 layers x 768, 4 x 256", 12, 768, 256),
        ("training step of a GPT-2, 6 layers x 768, 4 x 256", 6, 768, 256),
        ("training step of a GPT-2, 12 layers x 384, 4 x 256", 12, 384, 256),
        ("training step of a GPT-2, 12 layers x 768, 4 x 128", 12, 768, 128),
        ("training step of a GPT-2, 12 layers x 768, 4 x 512", 12, 768, 512),
    ];
    let list = SHAPES.map(|(subject, layers, width, length)| -> Box<dyn Measurement> {
        Box::new(OfShape {
            subject,
            config: format!(
                r#"{{"architecture": "gpt2", "layers": {layers}, "width": {width}, "heads": {}, "context_length": 1024,
                    "vocabulary": 50257, "tokenizer": "small"}}"#,
                width / 64
            ),
            length,
        })
    });
    list.into()
}

/// Steps of a model that is made for them and dropped, so that only one holds memory.
struct OfShape {
    subject: &'static str,
    config: String,
    length: u32,
}

impl Measurement for OfShape {
    fn run(&mut self) -> Vec<Figure> {
        let fixture = Fixture::with_models();
        let mut client = fixture.connect();
        let create = format!(
            "INSERT INTO llm.models (name, seed, config) VALUES ('m', 1, '{}')",
            self.config
        );
        client.batch_execute(&create).unwrap();
        let length = self.length;
        let step = format!(
            "BEGIN;
             INSERT INTO llm.batches (model, tokens)
             SELECT 'm', array_agg((i * 7919 + 13) % 50257 ORDER BY i) FROM generate_series(0, 4 * {length} - 1) i
             GROUP BY i / {length};
             INSERT INTO llm.optimizer_steps (model, learning_rate) VALUES ('m', 0.0001);
             COMMIT"
        );
        // The first makes the optimizer's moments.
        client.batch_execute(&step).unwrap();
        let started = Instant::now();
        client.batch_execute(&step).unwrap();
        vec![Figure {
            subject: self.subject,
            path: "SQL",
            unit: "s",
            value: started.elapsed().as_secs_f64(),
        }]
    }
}

/// What is measured.
#[derive(Clone, Copy)]
struct Work {
    precision: &'static str,
    step: &'static str,
    memory: &'static str,
}

const F32: Work = Work {
    precision: "f32",
    step: "training step of GPT-2 124M, 4 x 256, f32",
    memory: "training step of GPT-2 124M, 4 x 256, f32: peak memory",
};
const BF16: Work = Work {
    precision: "bf16",
    step: "training step of GPT-2 124M, 4 x 256, bf16",
    memory: "training step of GPT-2 124M, 4 x 256, bf16: peak memory",
};

struct FromSql {
    work: Work,
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
        let megabytes = peak_kilobytes(self.fixture.server.process_id()) as f64 / 1024.0;
        vec![
            Figure {
                subject: self.work.step,
                path: "SQL",
                unit: "s",
                value: seconds,
            },
            Figure {
                subject: self.work.memory,
                path: "compute-server",
                unit: "MB",
                value: megabytes,
            },
        ]
    }
}

struct InPyTorch {
    work: Work,
    peer: Peer,
}

impl Measurement for InPyTorch {
    fn run(&mut self) -> Vec<Figure> {
        let answer = self.peer.measure();
        let megabytes = peak_kilobytes(self.peer.process_id()) as f64 / 1024.0;
        vec![
            Figure {
                subject: self.work.step,
                path: "PyTorch",
                unit: "s",
                value: answer["step"].as_f64().unwrap(),
            },
            Figure {
                subject: self.work.memory,
                path: "PyTorch",
                unit: "MB",
                value: megabytes,
            },
        ]
    }
}
